// What all phases of a batched step share: sizes, the rows of the batch, where vectors stand, the barrier.
//
// A row of the batch is one sequence: it has a column of every product. Columns are multiplied in passes of PASS_COLUMNS.
//
// A sequence must get the same bits from the kernel of every bucket, so nothing is left to the compiler that it could
// decide differently in two of them: where a sum has two products, fmaf says which of them is rounded.
#pragma once

#include "layer/attention.cuh"
#include "layer/head.cuh"
#include "layer/linear_attention.cuh"
#include "primitive/grid_barrier.cuh"
#include "primitive/matrix.cuh"

constexpr int PASS_COLUMNS = 8 * COLUMN_GROUPS;
constexpr int BATCH_COLUMNS = PASSES * PASS_COLUMNS;
constexpr int SUM_STRIDE = PASS_COLUMNS + 1;
constexpr int COLUMNS_A_THREAD = (PASS_COLUMNS + 15) / 16;  // that a thread finishes, in each pass
constexpr int PROJECTED_STRIDE = ((PROJECTED_LINEAR > PROJECTED_FULL ? PROJECTED_LINEAR : PROJECTED_FULL) + 3) / 4 * 4;
constexpr int SQUARES_STRIDE = (BLOCKS + 3) / 4 * 4;
constexpr int MIXED_COLUMNS = VALUE_DIM > QUERY_DIM ? VALUE_DIM : QUERY_DIM;
static_assert(TILES_PER_STAGE == 4 && CONSUMER_WARPS == 8, "see gemm.cuh");

enum RowKind : int { ROW_IDLE, ROW_PLAIN, ROW_SAMPLED };

// The rows as every block keeps them: all blocks come to the same.
struct Rows {
    u8* state[BATCH_COLUMNS];
    int max_context[BATCH_COLUMNS];
    int token[BATCH_COLUMNS];     // to consume next
    int position[BATCH_COLUMNS];  // of that token
    int made[BATCH_COLUMNS];      // tokens so far
    RowKind kind[BATCH_COLUMNS];
    // Whether its states come through the ring in a step of that parity. As the kind was two steps ago: the producer is
    // ahead, and must come to the same as the consumers.
    volatile bool streamed[2][BATCH_COLUMNS];
};

// The place of a vector's element in the input of a product with WIDTH columns of weights. 16 rows of the batch stand
// together, in tiles of 16 x 32 numbers. A tile has two halves of 512 bytes, each the 16 x 16 operand of a tensor-core
// product in the order of its fragment: a lane's 16 bytes go from memory into the registers that the instruction takes.
// Where there are no more than 8 rows, tiles are of 8 x 32 numbers, as those of the weights on the tape.
constexpr bool EIGHT_ROWS = BATCH_COLUMNS == 8;
constexpr int OPERAND_TILE = EIGHT_ROWS ? 512 : 1024;  // bytes
template <int WIDTH>
__device__ __forceinline__ u16* operand_place(u8* input, int row, int column) {
    if (EIGHT_ROWS) return (u16*)(input + (column / 32) * 512 + (row * 4 + column % 32 / 8) * 16) + column % 8;
    int half = column % 8 / 4, lane = row % 8 * 4 + column % 32 / 8, word = column % 4 / 2 * 2 + row % 16 / 8;
    return (u16*)(input + ((long long)(row / 16) * (WIDTH / 32) + column / 32) * 1024 + half * 512 + lane * 16 + word * 4) + column % 2;
}
__device__ __forceinline__ u16 to_16_bit(float x) { return (u16)pack2(x, 0.0f); }

// With the quick division: the code of a phase runs once a layer, so that its length counts.
__device__ __forceinline__ float quick_sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-1.44269504f * x)); }
// log(1 + e^x); by its series where 1 + e^x would lose what counts.
__device__ __forceinline__ float softplus(float x) {
    float e = __expf(x);
    float series = fmaf(-e * e, fmaf(e, -1.0f / 3.0f, 0.5f), e);
    return x > 20.0f ? x : x < -5.0f ? series : __logf(1.0f + e);
}

__device__ __forceinline__ float load_l2_float(const float* p) { return __uint_as_float(load_relaxed((const u32*)p)); }
__device__ __forceinline__ float4 load_l2_float4(const float* p) {
    uint4 v = load_l2(p);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ __forceinline__ LinearLayer linear_layer(const BatchArguments& a, int layer) {
    LinearLayer l;
    l.conv_weight = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    l.negative_decay_rate = l.conv_weight + 4 * CONV_DIM;
    l.dt_bias = l.negative_decay_rate + VALUE_HEADS;
    l.gated_norm = l.dt_bias + VALUE_HEADS;
    l.conv_window = l.recurrent_state = nullptr;  // one a row: see below
    return l;
}
__device__ __forceinline__ float* conv_window(u8* state, int layer) { return (float*)state + (layer - full_layers_before(layer)) * LINEAR_STATE; }
__device__ __forceinline__ float* recurrent_state(u8* state, int layer) { return conv_window(state, layer) + 4 * CONV_DIM; }
__device__ __forceinline__ u16* keys_of(u8* state, int layer, int max_context) {
    return (u16*)(state + LINEAR_LAYERS * LINEAR_STATE * 4) + (long long)full_layers_before(layer) * 2 * KV_DIM * max_context;
}

// Where a warp does not take every stage of the ring: it passes over those of the others, and its count of what has
// landed may be of any stage before.
__device__ __forceinline__ void advance_ring(RingPosition& at, int stages) {
    at.stage += stages, at.slot += stages;
    while (at.slot >= RING_STAGES) at.slot -= RING_STAGES, ++at.round;
}
__device__ __forceinline__ void await_stage(Consumer& c, u32 stage) {
    while ((int)((c.landed = *c.ring.landed) - stage) <= 0) c.watchdog.check();
    asm volatile("" ::: "memory");
}

// Asks the producer for silence: copies on their way make a release wait. Once everything that this phase takes from the
// ring has landed, and until this block has arrived at the barrier.
__device__ __forceinline__ void hush(volatile u32* quiet) {
    if (HUSHES && thread_index() == 0) *quiet = 1;
}

// The barrier over all blocks, in two halves: what lies between them may use nothing that other blocks write.
struct GridBarrier {
    const BatchArguments& a;
    u32 target;
    u32* passed;          // shared: barriers in this step
    volatile u32* quiet;  // shared: see hush

    __device__ __forceinline__ void arrive(Consumer& c) {
        target += BLOCKS;
        consumer_barrier();
        if (thread_index() == 0) {
            arrive_at(a.barrier);
            if (HUSHES) *quiet = 0;
        }
    }
    __device__ __forceinline__ void wait(Consumer& c) {
        if (thread_index() == 0) {
            c.watchdog.spins = 0;
            while ((int)(load_acquire(a.barrier) - target) < 0) c.watchdog.check();
            if (a.times && block_index() == 0) a.times[++*passed] = nanoseconds();
        }
        consumer_barrier();
        c.locate();
    }
    __device__ __forceinline__ void meet(Consumer& c) {
        arrive(c);
        wait(c);
    }
};
