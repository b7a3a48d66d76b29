// Logits to scores: penalties and bias, as Sampler._adjusted. Done as the LM head makes each logit, in the shadow of the
// weights that are on their way.
#pragma once

#include "sampling/elementary.cuh"

// Floats as unsigned integers that compare alike. Finite ones lie between KEY_OF_MINUS_INFINITY and KEY_OF_INFINITY.
constexpr u32 KEY_OF_MINUS_INFINITY = 0x007FFFFFu, KEY_OF_INFINITY = 0xFF800000u, KEY_OF_NAN = 0xFFFFFFFFu;

__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);  // -0 equals 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

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

// Keeps the score of a row and returns its key. A logit that is no finite number keeps its key whatever the bias, so that
// every block hears of it.
__device__ __forceinline__ u32 score_row(const SamplingArguments& s, float logit, int row) {
    float score = adjusted(s, logit, row);
    s.scores[row] = score;
    return logit != logit ? KEY_OF_NAN : logit == __uint_as_float(0x7F800000u) ? KEY_OF_INFINITY : ordered(score);
}
