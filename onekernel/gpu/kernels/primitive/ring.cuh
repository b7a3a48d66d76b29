// The weight ring: one warp streams this block's weights through shared memory, the consumer warps take them from there.
//
// Weights do not depend on activations, so the producer runs ahead of the consumers across every exchange, by up to
// RING_STAGES stages. Stages are numbered in the order of the block's tape. Two kinds of counters say how far it all is:
// `landed` stages are in shared memory, and each consumer warp has `released` those that it no longer needs. Plain words
// and no mbarrier between producer and consumers: sixteen waits and arrivals a stage took longer than the stage itself.
// sm_90 and later: bulk copies, whose mbarriers a warp of its own watches. Before: cp.async (sm_80) or plain loads (sm_75).
#pragma once

#include "primitive/memory.cuh"
#include "primitive/watchdog.cuh"

constexpr int STAGE_BYTES = CONSUMER_WARPS * TILES_PER_STAGE * 512;

struct Ring {
    u8* slots;               // RING_STAGES x STAGE_BYTES
    u64* arrivals;           // one mbarrier a slot, where copies complete on mbarriers
    volatile u32* landed;    // stages
    volatile u32* released;  // [CONSUMER_WARPS] stages
    volatile u32* total;     // stages that were filled in all, once the producer has ended; 0 before
};

// Where a warp stands in the ring.
struct RingPosition {
    u32 stage, slot;
    u32 round;  // how often it went around

    __device__ __forceinline__ void advance() {
        ++stage;
        if (++slot == RING_STAGES) slot = 0, ++round;
    }
};

// ---- consumers ----

// The number of stages that have landed, once there are more than `stage`.
__device__ __forceinline__ u32 await_landed(const Ring& ring, u32 stage, Watchdog& watchdog) {
    u32 landed = *ring.landed;
    while (landed == stage) {
        watchdog.check();
        landed = *ring.landed;
    }
    asm volatile("" ::: "memory");
    return landed;
}

// Called when the stage's weights are in registers, and have been used: only then are they surely out of shared memory.
__device__ __forceinline__ void release_stage(const Ring& ring, u32 stage, int warp, int lane) {
    __syncwarp();
    if (lane == 0) ring.released[warp] = stage + 1;
}

// ---- producer ----

__device__ __forceinline__ bool slot_is_free(const Ring& ring, RingPosition at) {
    u32 lane = threadIdx.x % 32;
    u32 released = lane < CONSUMER_WARPS ? ring.released[lane] : at.stage;
    return __all_sync(0xFFFFFFFFu, released + RING_STAGES > at.stage);
}

#if __CUDA_ARCH__ >= 900

constexpr bool LIMITS_FLIGHT = true;  // the producer limits how many stages are on their way

__device__ __forceinline__ void mbarrier_init(u64* b, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
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
    for (int i = 0; i < RING_STAGES; ++i) mbarrier_init(ring.arrivals + i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Called by the whole producer warp, like all that follows.
__device__ __forceinline__ void fill_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
    if (threadIdx.x % 32 == 0) {
        mbarrier_expect(ring.arrivals + at.slot, bytes);
        bulk_copy(ring.slots + at.slot * STAGE_BYTES, source, bytes, ring.arrivals + at.slot);
    }
    __syncwarp();
}
__device__ __forceinline__ void finish_filling(Ring&, RingPosition) {}

// Another warp: counts the stages as they land, until the last of them. The block's shared memory must not go before.
__device__ __forceinline__ void watch_landings(Ring& ring, Watchdog watchdog) {
    RingPosition at{0, 0, 0};
    while (true) {
        if (mbarrier_try_wait(ring.arrivals + at.slot, at.round & 1)) {
            at.advance();
            if (threadIdx.x % 32 == 0) *ring.landed = at.stage;
            watchdog.spins = 0;
        } else if (at.stage + 1 == *ring.total) {  // `total` is one more than the stages: 0 says that it is not known
            return;
        } else {
            watchdog.check();
        }
    }
}

#else

constexpr bool LIMITS_FLIGHT = false;  // fill_stage itself waits for earlier copies

__device__ __forceinline__ void ring_init(Ring&) {}
__device__ __forceinline__ void watch_landings(Ring&, Watchdog) {}
__device__ __forceinline__ void mark_landed(Ring& ring, u32 stages) {
    __threadfence_block();
    __syncwarp();
    if (threadIdx.x % 32 == 0) *ring.landed = stages;
}
#if __CUDA_ARCH__ >= 800
// COPIES_IN_FLIGHT stages of cp.async stay in flight behind the one being issued. A consumer releases a stage only when it
// has fetched the next one: that one must count as landed without the slot of the stage that is still held.
static_assert(COPIES_IN_FLIGHT + 2 <= RING_STAGES, "producer and consumers would wait for each other");
__device__ __forceinline__ void fill_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
    u8* slot = ring.slots + at.slot * STAGE_BYTES;
    for (u32 i = threadIdx.x % 32 * 16; i < bytes; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot + i)), "l"(source + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (at.stage >= COPIES_IN_FLIGHT) {
        asm volatile("cp.async.wait_group %0;" ::"n"(COPIES_IN_FLIGHT) : "memory");
        mark_landed(ring, at.stage - COPIES_IN_FLIGHT + 1);
    }
}
__device__ __forceinline__ void finish_filling(Ring& ring, RingPosition end) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    mark_landed(ring, end.stage);
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
    mark_landed(ring, at.stage + 1);
}
__device__ __forceinline__ void finish_filling(Ring&, RingPosition) {}
#endif
#endif
