// Matrix times vector from the weight ring, K split over the consumer warps.
//
// A matrix of ROWS x COLUMNS is cut into groups of 8 rows, dealt to the blocks in contiguous runs. Warp w owns columns
// w * COLUMNS / 8 and up, of every row; the sums of the 8 warps meet in shared memory, BATCH_GROUPS groups at a time,
// behind one barrier. The layout of the tape is that of gpu/tape.py.
#pragma once

#include "primitive/exchange.cuh"
#include "primitive/mma.cuh"
#include "primitive/ring.cuh"
#include "primitive/warp.cuh"

constexpr int BATCH_ROWS = 8 * BATCH_GROUPS;

// What the consumer warps of a block share, and where this thread stands.
struct Consumer {
    Ring ring;
    u32 stage;                      // the next stage of the tape
    u32* activations;               // shared: this warp's slice of the input vector, as 16-bit pairs
    float (*sums)[CONSUMER_WARPS][BATCH_ROWS];  // shared, [2]: partial row sums, double-buffered
    float (*squares)[CONSUMER_WARPS];           // shared, [2]: partial sums of squares of the input
    int buffer;                     // which of the two
    int warp, lane;
    Watchdog watchdog;
};

__device__ __forceinline__ int first_group(int groups, int block) { return (int)((long long)groups * block / BLOCKS); }

// Columns of the input vector that this warp multiplies.
__device__ __forceinline__ int slice_start(int columns, int warp) { return columns / CONSUMER_WARPS * warp; }

// Puts columns 4 i to 4 i + 3 of the slice where tile_mma wants them: within 8 columns (4 words) in the order 0 2 1 3.
__device__ __forceinline__ void store_activations(Consumer& c, int i, float4 v) {
    u32* at = c.activations + i / 2 * 4 + i % 2;
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
    int start = slice_start(COLUMNS, c.warp);
    float squares = 0;
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

// y = W x for this block's rows. `squares` is the lane's sum of squares of its part of x (0 where no norm is wanted).
// For each batch of row groups: finish.prepare(first_group, groups) before the weights are needed, then, behind the
// barrier, finish(first_group, groups, sum) where sum(i) is row i of the batch.
template <int ROWS, int COLUMNS, class Finish>
__device__ __forceinline__ void gemv(Consumer& c, float squares, Finish& finish) {
    constexpr int TILES = COLUMNS / CONSUMER_WARPS / 32;  // a row group, for one warp
    constexpr bool ALIGNED = TILES % TILES_PER_STAGE == 0;
    constexpr int GROUPS = (ROWS + 7) / 8;
    int group = first_group(GROUPS, blockIdx.x), groups_end = first_group(GROUPS, blockIdx.x + 1);
    int tiles = (groups_end - group) * TILES;
    if (tiles == 0) return;

    squares = warp_sum(squares);
    finish.prepare(group, min(BATCH_GROUPS, groups_end - group));

    struct Tiles {
        uint4 w[TILES_PER_STAGE];
        uint2 x[TILES_PER_STAGE];
    };
    int load_column = 0;  // tile column of the next tile to load
    const u32* x = c.activations + c.lane % 4 * 4 + (c.lane >> 2 & 1) * 2;
    auto load = [&](Tiles& t, int count) {
        wait_until_full(c.ring, c.stage, c.watchdog);
        const u8* slot = c.ring.slots + c.stage % RING_STAGES * STAGE_BYTES + (c.warp * count * 32 + c.lane) * 16;
#pragma unroll
        for (int i = 0; i < TILES_PER_STAGE; ++i)
            if (i < count) {
                t.w[i] = *(const uint4*)(slot + i * 512);
                t.x[i] = *(const uint2*)(x + load_column * 16);
                if (++load_column == TILES) load_column = 0;
            }
        release_stage(c.ring, c.stage++);
    };
    Accumulator acc[TILES_PER_STAGE] = {};
    int column = 0, local = 0;
    auto flush = [&] {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < TILES_PER_STAGE; ++i) {
            sum += acc[i].row_sum();
            acc[i] = Accumulator{};
        }
        if (c.lane % 4 == 0) c.sums[c.buffer][c.warp][local * 8 + c.lane / 4] = sum;
        column = 0;
        ++local;
        if (local == BATCH_GROUPS || group + local == groups_end) {
            if (c.lane == 0) c.squares[c.buffer][c.warp] = squares;
            consumer_barrier();
            finish(group, local, [&](int i) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < CONSUMER_WARPS; ++w) sum += c.sums[c.buffer][w][i];
                return sum;
            });
            group += local;
            local = 0;
            c.buffer ^= 1;
            if (group < groups_end) finish.prepare(group, min(BATCH_GROUPS, groups_end - group));
        }
    };
    auto multiply = [&](const Tiles& t, int count) {
#pragma unroll
        for (int i = 0; i < TILES_PER_STAGE; ++i)
            if (i < count) {
                tile_mma(acc[i], t.w[i], t.x[i]);
                if (++column == TILES && (!ALIGNED || i == TILES_PER_STAGE - 1)) flush();
            }
    };
    // The tiles of the next stage are loaded before those of the current one are multiplied.
    auto count_at = [&](int at) { return ALIGNED ? TILES_PER_STAGE : min(TILES_PER_STAGE, tiles - at); };
    Tiles even, odd;
    load(even, count_at(0));
    for (int at = 0; at < tiles; at += 2 * TILES_PER_STAGE) {
        int next = at + TILES_PER_STAGE, after = next + TILES_PER_STAGE;
        if (next < tiles) load(odd, count_at(next));
        multiply(even, count_at(at));
        if (next >= tiles) break;
        if (after < tiles) load(even, count_at(after));
        multiply(odd, count_at(next));
    }
}
