// Matrix times vector from the weight ring, K split over the consumer warps.
//
// A matrix of ROWS x COLUMNS is cut into groups of 8 rows, dealt to the blocks in contiguous runs. Warp w owns columns
// w * COLUMNS / 8 and up, of every row; the sums of the 8 warps meet in shared memory, BATCH_GROUPS groups at a time,
// behind one barrier. The layout of the tape is that of gpu/tape.py: stages never reach across row groups.
#pragma once

#include "primitive/exchange.cuh"
#include "primitive/mma.cuh"
#include "primitive/ring.cuh"
#include "primitive/timeline.cuh"
#include "primitive/warp.cuh"

constexpr int BATCH_ROWS = 8 * BATCH_GROUPS;

// What the consumer warps of a block share, and where this thread stands.
struct Consumer {
    Ring ring;
    RingPosition next;              // the next stage of the tape
    u32 landed;                     // stages that are known to be in shared memory
    u32* activations;               // shared: the input vector as 16-bit pairs, each warp's slice on its own
    float (*sums)[CONSUMER_WARPS][BATCH_ROWS];  // shared, [2]: partial row sums, double-buffered
    float (*squares)[CONSUMER_WARPS];           // shared, [2]: partial sums of squares of the input
    int buffer;                     // which of the two
    int block, thread, warp, lane;
    Watchdog watchdog;
    Timeline timeline;

    __device__ __forceinline__ void mark(Mark kind) { timeline.mark(thread == 0, kind, watchdog.layer); }

    // Called at the start of each phase.
    __device__ __forceinline__ void enter(u32 phase, u32 layer) {
        watchdog.enter(phase, layer);
        locate();
    }
    __device__ __forceinline__ void locate() {
        block = block_index();
        thread = thread_index();
        warp = thread / 32;
        lane = thread % 32;
    }
};

__device__ __forceinline__ int first_group(int groups, int block) { return (int)((long long)groups * block / BLOCKS); }

// Columns of the input vector that this warp multiplies.
__device__ __forceinline__ int slice_start(int columns, int warp) { return columns / CONSUMER_WARPS * warp; }

__device__ __forceinline__ u32* own_activations(Consumer& c) {
    return c.activations + ACTIVATION_COLUMNS / CONSUMER_WARPS / 2 * c.warp;
}

// Puts columns 4 i to 4 i + 3 of the slice where tile_mma wants them: within 8 columns (4 words) in the order 0 2 1 3.
__device__ __forceinline__ void store_activations(Consumer& c, int i, float4 v) {
    u32* at = own_activations(c) + i / 2 * 4 + i % 2;
    at[0] = pack2(v.x, v.y);
    at[2] = pack2(v.z, v.w);
}

// Receives this warp's slice of an exchanged vector, times `scale` if given, and stores it as activations.
// Returns this lane's part of the slice's sum of squares (before scaling).
template <int COLUMNS>
__device__ __forceinline__ float receive_activations(Consumer& c, const u32* channel, u32 tag, const float* scale) {
    constexpr int VECTORS = COLUMNS / CONSUMER_WARPS / 4;
    constexpr int PER_LANE = (VECTORS + 31) / 32;
    constexpr int AT_ONCE = PER_LANE < 4 ? PER_LANE : 4;
    c.locate();
    int start = slice_start(COLUMNS, c.warp);
    float squares = 0;
    channel = copy_for<COLUMNS>(channel, c.block);
    await_word(channel + start + COLUMNS / CONSUMER_WARPS - 1, tag, c.watchdog);
    for (int base = 0; base < PER_LANE; base += AT_ONCE) {
        int first = base * 32 + c.lane;
        int valid = (VECTORS - first + 31) / 32;
        float4 v[AT_ONCE];
        float4 factor[AT_ONCE];
        if (scale)
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                if (i < valid) factor[i] = load_constant4(scale + start + 4 * (first + 32 * i));
        receive4_many<AT_ONCE>(v, channel + start + 4 * first, 128, valid, tag, c.watchdog);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (i < valid) {
                float4 x = v[i];
                squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
                if (scale) x = make_float4(x.x * factor[i].x, x.y * factor[i].y, x.z * factor[i].z, x.w * factor[i].w);
                store_activations(c, first + 32 * i, x);
            }
    }
    __syncwarp();
    c.mark(MARK_RECEIVED);
    return squares;
}

// The factor 1 / rms of the whole input vector, once every warp has left its part in c.squares and passed the barrier.
template <int COLUMNS>
__device__ __forceinline__ float inverse_rms(const Consumer& c) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) total += c.squares[c.buffer][w];
    return rsqrtf(total / COLUMNS + NORM_EPS);
}

// This warp's slice of the input vector, in the order in which tile_mma takes it: in registers where it is short.
template <int TILES>
struct Slice {
    static constexpr bool IN_REGISTERS = TILES <= MOST_TILES_IN_REGISTERS;
    const u32* source;
    uint2 words[IN_REGISTERS ? TILES : 1];

    __device__ __forceinline__ explicit Slice(Consumer& c) : source(own_activations(c) + c.lane % 4 * 4 + (c.lane >> 2 & 1) * 2) {
        if (IN_REGISTERS)
#pragma unroll
            for (int i = 0; i < (IN_REGISTERS ? TILES : 1); ++i) words[i] = *(const uint2*)(source + i * 16);
    }
    __device__ __forceinline__ uint2 operator[](int tile) const { return IN_REGISTERS ? words[tile] : *(const uint2*)(source + tile * 16); }
};

__device__ constexpr int stages_of(int tiles) { return (tiles + TILES_PER_STAGE - 1) / TILES_PER_STAGE; }

// A stage of a row group in registers: COUNT tiles of this warp.
template <int COUNT>
__device__ __forceinline__ void fetch_stage(Consumer& c, uint4 (&w)[TILES_PER_STAGE]) {
    if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
    const uint4* source = (const uint4*)(c.ring.slots + c.next.slot * STAGE_BYTES) + c.warp * COUNT * 32 + c.lane;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) w[i] = source[i * 32];
    c.next.advance();
}

// This warp's part of the sums of one row group; row r is with the lanes 4 r. The group's first stage is in `a`; while a
// stage is multiplied the next one is fetched, across groups unless this is the `last`. The first stage of the next group
// ends up in `a` where a group has an even number of stages, otherwise in `b`.
template <int TILES>
__device__ __forceinline__ float multiply_group(Consumer& c, const Slice<TILES>& x, uint4 (&a)[TILES_PER_STAGE], uint4 (&b)[TILES_PER_STAGE],
                                                bool last) {
    constexpr int STAGES = stages_of(TILES), PAIRS = (STAGES - 1) / 2;
    constexpr int FIRST = TILES < TILES_PER_STAGE ? TILES : TILES_PER_STAGE, LAST = TILES - (STAGES - 1) * TILES_PER_STAGE;
    Accumulator acc[2] = {};
    u32 stage = c.next.stage - 1;
    auto multiply = [&](const uint4 (&w)[TILES_PER_STAGE], int first, int count) {
#pragma unroll
        for (int i = 0; i < TILES_PER_STAGE; ++i)
            if (i < count) tile_mma(acc[i & 1], w[i], x[first + i]);
        release_stage(c.ring, stage++, c.warp, c.lane);
    };
    auto pair = [&](int p) {
        fetch_stage<TILES_PER_STAGE>(c, b);
        multiply(a, 2 * p * TILES_PER_STAGE, TILES_PER_STAGE);
        if (2 * p + 2 == STAGES - 1) fetch_stage<LAST>(c, a);
        else fetch_stage<TILES_PER_STAGE>(c, a);
        multiply(b, (2 * p + 1) * TILES_PER_STAGE, TILES_PER_STAGE);
    };
    if constexpr (Slice<TILES>::IN_REGISTERS) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) pair(p);
    } else {
#pragma unroll 1
        for (int p = 0; p < PAIRS; ++p) pair(p);
    }
    if constexpr (STAGES % 2 == 0) {
        fetch_stage<LAST>(c, b);
        multiply(a, (STAGES - 2) * TILES_PER_STAGE, TILES_PER_STAGE);
        if (!last) fetch_stage<FIRST>(c, a);
        multiply(b, (STAGES - 1) * TILES_PER_STAGE, LAST);
    } else {
        if (!last) fetch_stage<FIRST>(c, b);
        multiply(a, (STAGES - 1) * TILES_PER_STAGE, LAST);
    }
    return acc[0].row_sum() + acc[1].row_sum();
}

// y = W x for this block's rows. `squares` is the lane's sum of squares of its part of x (0 where no norm is wanted).
// For each batch of row groups: finish.prepare(first_group, groups) before the weights are needed, then, behind the
// barrier, finish(first_group, groups, sum) where sum(i) is row i of the batch.
template <int ROWS, int COLUMNS, class Finish>
__device__ __forceinline__ void gemv(Consumer& c, float squares, Finish& finish) {
    constexpr int TILES = COLUMNS / CONSUMER_WARPS / 32;  // of a row group, for one warp
    constexpr int GROUPS = (ROWS + 7) / 8;
    c.locate();
    int group = first_group(GROUPS, c.block), end = first_group(GROUPS, c.block + 1);
    Slice<TILES> x(c);
    uint4 even[TILES_PER_STAGE], odd[TILES_PER_STAGE];
    if (group < end) fetch_stage<(TILES < TILES_PER_STAGE ? TILES : TILES_PER_STAGE)>(c, even);
    squares = warp_sum(squares);
    while (group < end) {
        int count = min(BATCH_GROUPS, end - group);
        finish.prepare(group, count);
        auto multiply = [&](uint4 (&a)[TILES_PER_STAGE], uint4 (&b)[TILES_PER_STAGE], int local) {
            float sum = multiply_group<TILES>(c, x, a, b, group + local + 1 == end);
            if (c.lane % 4 == 0) c.sums[c.buffer][c.warp][local * 8 + c.lane / 4] = sum;
        };
        if constexpr (stages_of(TILES) % 2 == 0) {
#pragma unroll 1
            for (int local = 0; local < count; ++local) multiply(even, odd, local);
        } else {
#pragma unroll 1
            for (int local = 0; local < count; local += 2) {
                multiply(even, odd, local);
                if (local + 1 < count) multiply(odd, even, local + 1);
            }
        }
        if (c.lane == 0) c.squares[c.buffer][c.warp] = squares;
        c.mark(MARK_MULTIPLIED);
        consumer_barrier();
        if (behind_barrier(c.activations)) c.mark(MARK_SUMMED);
        finish(group, count, [&](int i) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < CONSUMER_WARPS; ++w) sum += c.sums[c.buffer][w][i];
            return sum;
        });
        c.mark(MARK_PUBLISHED);
        // What all blocks publish now comes no sooner: polls before that only stand in its way.
        if (Finish::EXCHANGED) pause(c.warp * 32 < count * 8 ? POLL_AFTER_PUBLISHING : POLL_AFTER);
        group += count;
        c.buffer ^= 1;
    }
}
