// Products with few rows of weights (those back to the residual stream) for many rows of the batch: four blocks share
// their rows and deal the columns of the weights, so that each reads a quarter of the input and not all of it.
//
// Two of the eight slices of columns fall to a block; of its warps, four take each slice: 16 of 64 columns of the pass
// each, or 16 of 32 and half of the rows. The sums of the slices meet in global memory, and each block adds up those of its own rows, in the order in which
// gemm adds them: the bits are the same.
#pragma once

#include "batch/finish.cuh"

constexpr int SHARING = 4;  // blocks
constexpr bool SPLITS_PRODUCTS = COLUMN_GROUPS >= 8 && BLOCKS % SHARING == 0 && LIMITS_FLIGHT;
constexpr int SHARED_ROWS = 8 * ((SHARING * (HIDDEN / 8) + BLOCKS - 1) / BLOCKS);  // of four blocks, at most
constexpr int SHARING_WARPS = 2;                                                    // slices of a block
constexpr int SHARING_COLUMNS = COLUMN_GROUPS >= 8 ? 4 : 2;                         // warps that deal the pass's columns
constexpr int WARP_ROWS = SHARING_COLUMNS;                                          // row groups that a warp multiplies
static_assert(!SPLITS_PRODUCTS || COLUMN_GROUPS <= 8, "16 columns a warp");

struct SharedRows {
    int first, end;  // row groups of the four blocks
    __device__ __forceinline__ explicit SharedRows(int block) {
        first = first_group(HIDDEN / 8, block / SHARING * SHARING);
        end = first_group(HIDDEN / 8, block / SHARING * SHARING + SHARING);
    }
    __device__ __forceinline__ int quads() const { return (end - first + 3) / 4; }
};

// Sums of a slice: [four blocks][pass][slice][column of the pass][row], each with the number of the product that it belongs
// to in its upper half: it arrives with the sum, so that whoever waits for the sum needs no barrier.
__device__ __forceinline__ u64* slice_sums(const BatchArguments& a, int block, int pass, int slice) {
    return a.slices + (((long long)(block / SHARING) * PASSES + pass) * CONSUMER_WARPS + slice) * PASS_COLUMNS * SHARED_ROWS;
}

// ---- producer ----

// Fills one stage with `count` pieces of `bytes`, lane i's from its `from`. By the whole producer warp.
__device__ __forceinline__ void fill_pieces(Ring& ring, RingPosition at, const u8* from, u32 bytes, int count) {
    u8* slot = ring.slots + at.slot * STAGE_BYTES;
    int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) mbarrier_expect(ring.arrivals + at.slot, bytes * count);
    __syncwarp();
    if (lane < count) bulk_copy(slot + lane * bytes, from, bytes, ring.arrivals + at.slot);
    __syncwarp();
#else
    for (int piece = 0; piece < count; ++piece) {
        const uint4* source = (const uint4*)__shfl_sync(0xFFFFFFFFu, (u64)from, piece);
        for (u32 i = lane; i < bytes / 16; i += 32) ((uint4*)(slot + piece * bytes))[i] = __ldg(source + i);
    }
    __threadfence_block();
    __syncwarp();
    if (lane == 0) *ring.landed = at.stage + 1;
#endif
}

// ---- consumers ----

// `count` tiles of this warp's slice, of WARP_ROWS row groups from `from` on, times tiles `first` and up of its operand.
template <int HELD>
__device__ __forceinline__ void multiply_shared_stage(Consumer& c, float (&acc)[WARP_ROWS][4], const SixteenColumns (&x)[HELD], int first, int count, int from, int groups, const Residence& residence) {
    if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
    const uint4* source = (const uint4*)(c.ring.slots + c.next.slot * STAGE_BYTES) + c.warp % SHARING_WARPS * count * 32 + c.lane;
#pragma unroll
    for (int i = 0; i < TILES_PER_STAGE; ++i) {
        if (i >= count) break;
#pragma unroll
        for (int g = 0; g < WARP_ROWS; ++g) {
            uint4 w = source[min(from + g, groups - 1) * SHARING_WARPS * count * 32 + i * 32];  // what is not there is not stored
            const SixteenColumns& columns = x[min(first + i, HELD - 1)];
            multiply16(acc[g], columns[0], w.x, w.y);
            multiply16(acc[g], columns[1], w.z, w.w);
        }
    }
    c.next.advance();
    residence.release(c);
}

template <int MOST_WIDTH>
__device__ __forceinline__ void multiply_slices(Consumer& c, const BatchArguments& a, const u8* input, int width, u32 product) {
    constexpr int MOST = MOST_WIDTH / CONSUMER_WARPS / 32;
    constexpr bool IN_REGISTERS = MOST * 2 <= MOST_OPERANDS;
    constexpr int HELD = IN_REGISTERS ? MOST : TILES_PER_STAGE;
    int tiles = width / CONSUMER_WARPS / 32;
    c.locate();
    SharedRows rows(c.block);
    int slice = c.block % SHARING * SHARING_WARPS + c.warp % SHARING_WARPS, column_group = c.warp / SHARING_WARPS % SHARING_COLUMNS * 2;
    int from = c.warp / (SHARING_WARPS * SHARING_COLUMNS) * WARP_ROWS;
    Residence residence(c, stages_of(rows.quads(), tiles));
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        residence.begin(c, pass);
        const u8* source = input + ((long long)(pass * COLUMN_GROUPS + column_group) / 2 * CONSUMER_WARPS + slice) * tiles * OPERAND_TILE + c.lane * 16;
        SixteenColumns x[HELD];
        auto load = [&](int first, int count) {
#pragma unroll
            for (int i = 0; i < HELD; ++i) load_columns(x[i], source + (first + min(i, count - 1)) * OPERAND_TILE);
        };
        if (IN_REGISTERS) load(0, tiles);
#pragma unroll 1
        for (int group = rows.first; group < rows.end; group += 4) {
            int groups = min(4, rows.end - group);
            float acc[WARP_ROWS][4] = {};
            if constexpr (IN_REGISTERS) {
#pragma unroll
                for (int at = 0; at < MOST; at += TILES_PER_STAGE)
                    if (at < tiles) multiply_shared_stage(c, acc, x, at, min(TILES_PER_STAGE, tiles - at), from, groups, residence);
            } else {
#pragma unroll 1
                for (int at = 0; at < tiles; at += TILES_PER_STAGE) {
                    int count = min(TILES_PER_STAGE, tiles - at);
                    load(at, count);
                    multiply_shared_stage(c, acc, x, 0, count, from, groups, residence);
                }
            }
            u64* to = slice_sums(a, c.block, pass, slice) + (long long)(8 * column_group + c.lane / 4) * SHARED_ROWS + 8 * (group - rows.first + from) + c.lane % 4 * 2;
            auto numbered = [&](float sum) { return (u64)product << 32 | __float_as_uint(sum); };
#pragma unroll
            for (int g = 0; g < WARP_ROWS; ++g) {
                if (from + g >= groups) break;
                store_relaxed64x2(to + 8 * g, numbered(acc[g][0]), numbered(acc[g][1]));
                store_relaxed64x2(to + 8 * SHARED_ROWS + 8 * g, numbered(acc[g][2]), numbered(acc[g][3]));
            }
        }
    }
}

// As gemm, for all blocks together. `product`: its number, as no other's whose sums may still be there.
template <int MOST_WIDTH, class Finish>
__device__ __forceinline__ void gemm_split(Consumer& c, const BatchArguments& a, u32 product, const u8* input, int width, Finish& finish) {
    multiply_slices<MOST_WIDTH>(c, a, input, width, product);
    c.locate();
    SharedRows rows(c.block);
    int begin = first_group(HIDDEN / 8, c.block), end = first_group(HIDDEN / 8, c.block + 1);
    constexpr int COLUMNS = ResidualPlace::COLUMNS;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll 1
        for (int group = begin; group < end; group += 2) {
            int count = group + 1 < end ? 16 : 8, row = ResidualPlace::row(c);
            finish.prepare(0, pass, 8 * group, count);
            u64 sums[COLUMNS][CONSUMER_WARPS] = {};
            if (row < count) {
                const u64* from = slice_sums(a, c.block, pass, 0) + 8 * (group - rows.first) + row + ResidualPlace::column(c, 0) * SHARED_ROWS;
                c.watchdog.spins = 0;
                bool all;
                do {
#pragma unroll
                    for (int i = 0; i < COLUMNS; ++i)
#pragma unroll
                        for (int slice = 0; slice < CONSUMER_WARPS; ++slice)
                            sums[i][slice] = load_relaxed64(from + (slice * PASS_COLUMNS + i * (PASS_COLUMNS / COLUMNS)) * SHARED_ROWS);
                    all = true;
#pragma unroll
                    for (int i = 0; i < COLUMNS; ++i)
#pragma unroll
                        for (int slice = 0; slice < CONSUMER_WARPS; ++slice) all &= (u32)(sums[i][slice] >> 32) == product;
                    if (!all) c.watchdog.check();
                } while (!all);
            }
            __syncwarp();
            if (pass == PASSES - 1 && group + 2 >= end) finish.hush_producer();
            finish(0, pass, 8 * group, count, [&](int i) { return sum_of_slices([&](int slice) { return __uint_as_float((u32)sums[i][slice]); }); });
        }
        finish.end(pass);
    }
}
