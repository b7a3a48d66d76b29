// Every wait of the kernel is bounded: a Watchdog that has waited too long reports where, and stops the launch.
#pragma once

#include "primitive/memory.cuh"

// Ends the launch with an error. A write to address 0 and not `trap`: where a kernel contains one, the compiler does not
// let the consumer warps have more registers than they start with.
__device__ __forceinline__ void fault() { asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

struct Watchdog {
    u64* report;  // mapped host memory: one word, 0 while all is well
    u64 limit;    // nanoseconds that one wait may last
    u64 since;
    u32 spins;
    u32 phase;    // where the thread is: a Phase, and the layer; written into the report when a wait runs out
    u32 layer;

    __device__ __forceinline__ void enter(u32 new_phase, u32 new_layer) {
        phase = new_phase;
        layer = new_layer;
        spins = 0;
    }

    // Call once per failed poll. Inlined like everything else: a call would force the thread's whole state into memory.
    __device__ __forceinline__ void check() {
        if (++spins & 1023u) return;
        u64 now = nanoseconds();
        if (spins == 1024u) since = now;
        if (now - since < limit) return;
        store_host64(report, (1ull << 63) | ((u64)phase << 48) | ((u64)layer << 32) | blockIdx.x);
        if (now - since > limit + 1000000) fault();  // the report has had a millisecond to arrive
    }
};
