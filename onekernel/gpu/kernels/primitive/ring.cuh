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

// Where a warp stands in the ring. `round` counts how often it went around.
struct RingPosition {
    u32 slot, round;

    __device__ __forceinline__ void advance() {
        if (++slot == RING_STAGES) slot = 0, ++round;
    }
    __device__ __forceinline__ u32 stage() const { return round * RING_STAGES + slot; }
};

struct Ring {
    u8* slots;  // RING_STAGES x STAGE_BYTES
    u64* full;  // one mbarrier (or counter) a slot
    u64* empty;
};

#if __CUDA_ARCH__ >= 900

constexpr bool LIMITS_FLIGHT = true;  // the producer limits how many stages are on their way

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
// Weights are read once a token: in L2 they give way to what is read again (states, KV cache, parameters).
__device__ __forceinline__ void bulk_copy(void* shared, const u8* global, u32 bytes, u64* b) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;}" ::"r"(
            shared_address(shared)),
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
__device__ __forceinline__ bool stage_is_full(Ring& ring, RingPosition at) {
    return mbarrier_try_wait(ring.full + at.slot, at.round & 1);
}
__device__ __forceinline__ bool stage_is_empty(Ring& ring, RingPosition at) {
    return mbarrier_try_wait(ring.empty + at.slot, (at.round & 1) ^ 1);
}
__device__ __forceinline__ void release_stage(Ring& ring, RingPosition at, int, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(ring.empty + at.slot);
}
// Called by the whole producer warp.
__device__ __forceinline__ void fill_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_expect(ring.full + at.slot, bytes);
        bulk_copy(ring.slots + at.slot * STAGE_BYTES, source, bytes, ring.full + at.slot);
    }
    __syncwarp();
}
__device__ __forceinline__ void finish_filling(Ring&, RingPosition) {}

#else

constexpr bool LIMITS_FLIGHT = false;  // fill_stage itself waits for earlier copies

__device__ __forceinline__ volatile u32* counter(u64* b) { return (volatile u32*)b; }

__device__ __forceinline__ void ring_init(Ring& ring) {
    for (int i = 0; i < RING_STAGES; ++i) *counter(ring.full + i) = 0;
    for (int i = 0; i < RING_STAGES * CONSUMER_WARPS; ++i) counter(ring.empty)[i] = 0;
}
// full[slot] holds the number of the last stage that landed there, plus one; empty[slot][warp] likewise of the last one
// that the warp released.
__device__ __forceinline__ bool stage_is_full(Ring& ring, RingPosition at) {
    bool full = *counter(ring.full + at.slot) > at.stage();
    __threadfence_block();
    return full;
}
__device__ __forceinline__ bool stage_is_empty(Ring& ring, RingPosition at) {
    if (at.round == 0) return true;
    volatile u32* released = counter(ring.empty) + at.slot * CONSUMER_WARPS;
    bool empty = true;
    for (int i = 0; i < CONSUMER_WARPS; ++i) empty &= released[i] > at.stage() - RING_STAGES;
    __threadfence_block();
    return empty;
}
__device__ __forceinline__ void release_stage(Ring& ring, RingPosition at, int warp, int lane) {
    __syncwarp();
    if (lane == 0) {
        __threadfence_block();
        counter(ring.empty)[at.slot * CONSUMER_WARPS + warp] = at.stage() + 1;
    }
}
__device__ __forceinline__ void mark_full(Ring& ring, u32 stage) {
    __threadfence_block();
    __syncwarp();
    if (threadIdx.x % 32 == 0) *counter(ring.full + stage % RING_STAGES) = stage + 1;
}
#if __CUDA_ARCH__ >= 800
// One stage of cp.async stays in flight behind the one being issued.
__device__ __forceinline__ void fill_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
    u8* slot = ring.slots + at.slot * STAGE_BYTES;
    for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + i)), "l"(source + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    u32 stage = at.stage();
    if (stage >= COPIES_IN_FLIGHT) {
        asm volatile("cp.async.wait_group %0;" ::"n"(COPIES_IN_FLIGHT) : "memory");
        mark_full(ring, stage - COPIES_IN_FLIGHT);
    }
}
__device__ __forceinline__ void finish_filling(Ring& ring, RingPosition end) {
    u32 stages = end.stage();
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (u32 s = stages > COPIES_IN_FLIGHT ? stages - COPIES_IN_FLIGHT : 0; s < stages; ++s) mark_full(ring, s);
}
#else
__device__ __forceinline__ void fill_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
    uint4* slot = (uint4*)(ring.slots + at.slot * STAGE_BYTES);
    const uint4* from = (const uint4*)source;
    u32 count = bytes / 16;
    u32 first = threadIdx.x % 32;
    for (; first + 224 < count; first += 256) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __ldg(from + first + 32 * i);
#pragma unroll
        for (int i = 0; i < 8; ++i) slot[first + 32 * i] = v[i];
    }
    for (; first < count; first += 32) slot[first] = __ldg(from + first);
    mark_full(ring, at.stage());
}
__device__ __forceinline__ void finish_filling(Ring&, RingPosition) {}
#endif
#endif

__device__ __forceinline__ void wait_until_full(Ring& ring, RingPosition at, Watchdog& watchdog) {
    while (!stage_is_full(ring, at)) watchdog.check();
}
