// A barrier over all blocks of a cooperative launch: one counter that only grows.
#pragma once

#include "primitive/memory.cuh"
#include "primitive/watchdog.cuh"

// Counts one more arrival; what this thread wrote before is visible to whom the count is.
__device__ __forceinline__ void arrive_at(u32* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ __forceinline__ u32 load_acquire(const u32* counter) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}

// By one thread of a block, between two barriers of those that the grid barrier is for.
__device__ __forceinline__ void meet_grid(u32* counter, u32 target, Watchdog& watchdog) {
    arrive_at(counter);
    watchdog.spins = 0;
    while (load_acquire(counter) < target) watchdog.check();
}

// `target`: arrivals so far, those of this barrier included. What any thread wrote before is visible to all behind it
// (through plain loads and cp.async, not through ld.global.nc).
__device__ __forceinline__ void grid_barrier(u32* counter, u32 target, Watchdog& watchdog) {
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_gpu();
        meet_grid(counter, target, watchdog);
        fence_gpu();
    }
    __syncthreads();
}
