// The weight ring: one warp streams this block's weights through shared memory, the others consume them.
//
// Weights do not depend on activations, so the producer runs ahead of the consumers across every exchange, by up to
// RING_STAGES stages. Stages are filled in the order of the block's tape and released by each consumer warp.
// sm_90 and later: bulk copies that complete on mbarriers. Before: cp.async (sm_80) or plain loads (sm_75) and
// counters in shared memory.
#pragma once

#include "primitive/memory.cuh"
#include "primitive/watchdog.cuh"

constexpr int STAGE_BYTES = CONSUMER_WARPS * TILES_PER_STAGE * 512;

struct Ring {
    u8* slots;  // RING_STAGES x STAGE_BYTES
    u64* full;  // one mbarrier (or counter) a slot
    u64* empty;
};

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void mbarrier_init(u64* b, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u64* b) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(u64* b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(u64* b, u32 parity) {
    u32 done;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
    return done;
}
__device__ __forceinline__ void bulk_copy(void* shared, const u8* global, u32 bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

__device__ __forceinline__ void ring_init(Ring& ring) {
    for (int i = 0; i < RING_STAGES; ++i) {
        mbarrier_init(ring.full + i, 1);
        mbarrier_init(ring.empty + i, CONSUMER_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ bool stage_is_full(Ring& ring, u32 stage) {
    return mbarrier_try_wait(ring.full + stage % RING_STAGES, (stage / RING_STAGES) & 1);
}
__device__ __forceinline__ bool stage_is_empty(Ring& ring, u32 stage) {
    return mbarrier_try_wait(ring.empty + stage % RING_STAGES, ((stage / RING_STAGES) & 1) ^ 1);
}
__device__ __forceinline__ void release_stage(Ring& ring, u32 stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(ring.empty + stage % RING_STAGES);
}
// Called by the whole producer warp.
__device__ __forceinline__ void fill_stage(Ring& ring, u32 stage, const u8* source, u32 bytes) {
    if (threadIdx.x % 32 == 0) {
        u64* full = ring.full + stage % RING_STAGES;
        mbarrier_expect(full, bytes);
        bulk_copy(ring.slots + (stage % RING_STAGES) * STAGE_BYTES, source, bytes, full);
    }
    __syncwarp();
}
__device__ __forceinline__ void finish_filling(Ring&, u32) {}

#else

__device__ __forceinline__ volatile u32* counter(u64* b) { return (volatile u32*)b; }

__device__ __forceinline__ void ring_init(Ring& ring) {
    for (int i = 0; i < RING_STAGES; ++i) *counter(ring.full + i) = 0;
    for (int i = 0; i < RING_STAGES * CONSUMER_WARPS; ++i) counter(ring.empty)[i] = 0;
}
// full[slot] holds the number of the last stage that landed there, plus one; empty[slot][warp] likewise of the last one
// that the warp released.
__device__ __forceinline__ bool stage_is_full(Ring& ring, u32 stage) {
    bool full = *counter(ring.full + stage % RING_STAGES) > stage;
    __threadfence_block();
    return full;
}
__device__ __forceinline__ bool stage_is_empty(Ring& ring, u32 stage) {
    if (stage < RING_STAGES) return true;
    volatile u32* released = counter(ring.empty) + (stage % RING_STAGES) * CONSUMER_WARPS;
    bool empty = true;
    for (int i = 0; i < CONSUMER_WARPS; ++i) empty &= released[i] > stage - RING_STAGES;
    __threadfence_block();
    return empty;
}
__device__ __forceinline__ void release_stage(Ring& ring, u32 stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        __threadfence_block();
        counter(ring.empty)[(stage % RING_STAGES) * CONSUMER_WARPS + threadIdx.x / 32] = stage + 1;
    }
}
__device__ __forceinline__ void mark_full(Ring& ring, u32 stage) {
    __threadfence_block();
    __syncwarp();
    if (threadIdx.x % 32 == 0) *counter(ring.full + stage % RING_STAGES) = stage + 1;
}
#if __CUDA_ARCH__ >= 800
// One stage of cp.async stays in flight behind the one being issued.
__device__ __forceinline__ void fill_stage(Ring& ring, u32 stage, const u8* source, u32 bytes) {
    u8* slot = ring.slots + (stage % RING_STAGES) * STAGE_BYTES;
    for (u32 at = threadIdx.x % 32 * 16; at < bytes; at += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + at)), "l"(source + at) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (stage >= COPIES_IN_FLIGHT) {
        asm volatile("cp.async.wait_group %0;" ::"n"(COPIES_IN_FLIGHT) : "memory");
        mark_full(ring, stage - COPIES_IN_FLIGHT);
    }
}
__device__ __forceinline__ void finish_filling(Ring& ring, u32 stages) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (u32 s = stages > COPIES_IN_FLIGHT ? stages - COPIES_IN_FLIGHT : 0; s < stages; ++s) mark_full(ring, s);
}
#else
__device__ __forceinline__ void fill_stage(Ring& ring, u32 stage, const u8* source, u32 bytes) {
    uint4* slot = (uint4*)(ring.slots + (stage % RING_STAGES) * STAGE_BYTES);
    const uint4* from = (const uint4*)source;
    u32 count = bytes / 16;
    u32 at = threadIdx.x % 32;
    for (; at + 224 < count; at += 256) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __ldg(from + at + 32 * i);
#pragma unroll
        for (int i = 0; i < 8; ++i) slot[at + 32 * i] = v[i];
    }
    for (; at < count; at += 32) slot[at] = __ldg(from + at);
    mark_full(ring, stage);
}
__device__ __forceinline__ void finish_filling(Ring&, u32) {}
#endif
#endif

__device__ __forceinline__ void wait_until_full(Ring& ring, u32 stage, Watchdog& watchdog) {
    while (!stage_is_full(ring, stage)) watchdog.check();
}
