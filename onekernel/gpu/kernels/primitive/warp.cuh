// Sums and maxima over the 32 lanes of a warp, and the barrier of the consumer warps.
#pragma once

#include "primitive/memory.cuh"

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, offset));
    return v;
}

// Sums N values over the warp at once (N a power of two up to 32) with N - 1 + log2(32 / N) shuffles in place of 5 N.
// Lane l ends with the sum of value l * N / 32.
template <int N>
__device__ __forceinline__ float warp_sum_scatter(float (&v)[N]) {
    int lane = threadIdx.x % 32;
    int offset = 16;
#pragma unroll
    for (int width = N / 2; width; width /= 2) {
        bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            float send = upper ? v[i] : v[i + width];
            float keep = upper ? v[i + width] : v[i];
            v[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, send, offset);
        }
        offset /= 2;
    }
    for (; offset; offset /= 2) v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], offset);
    return v[0];
}

// Barrier of the consumer warps alone: the producer warp never joins.
__device__ __forceinline__ void consumer_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMER_WARPS * 32) : "memory"); }
