// The rows of the logits that a block owns. It computed them itself and keeps their scores in global memory, so nothing
// here waits for other blocks.
//
// This code runs once a token, so most of its instructions come from L2: loops are not unrolled.
#pragma once

#include "layer/head.cuh"

constexpr int CONSUMERS = CONSUMER_WARPS * 32;

struct OwnRows {
    int first, end;  // without padding

    __device__ __forceinline__ explicit OwnRows(int block) {
        constexpr int GROUPS = (VOCAB + 7) / 8;
        first = 8 * first_group(GROUPS, block);
        end = min(8 * first_group(GROUPS, block + 1), VOCABULARY_SIZE);
    }
    __device__ __forceinline__ bool own(u32 row) const { return (int)row >= first && (int)row < end; }
};

// Scores to z = (score - highest) / temperature, which is 0 at most. Loads go ahead of the divisions, in fours.
__device__ __forceinline__ void temper_rows(const Consumer& c, const SamplingArguments& s, float highest) {
    OwnRows rows(c.block);
#pragma unroll 1
    for (int row = rows.first + c.thread; row < rows.end; row += 4 * CONSUMERS) {
        float score[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) score[i] = row + i * CONSUMERS < rows.end ? s.scores[row + i * CONSUMERS] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float z = divide_rounded(subtract_rounded(score[i], highest), s.temperature);
            if (row + i * CONSUMERS < rows.end) s.scores[row + i * CONSUMERS] = z;
        }
    }
}
