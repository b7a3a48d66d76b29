// top_k and top_p: where to cut the list of tokens in the order (z descending, id ascending), without sorting it.
//
// Radix select over all blocks. Every token has a key of its own that orders it; 8 bits of the keys are settled a pass,
// from the top. A pass counts the tokens whose upper bits are settled by their next 8 bits, over all blocks, and finds
// the bin in which the list is cut. Only integers are added, so no order of additions can change the result.
#pragma once

#include "sampling/rows.cuh"

constexpr int BINS = 256;
constexpr int KEY_BITS = 56;
// Rows counted at a time: 32-bit sums in shared memory hold so many halves of probabilities of up to 2^40.
constexpr int CHUNK_ROWS = 4095 / CONSUMERS * CONSUMERS;
constexpr int MASS_LOW_BITS = MASS_BITS / 2;

// 31 bits of z (0 at most), 20 of the id, inverted, and 5 zeros. The first 8 bits are the exponent of z.
__device__ __forceinline__ u64 order_key(float z, int id) {
    u32 order = ~(__float_as_uint(z) | 0x80000000u);
    return (u64)order << 25 | (u64)(0xFFFFFu - id) << 5;
}

// Probability relative to that of the most probable token, in units of 2^-MASS_BITS.
__device__ __forceinline__ u64 mass_of(float z) {
    return __float2ull_rz(multiply_rounded(elementary_exp(z), (float)(1ull << MASS_BITS)));
}

// Over all blocks, in global memory; zeroed by the host before the launch. Three take turns: while one is filled and
// read, nobody uses the one before it any more, which the pass after next will fill.
struct Histogram {
    u64 mass[BINS];
    u32 count[BINS];
};
struct Histograms {
    Histogram turns[3];
    u32 arrived;  // at the barriers of all passes so far
    u32 unused;
};
static_assert(sizeof(Histograms) == HISTOGRAM_BYTES, "the host clears them");

struct Bin {
    u64 target;  // weight that is still wanted from this bin
    u32 digit, count;
};
struct SelectScratch {
    u32 count[BINS], low[BINS], high[BINS];  // this block's histogram: tokens, halves of their masses
    u64 totals[CONSUMER_WARPS];
    Bin bin;
};

// Waits until all blocks are here; what they wrote before is visible behind it.
__device__ __forceinline__ void meet(Consumer& c, u32* arrived, u32 target) {
    consumer_barrier();
    if (c.thread == 0) {
        fence_gpu();
        asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        while ((int)(load_relaxed(arrived) - target) < 0) c.watchdog.check();
        fence_gpu();
    }
    consumer_barrier();
}

// This block's part of a pass.
__device__ __forceinline__ void count_rows(const Consumer& c, const SamplingArguments& s, SelectScratch& shared, Histogram* histogram,
                                           bool by_mass, u64 kept, u64 prefix, int shift) {
    OwnRows rows(c.block);
#pragma unroll 1
    for (int start = rows.first; start < rows.end; start += CHUNK_ROWS) {
        shared.count[c.thread] = shared.low[c.thread] = shared.high[c.thread] = 0;
        consumer_barrier();
        int end = min(rows.end, start + CHUNK_ROWS);
#pragma unroll 1
        for (int row = start + c.thread; row < end; row += CONSUMERS) {
            float z = s.scores[row];
            u64 key = order_key(z, row);
            if (key < kept || key >> shift >> 8 != prefix) continue;
            u32 digit = (u32)(key >> shift) & (BINS - 1);
            atomicAdd(shared.count + digit, 1u);
            if (by_mass) {
                u64 mass = mass_of(z);
                atomicAdd(shared.low + digit, (u32)mass & ((1u << MASS_LOW_BITS) - 1));
                atomicAdd(shared.high + digit, (u32)(mass >> MASS_LOW_BITS));
            }
        }
        consumer_barrier();
        if (u32 count = shared.count[c.thread]) {
            u64 mass = ((u64)shared.high[c.thread] << MASS_LOW_BITS) + shared.low[c.thread];
            atomicAdd(histogram->count + c.thread, count);
            if (mass) atomicAdd(histogram->mass + c.thread, mass);
        }
    }
}

__device__ __forceinline__ u64 warp_inclusive_sum(u64 v, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        u64 other = __shfl_up_sync(0xFFFFFFFFu, v, offset);
        if (lane >= offset) v += other;
    }
    return v;
}

// The bin in which the summed weights, from the highest bin down, reach the target. On the first pass of top_p the target
// is the share `top_p` of them all.
__device__ __forceinline__ Bin find_bin(const Consumer& c, SelectScratch& shared, const Histogram* histogram, bool by_mass,
                                        u64 target, bool first_pass, double top_p) {
    u32 digit = BINS - 1 - c.thread;
    u32 count = load_relaxed(histogram->count + digit);
    u64 weight = by_mass ? load_relaxed64(histogram->mass + digit) : count;
    u64 reached = warp_inclusive_sum(weight, c.lane);
    if (c.lane == 31) shared.totals[c.warp] = reached;
    consumer_barrier();
    u64 total = 0;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) {
        if (w < c.warp) reached += shared.totals[w];
        total += shared.totals[w];
    }
    if (by_mass && first_pass) target = __double2ull_rz(ceil(__dmul_rn(top_p, __ull2double_rn(total))));
    if (target > total) target = total;
    u64 before = reached - weight;
    bool last = c.thread == BINS - 1;  // takes a target that no bin reaches: without it a bug here could part the blocks
    if ((before < target && target <= reached) || (last && total == 0)) shared.bin = {target - before, digit, count};
    consumer_barrier();
    return shared.bin;
}

// The least key that remains when, of the tokens with keys from `kept` on, the first in the order are taken: `target` of
// them (by_mass: as many as have the share `top_p` of their total probability). `passes`, shared by the block's threads,
// counts those of the launch.
__device__ __forceinline__ u64 cut(Consumer& c, const SamplingArguments& s, SelectScratch& shared, u32* passes, bool by_mass,
                                   u64 target, u64 kept) {
    Histograms* histograms = (Histograms*)s.histograms;
    u64 prefix = 0;
    u32 pass = *passes;
    int shift = KEY_BITS;
#pragma unroll 1
    while (true) {
        shift -= 8;
        Histogram* histogram = histograms->turns + pass % 3;
        count_rows(c, s, shared, histogram, by_mass, kept, prefix, shift);
        if (c.thread % BLOCKS == c.block) {
            Histogram* later = histograms->turns + (pass + 1) % 3;
            store_relaxed(later->count + c.thread, 0);
            store_relaxed64(later->mass + c.thread, 0);
        }
        ++pass;
        meet(c, &histograms->arrived, pass * BLOCKS);
        Bin bin = find_bin(c, shared, histogram, by_mass, target, shift == KEY_BITS - 8, s.top_p);
        prefix = prefix << 8 | bin.digit;
        target = bin.target;
        // One token, or all that are left: the bits below need not be settled.
        if (shift == 0 || bin.count == 1 || (!by_mass && bin.count == target)) break;
    }
    if (c.thread == 0) *passes = pass;
    consumer_barrier();
    u64 least = prefix << shift;
    return least > kept ? least : kept;
}
