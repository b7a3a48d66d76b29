// Sums and maxima over the 32 lanes of a warp, the barrier of the consumer warps, and who gets how many registers.
#pragma once

#include "primitive/memory.cuh"

// One warp streams weights, on sm_90 another one watches them land. Where registers can be moved between groups of four
// warps, there are four of them, and the consumers get what the four do not need: 232 in place of 168.
#if __CUDA_ARCH__ >= 900
constexpr int PRODUCER_WARPS = 4;
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
#else
constexpr int PRODUCER_WARPS = 1;
__device__ __forceinline__ void give_registers() {}
__device__ __forceinline__ void take_registers() {}
#endif

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

// Where this thread is. Volatile on purpose: all that is computed from these stays in the phase that asks. Otherwise the
// compiler computes the addresses of every phase once, ahead of all tokens, and keeps them in local memory.
__device__ __forceinline__ int thread_index() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ int block_index() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

// The same number, of which the compiler does not know that: nothing computed from it moves out of the phase either.
__device__ __forceinline__ int hidden(int v) {
    int same;
    asm volatile("mov.u32 %0, %1;" : "=r"(same) : "r"(v));
    return same;
}

// One step of warp_sum_scatter: WIDTH values are left to each lane, lanes OFFSET apart exchange halves.
template <int WIDTH, int OFFSET, int N>
__device__ __forceinline__ void halve(float (&v)[N], int lane) {
    if constexpr (OFFSET > 0) {
        if constexpr (WIDTH > 0) {
            bool upper = lane & OFFSET;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                float send = upper ? v[i] : v[i + WIDTH];
                float keep = upper ? v[i + WIDTH] : v[i];
                v[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, send, OFFSET);
            }
        } else {
            v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], OFFSET);
        }
        halve<WIDTH / 2, OFFSET / 2>(v, lane);
    }
}

// Sums N values over the warp at once (N a power of two up to 32) with N - 1 + log2(32 / N) shuffles in place of 5 N.
// Lane l ends with the sum of value l * N / 32.
template <int N>
__device__ __forceinline__ float warp_sum_scatter(float (&v)[N], int lane) {
    halve<N / 2, 16>(v, lane);
    return v[0];
}

// Barrier of the consumer warps alone: the producer warp never joins.
__device__ __forceinline__ void consumer_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMER_WARPS * 32) : "memory"); }
