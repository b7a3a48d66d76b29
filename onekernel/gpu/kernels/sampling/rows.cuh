// The rows of the logits that a block owns, and each of them on its way to a score.
//
// A block computed its rows of the LM head itself and keeps them in global memory, so nothing here waits for other
// blocks. A thread takes four neighbouring rows at a time, in every pass the same ones.
#pragma once

#include "layer/head.cuh"
#include "sampling/elementary.cuh"

constexpr int CONSUMERS = CONSUMER_WARPS * 32;
constexpr int ROWS_AT_ONCE = 4 * CONSUMERS;  // of a block

struct OwnRows {
    int first, end;  // multiples of 8; rows from VOCABULARY_SIZE on are padding

    __device__ __forceinline__ explicit OwnRows(int block) {
        constexpr int GROUPS = (VOCAB + 7) / 8;
        first = 8 * first_group(GROUPS, block);
        end = 8 * first_group(GROUPS, block + 1);
    }
    __device__ __forceinline__ bool own(u32 row) const { return (int)row >= first && (int)row < end; }
};

// Four floats with an index that is known when the loops over it are unrolled.
struct Quad {
    float value[4];

    __device__ __forceinline__ explicit Quad(const float* from) {
        float4 v = *(const float4*)from;
        value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
    }
    __device__ __forceinline__ void store(float* to) const { *(float4*)to = make_float4(value[0], value[1], value[2], value[3]); }
};

// After penalties and bias, as Sampler._adjusted.
__device__ __forceinline__ float adjusted(const SamplingArguments& s, float score, int row) {
    if (s.counts) {
        u32 word = s.counts[row], count = word & 0x7FFFFFFFu;
        if (word >> 31) score = score > 0.0f ? divide_rounded(score, s.repetition_penalty) : multiply_rounded(score, s.repetition_penalty);
        if (count) {
            score = subtract_rounded(score, multiply_rounded(__uint2float_rn(count), s.frequency_penalty));
            score = subtract_rounded(score, s.presence_penalty);
        }
    }
    if (s.bias) score = add_rounded(score, s.bias[row]);
    return score;
}

// Keys of logits that are no numbers: above those of all scores, so that every block hears of them.
constexpr u32 KEY_OF_NAN = 0xFFFFFFFFu, KEY_OF_INFINITY = 0xFFFFFFFEu;

// Writes the scores of this block's rows; returns this thread's best.
__device__ __forceinline__ Candidate adjust_rows(const Consumer& c, const SamplingArguments& s, const float* logits) {
    Candidate best{0, 0xFFFFFu};
    OwnRows rows(c.block);
    for (int row = rows.first + 4 * c.thread; row < rows.end; row += ROWS_AT_ONCE) {
        Quad quad(logits + row);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (row + i >= VOCABULARY_SIZE) continue;
            float raw = quad.value[i];
            quad.value[i] = adjusted(s, raw, row + i);
            u32 key = raw != raw ? KEY_OF_NAN : __float_as_uint(raw) == 0x7F800000u ? KEY_OF_INFINITY : ordered(quad.value[i]);
            best.offer(key, row + i);
        }
        quad.store(s.scores + row);
    }
    return best;
}

// Scores to z = (score - highest) / temperature, which is 0 at most.
__device__ __forceinline__ void temper_rows(const Consumer& c, const SamplingArguments& s, float highest) {
    OwnRows rows(c.block);
    for (int row = rows.first + 4 * c.thread; row < rows.end; row += ROWS_AT_ONCE) {
        Quad quad(s.scores + row);
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.value[i] = divide_rounded(subtract_rounded(quad.value[i], highest), s.temperature);
        quad.store(s.scores + row);
    }
}
