// Weights times the rows of the batch: y[row of weights, row of the batch], the weights streamed once a pass.
//
// Two groups of 8 rows of weights are the 16 rows of a tensor-core product, 8 rows of the batch its columns. Each of the
// 8 warps multiplies an eighth of the matrix's columns, in the order of the tape; the eight sums are added in the order
// of the warps. That order is the same for every number of rows, so that no sequence's bits depend on its company.
#pragma once

#include "batch/model.cuh"

constexpr int MOST_OPERANDS = 32;  // tiles of the input that a warp keeps in registers

using Sums = float[CONSUMER_WARPS][16 * SUM_STRIDE];

// This warp's slice of the input, for the rows of one pass.
template <int WIDTH>
struct Operand {
    static constexpr int TILES = WIDTH / CONSUMER_WARPS / 32;
    static constexpr bool IN_REGISTERS = TILES * COLUMN_GROUPS <= MOST_OPERANDS;
    static constexpr int HELD = IN_REGISTERS ? TILES : TILES_PER_STAGE;
    const u8* source;
    uint4 words[HELD][COLUMN_GROUPS];

    __device__ __forceinline__ Operand(const Consumer& c, const u8* input, int pass)
        : source(input + ((long long)pass * COLUMN_GROUPS * (WIDTH / 32) + c.warp * TILES) * 512 + c.lane * 16) {
        if (IN_REGISTERS) load(0, TILES);
    }
    __device__ __forceinline__ void load(int first, int count) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g)
                if (i < count) words[i][g] = load_l2(source + ((long long)g * (WIDTH / 32) + first + i) * 512);
    }
};

// COUNT tiles of this warp of one or two row groups, as they come from the ring, times tiles FIRST and up of the operand.
template <int COUNT, int WIDTH>
__device__ __forceinline__ void multiply_stage(Consumer& c, float (&acc)[COLUMN_GROUPS][4], const Operand<WIDTH>& x, int first, bool pair) {
    uint4 low[TILES_PER_STAGE], high[TILES_PER_STAGE];
    fetch_stage<COUNT>(c, low);
    if (pair)
        fetch_stage<COUNT>(c, high);
    else
#pragma unroll
        for (int i = 0; i < COUNT; ++i) high[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const u32 even[4] = {low[i].x, high[i].x, low[i].z, high[i].z}, odd[4] = {low[i].y, high[i].y, low[i].w, high[i].w};
#pragma unroll
        for (int g = 0; g < COLUMN_GROUPS; ++g) {
            uint4 v = x.words[first + i][g];
            multiply16(acc[g], even, v.x, v.z);
            multiply16(acc[g], odd, v.y, v.w);
        }
    }
    release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
}

// For each pass and pair of row groups: finish.prepare(pass, first row, rows) ahead of the weights, then finish(pass,
// first row, rows, sum), where sum(column) is the product for row threadIdx.x % 16 of them and a column of the pass.
template <int ROWS, int WIDTH, class Finish>
__device__ __forceinline__ void gemm(Consumer& c, Sums* sums, const u8* input, Finish& finish) {
    constexpr int TILES = Operand<WIDTH>::TILES, STAGES = (TILES + TILES_PER_STAGE - 1) / TILES_PER_STAGE;
    constexpr int FULL_STAGES = TILES / TILES_PER_STAGE, REST = TILES % TILES_PER_STAGE, GROUPS = (ROWS + 7) / 8;
    c.locate();
    int begin = first_group(GROUPS, c.block), end = first_group(GROUPS, c.block + 1);
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        Operand<WIDTH> x(c, input, pass);
        finish.begin(pass);
#pragma unroll 1
        for (int group = begin; group < end; group += 2) {
            bool pair = group + 1 < end;
            finish.prepare(pass, 8 * group, pair ? 16 : 8);
            float acc[COLUMN_GROUPS][4];
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g) acc[g][0] = acc[g][1] = acc[g][2] = acc[g][3] = 0;
            if constexpr (Operand<WIDTH>::IN_REGISTERS) {
#pragma unroll
                for (int s = 0; s < FULL_STAGES; ++s) multiply_stage<TILES_PER_STAGE>(c, acc, x, s * TILES_PER_STAGE, pair);
                if constexpr (REST) multiply_stage<REST>(c, acc, x, FULL_STAGES * TILES_PER_STAGE, pair);
            } else {
#pragma unroll 1
                for (int s = 0; s < FULL_STAGES; ++s) {
                    x.load(s * TILES_PER_STAGE, TILES_PER_STAGE);
                    multiply_stage<TILES_PER_STAGE>(c, acc, x, 0, pair);
                }
                if constexpr (REST) {
                    x.load(FULL_STAGES * TILES_PER_STAGE, REST);
                    multiply_stage<REST>(c, acc, x, 0, pair);
                }
            }
            float* own = sums[c.buffer][c.warp] + c.lane / 4 * SUM_STRIDE + 2 * (c.lane % 4);
#pragma unroll
            for (int g = 0; g < COLUMN_GROUPS; ++g) {
                own[8 * g] = acc[g][0], own[8 * g + 1] = acc[g][1];
                own[8 * SUM_STRIDE + 8 * g] = acc[g][2], own[8 * SUM_STRIDE + 8 * g + 1] = acc[g][3];
            }
            consumer_barrier();
            const float* row = sums[c.buffer][0] + c.thread % 16 * SUM_STRIDE;
            finish(pass, 8 * group, pair ? 16 : 8, [&](int column) {
                float sum = 0;
#pragma unroll
                for (int w = 0; w < CONSUMER_WARPS; ++w) sum += row[w * 16 * SUM_STRIDE + column];
                return sum;
            });
            c.buffer ^= 1;
        }
        finish.end(pass);
    }
    static_assert(STAGES >= 1, "a warp has tiles");
}

// The columns of a pass that this thread finishes: thread / 16, and every 16th from there on. Whole warps take part.
template <class Do>
__device__ __forceinline__ void each_column(const Consumer& c, Do work) {
#pragma unroll
    for (int i = 0; i < COLUMNS_A_THREAD; ++i) {
        int column = c.thread / 16 + 16 * i;
        if (column < PASS_COLUMNS) work(i, column);
    }
}
