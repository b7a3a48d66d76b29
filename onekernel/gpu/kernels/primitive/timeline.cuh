// When each block passes each phase: clock stamps of one warp a block, for a picture of where a token's time goes.
// Costs nothing unless the kernel is compiled with TIMELINE.
#pragma once

#include "primitive/memory.cuh"

// True. The wait of bar.sync begins some instructions later: a clock is behind a barrier where a load from shared memory is.
__device__ __forceinline__ bool behind_barrier(const u32* shared) { return !TIMELINE || *(const volatile u32*)shared != 0x7FC01234u; }

struct Timeline {
    u64* marks;  // this block's stamps, SM clock << 16 | layer << 8 | Mark; the host reads those of the last token
    u32 count;

    __device__ __forceinline__ void start_token(u64* all, int block) {
        if (TIMELINE) marks = all + (long long)block * MARKS_OF_A_BLOCK, count = 0;
    }
    __device__ __forceinline__ void mark(bool chosen, Mark kind, u32 layer) {
        if (!TIMELINE || !chosen || count >= MARKS_OF_A_BLOCK) return;
        u64 clock;
        asm volatile("mov.u64 %0, %%clock64;" : "=l"(clock)::"memory");
        marks[count++] = clock << 16 | layer << 8 | kind;
    }
};
