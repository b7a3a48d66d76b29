// wgmma: products of four warps together (sm_90a). The instructions themselves are generated (gpu/prefill_layout.py).
#pragma once

#include "primitive/number.cuh"

// Keeps the compiler from moving uses of accumulators across a wait.
__device__ __forceinline__ void hold4(float (&v)[4]) { asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])::"memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// K-major operand with the 128-byte swizzle: 8 rows are 1,024 bytes. 16 columns further: + 2.
__device__ __forceinline__ u64 wgmma_operand(u32 shared) { return (u64)(shared >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
// Operand whose 16 rows of the product's depth are the rows in memory, in blocks of 64 columns `block_bytes` apart.
__device__ __forceinline__ u64 wgmma_transposed(u32 shared, u32 block_bytes) {
    return (u64)(shared >> 4 & 0x3FFF) | (u64)(block_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#endif
