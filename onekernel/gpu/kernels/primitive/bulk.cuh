// Bulk copies into shared memory and the barriers that count their bytes (sm_90 and up).
#pragma once

#include "primitive/matrix.cuh"
#include "primitive/watchdog.cuh"

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"); }
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and adds `bytes` to what the barrier waits for.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}
__device__ __forceinline__ void bulk_load(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
}
// Between accesses by threads and bulk copies or wgmma of the same memory: of shared memory alone, or of all, which waits
// for what this thread has on its way to the whole GPU.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A test suspends the thread for a while: so many of them are seconds.
constexpr u32 MOST_TESTS = 1 << 22;
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    for (u32 tests = 0; !barrier_test(barrier, parity);)
        if (++tests > MOST_TESTS) fault();
}
// Pairs of blocks (clusters of two): the same place in both blocks' shared memory has the same address in each.
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// By all threads of both blocks.
__device__ __forceinline__ void cluster_barrier() { asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory"); }
// At the barrier of block `rank` of the pair.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(barrier), "r"(rank) : "memory");
}
__device__ __forceinline__ bool barrier_test_cluster(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
    return passed;
}
// Into both blocks, and counted at the barriers of both.
__device__ __forceinline__ void bulk_load_pair(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared), "l"(global), "r"(bytes),
                 "r"(barrier), "h"((u16)3)
                 : "memory");
}

// By a whole warp: what its lanes did before is done.
__device__ __forceinline__ void warp_arrive(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
    for (u32 tests = 0; !barrier_test_cluster(barrier, parity);)
        if (++tests > MOST_TESTS) fault();
}
// A group of four warps takes registers from the others of the block, or leaves them its own: a multiple of 8 a thread.
template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#else

__device__ __forceinline__ u32 cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_barrier() {}
__device__ __forceinline__ void fence_async() {}
__device__ __forceinline__ void fence_async_shared() {}

#endif
