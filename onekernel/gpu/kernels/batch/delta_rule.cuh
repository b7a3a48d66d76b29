// The delta rule and the gated norm. An item is one value head of one row; its state comes through the ring of the
// weights, STATE_STAGES stages of 32 value columns, of which a warp has four, or eight. A block has the same items in every layer
// of every step, so that no other block reads or writes their states, and they can be on their way long before.
#pragma once

#include "batch/model.cuh"
#include "primitive/bulk.cuh"

constexpr int WARP_COLUMNS = VALUE_HEAD_DIM / CONSUMER_WARPS;
constexpr int STATE_BYTES = VALUE_HEAD_DIM * KEY_HEAD_DIM * 4;  // of a head
constexpr int STATE_STAGES = STATE_BYTES / STAGE_BYTES, STAGE_COLUMNS = VALUE_HEAD_DIM / STATE_STAGES, COLUMNS_AT_ONCE = STAGE_COLUMNS / CONSUMER_WARPS;
static_assert(WARP_COLUMNS == 16 && KEY_HEAD_DIM == 128, "two sums a column make 32, one a lane; a lane has 4 keys");
static_assert(STATE_STAGES == 4 && COLUMNS_AT_ONCE == 4, "a set has four columns of each stage, eight lanes for them");

// This block's first item from `item` on, in a step of that parity; a.rows * VALUE_HEADS or more if there is none.
__device__ __forceinline__ int next_item(const BatchArguments& a, const Rows& rows, int parity, int item) {
    while (item < a.rows * VALUE_HEADS && !rows.streamed[parity][item / VALUE_HEADS]) item += BLOCKS;
    return item;
}
__device__ __forceinline__ float* head_state(const Rows& rows, int layer, int item) {
    return recurrent_state(rows.state[item / VALUE_HEADS], layer) + (long long)(item % VALUE_HEADS) * VALUE_HEAD_DIM * KEY_HEAD_DIM;
}

// ---- producer ----

// Fills a stage with `bytes` (a multiple of 512) of a state. Other than weights it is written in the same launch.
__device__ __forceinline__ void fill_state_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
#if __CUDA_ARCH__ >= 800
    fill_stage(ring, at, source, bytes);
#else
    uint4* slot = (uint4*)(ring.slots + at.slot * STAGE_BYTES);
#pragma unroll 8
    for (u32 i = threadIdx.x % 32; i < bytes / 16; i += 32) slot[i] = load_l2(source + 16 * i);
    mark_landed(ring, at.stage + 1);
#endif
}

// A stage of pieces: `expect_pieces` says how many bytes come in all, a lane brings a piece with `fill_piece`.
__device__ __forceinline__ void expect_pieces(Ring& ring, RingPosition at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) mbarrier_expect(ring.arrivals + at.slot, bytes);
    __syncwarp();
#endif
}
__device__ __forceinline__ void fill_piece(Ring& ring, RingPosition at, u32 offset, const u8* source, u32 bytes) {
    u8* slot = ring.slots + at.slot * STAGE_BYTES + offset;
#if __CUDA_ARCH__ >= 900
    bulk_copy(slot, source, bytes, ring.arrivals + at.slot);
#else
    for (u32 i = 0; i < bytes; i += 16) *(uint4*)(slot + i) = load_l2(source + i);
#endif
}
__device__ __forceinline__ void finish_pieces(Ring& ring, RingPosition at) {
    __syncwarp();
#if __CUDA_ARCH__ < 900
    __threadfence_block();
    __syncwarp();
    if (threadIdx.x % 32 == 0) *ring.landed = at.stage + 1;
#endif
}

// ---- consumers ----

// Where a block has several items, half of its warps take every other one: some multiply while the others store.
constexpr bool ALTERNATES = BATCH_COLUMNS * VALUE_HEADS > BLOCKS;
constexpr int ITEM_WARPS = ALTERNATES ? CONSUMER_WARPS / 2 : CONSUMER_WARPS;  // of an item
constexpr int SETS = CONSUMER_WARPS / ITEM_WARPS;                             // of 16 value columns, of a warp

// The first of the four value columns of set `set` (of eight) in stage s.
__device__ __forceinline__ int set_column(int set, int s) { return s * STAGE_COLUMNS + set * COLUMNS_AT_ONCE; }

__device__ __forceinline__ float dot_product(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }

// What in_proj left for an item: a lane's four keys, and for lanes 2 i and 2 i + 1 what belongs to column i of each set.
struct ItemInputs {
    float4 q, k;
    float v[SETS], gate[SETS], beta, log_decay;

    __device__ __forceinline__ void load(const Consumer& c, const BatchArguments& a, int first_set, int item) {
        int head = item % VALUE_HEADS;
        const float* projected = a.projected + (long long)(item / VALUE_HEADS) * PROJECTED_STRIDE;
        const float* keys = projected + head / (VALUE_HEADS / KEY_HEADS) * KEY_HEAD_DIM + 4 * c.lane;
        const float* gates = projected + CONV_DIM + VALUE_DIM + head;
        q = load_l2_float4(keys), k = load_l2_float4(keys + KEY_DIM);
#pragma unroll
        for (int j = 0; j < SETS; ++j) {
            int own = head * VALUE_HEAD_DIM + set_column(first_set + j, c.lane / 8) + c.lane / 2 % 4;
            v[j] = load_l2_float(projected + 2 * KEY_DIM + own), gate[j] = load_l2_float(projected + CONV_DIM + own);
        }
        beta = load_l2_float(gates), log_decay = load_l2_float(gates + VALUE_HEADS);
    }
};

// All items of this block, up to the last state's way back to memory: ahead of that it arrives at the next barrier.
__device__ __forceinline__ void delta_rules(Consumer& c, const BatchArguments& a, const Rows& rows, GridBarrier& barrier, int layer, int parity,
                                            float (*squares)[CONSUMER_WARPS]) {
    int end = a.rows * VALUE_HEADS, item = next_item(a, rows, parity, c.block), half = c.warp / ITEM_WARPS, first_set = c.warp % ITEM_WARPS * SETS, turn = 0;
    auto skip = [&]() {  // an item of the others
        if (item < end) advance_ring(c.next, STATE_STAGES), item = next_item(a, rows, parity, item + BLOCKS);
    };
    if (half) skip();
    ItemInputs in;
    in.load(c, a, first_set, min(item, end - 1));
    if (item >= end) barrier.arrive(c);
#pragma unroll 1
    while (item < end) {
        int own = item;
        float4 q = in.q, k = in.k;
        float v[SETS], gate[SETS], beta = in.beta, decay = __expf(in.log_decay);
#pragma unroll
        for (int j = 0; j < SETS; ++j) v[j] = in.v[j], gate[j] = in.gate[j];
        bool active = rows.kind[item / VALUE_HEADS] != ROW_IDLE;
        RingPosition at = c.next;
        advance_ring(c.next, STATE_STAGES), item = next_item(a, rows, parity, item + BLOCKS);
        if (ALTERNATES) skip();
        bool last = item >= end;
        in.load(c, a, first_set, last ? own : item);
        float pairs[4] = {dot_product(q, q), dot_product(k, k), dot_product(k, q), 0};
        float pair = warp_sum_scatter(pairs, c.lane), mine[SETS] = {};
        float4 state[STATE_STAGES][SETS][COLUMNS_AT_ONCE];
        if (ALTERNATES) release_stage(c.ring, at.stage - 1, c.warp, c.lane);  // that of the others
        constexpr int TOGETHER = ALTERNATES ? 1 : 2;                          // stages: 16 sums
#pragma unroll
        for (int s = 0; s < STATE_STAGES; s += TOGETHER) {
            float sums[TOGETHER * SETS * COLUMNS_AT_ONCE * 2];
#pragma unroll
            for (int r = 0; r < TOGETHER; ++r) {
                await_stage(c, at.stage);
                const float4* source = (const float4*)(c.ring.slots + at.slot * STAGE_BYTES) + first_set * COLUMNS_AT_ONCE * (KEY_HEAD_DIM / 4) + c.lane;
#pragma unroll
                for (int i = 0; i < SETS * COLUMNS_AT_ONCE; ++i) {
                    float4 column = source[i * (KEY_HEAD_DIM / 4)];
                    state[s + r][i / COLUMNS_AT_ONCE][i % COLUMNS_AT_ONCE] = column;
                    sums[2 * (r * SETS * COLUMNS_AT_ONCE + i)] = dot_product(column, k), sums[2 * (r * SETS * COLUMNS_AT_ONCE + i) + 1] = dot_product(column, q);
                }
                advance_ring(at, 1);
            }
            release_stage(c.ring, at.stage - 1, c.warp, c.lane);
            // Lane 8 s + i of each set has sum i of stage s.
            float sum = warp_sum_scatter(sums, c.lane);
#pragma unroll
            for (int j = 0; j < SETS; ++j) {
                float moved = __shfl_sync(0xFFFFFFFFu, sum, 2 * (ALTERNATES ? 8 * j + c.lane % 8 : c.lane % 16));
                if (c.lane / (8 * TOGETHER) == s / TOGETHER) mine[j] = moved;
            }
        }
        float qq = __shfl_sync(0xFFFFFFFFu, pair, 0), kk = __shfl_sync(0xFFFFFFFFu, pair, 8), kq = __shfl_sync(0xFFFFFFFFu, pair, 16);
        float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)KEY_HEAD_DIM), k_scale = rsqrtf(kk + 1e-6f);
        float o[SETS], change[SETS];
#pragma unroll
        for (int j = 0; j < SETS; ++j) {
            float other = __shfl_xor_sync(0xFFFFFFFFu, mine[j], 1);
            float sk = c.lane % 2 ? other : mine[j], sq = c.lane % 2 ? mine[j] : other;
            // S^T k and S^T q come from the state before its update.
            float delta = beta * fmaf(-(decay * k_scale), sk, v[j]);
            o[j] = fmaf(delta, kq * k_scale * q_scale, decay * q_scale * sq);
            change[j] = k_scale * delta;
            float square = warp_sum(c.lane % 2 ? 0.0f : __fmul_rn(o[j], o[j]));
            if (c.lane == 0) squares[2 * half + turn][first_set + j] = square;
        }
        if (ALTERNATES)
            group_barrier(2 + half, 32 * ITEM_WARPS);
        else
            consumer_barrier();
        float total = 0;
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS; ++w) total += squares[2 * half + turn][w];
        turn ^= 1;
        if (last && (int)(*c.ring.landed - c.next.stage) >= 0) hush(barrier.quiet);
        float inverse = rsqrtf(total / VALUE_HEAD_DIM + NORM_EPS);
#pragma unroll
        for (int j = 0; j < SETS; ++j) {
            int place = own % VALUE_HEADS * VALUE_HEAD_DIM + set_column(first_set + j, c.lane / 8) + c.lane / 2 % 4;
            if (active && c.lane % 2 == 0) *operand_place<VALUE_DIM>(a.mixed, own / VALUE_HEADS, place) = to_16_bit(o[j] * inverse * gate[j]);
        }
        if (last) barrier.arrive(c);
        float* to = head_state(rows, layer, own) + 4 * c.lane;
#pragma unroll
        for (int s = 0; s < STATE_STAGES; ++s)
#pragma unroll
            for (int j = 0; j < SETS; ++j)
#pragma unroll
                for (int i = 0; i < COLUMNS_AT_ONCE; ++i) {
                    float d = __shfl_sync(0xFFFFFFFFu, change[j], 8 * s + 2 * i);
                    float4 old = state[s][j][i];
                    float4 updated = make_float4(fmaf(k.x, d, decay * old.x), fmaf(k.y, d, decay * old.y), fmaf(k.z, d, decay * old.z), fmaf(k.w, d, decay * old.w));
                    store4_if(to + (set_column(first_set + j, s) + i) * KEY_HEAD_DIM, updated, active);
                }
    }
    if (!ALTERNATES) return;
    release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
    await_stage(c, c.next.stage - 1);
}
