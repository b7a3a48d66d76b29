// Random numbers as a pure function of seed, position and token: onekernel/sampling/philox.py and sampler.gumbel.
#pragma once

#include "sampling/elementary.cuh"

// The four random words of tokens 4 * quad to 4 * quad + 3 at a position: Philox4x32-10.
__device__ __forceinline__ uint4 random_words(u32 quad, u64 position, u64 seed) {
    uint4 x = make_uint4(quad, (u32)position, (u32)(position >> 32), 0);
    u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
#pragma unroll 1
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        u32 low0 = x.x * PHILOX_MULTIPLIER_0, high0 = __umulhi(x.x, PHILOX_MULTIPLIER_0);
        u32 low1 = x.z * PHILOX_MULTIPLIER_1, high1 = __umulhi(x.z, PHILOX_MULTIPLIER_1);
        x = make_uint4(high1 ^ x.y ^ key0, low1, high0 ^ x.w ^ key1, low0);
        key0 += PHILOX_KEY_INCREMENT_0;
        key1 += PHILOX_KEY_INCREMENT_1;
    }
    return x;
}

// Standard Gumbel noise of a token: -log(-log(u)), u = odd / 2^24.
__device__ __forceinline__ float gumbel(u32 token, u64 position, u64 seed) {
    uint4 words = random_words(token / 4, position, seed);
    u32 word = token & 2 ? (token & 1 ? words.w : words.z) : (token & 1 ? words.y : words.x);
    float x = multiply_rounded((float)((word >> 8) | 1u), 1.0f / 16777216.0f);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) x = -elementary_log(x);
    return x;
}
