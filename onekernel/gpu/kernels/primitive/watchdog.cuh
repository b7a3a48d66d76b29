// Every wait of the kernel is bounded: a Watchdog that has waited too long reports where, and stops the launch.
#pragma once

#include "primitive/memory.cuh"

// Where a thread is; written into the report when a wait runs out. Keep in step with gpu/report.py.
enum Phase : u32 { PHASE_NONE, PHASE_RING_FULL, PHASE_RING_EMPTY, PHASE_INPUT, PHASE_DELTA_RULE, PHASE_ATTENTION, PHASE_MERGE, PHASE_TOKEN };

struct Watchdog {
    u64* report;  // mapped host memory: one word, 0 while all is well
    u64 limit;    // nanoseconds that one wait may last
    u64 since;
    u32 spins;
    u32 phase;
    u32 layer;

    __device__ __forceinline__ void enter(u32 new_phase, u32 new_layer) {
        phase = new_phase;
        layer = new_layer;
        spins = 0;
    }

    // Call once per failed poll.
    __device__ __forceinline__ void check() {
        if ((++spins & 1023u) == 0) check_clock();
    }

    __device__ __noinline__ void check_clock() {
        u64 now = nanoseconds();
        if (spins == 1024u) since = now;
        if (now - since < limit) return;
        store_host64(report, (1ull << 63) | ((u64)phase << 48) | ((u64)layer << 32) | blockIdx.x);
        fence_system();
        __trap();
    }
};
