// The next token of every row: the arithmetic of kernels/sampling, all rows at once, a warp a row. Only integers are
// added, so the cut of top_k and top_p is that of sampling/select.cuh whatever the order.
#pragma once

#include "batch/finish.cuh"
#include "sampling/logprobs.cuh"
#include "sampling/philox.cuh"
#include "sampling/select.cuh"

// Where a row stands in its cuts: first that of top_k, then that of top_p.
struct Cut {
    u64 kept, prefix, target;
    int shift;
    int stage;  // 0: top_k, 1: top_p, 2: done
};

struct WarpHistogram {
    u32 count[BINS], low[BINS], high[BINS];
};

struct BatchSampling {
    WarpHistogram histograms[CONSUMER_WARPS];
};

__device__ __forceinline__ bool wants_cut(const SamplingArguments& s, int stage) {
    return stage ? s.top_p < 1.0 : s.top_k > 0 && s.top_k < VOCABULARY_SIZE;
}
__device__ __forceinline__ void next_stage(const SamplingArguments& s, Cut& cut, int stage) {
    while (stage < 2 && !wants_cut(s, stage)) ++stage;
    cut.stage = stage;
    cut.shift = KEY_BITS - 8;
    cut.prefix = 0;
    cut.target = s.top_k;
}

// Calls work(token, score) for this block's tokens: four at a time and AT_ONCE fours of each lane, so that loads go ahead
// of what is done with them. `store`: what work leaves in score is kept.
template <bool STORE, class Work>
__device__ __forceinline__ void each_score(const Consumer& c, const SamplingArguments& s, int first, int end, Work work) {
    constexpr int AT_ONCE = 4;
#pragma unroll 1
    for (int at = first + 4 * c.lane; at < end; at += 128 * AT_ONCE) {
        float4 scores[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) scores[i] = *(const float4*)(s.scores + min(at + 128 * i, VOCAB - 4));
#pragma unroll 1
        for (int i = 0; i < AT_ONCE; ++i) {
            float4 four = scores[0];
#pragma unroll
            for (int j = 1; j < AT_ONCE; ++j) scores[j - 1] = scores[j];  // no array with a variable index
            float one[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (at + 128 * i + j < end) work(at + 128 * i + j, one[j]);
            if (STORE && at + 128 * i < end) *(float4*)(s.scores + at + 128 * i) = make_float4(one[0], one[1], one[2], one[3]);
        }
    }
}
static_assert(VOCAB % 4 == 0, "scores are read in fours");

// z = (score - highest) / temperature of this block's tokens.
__device__ __forceinline__ void temper_row(const Consumer& c, const SamplingArguments& s, float highest) {
    OwnRows own(c.block);
    float temperature = s.temperature;
    each_score<true>(c, s, own.first, own.end, [&](int, float& score) { score = divide_rounded(subtract_rounded(score, highest), temperature); });
}

// Makes scores of a row's logits, of this block's tokens; the best of them takes the place of the best logits.
__device__ __forceinline__ void score_logits(const Consumer& c, const BatchArguments& a, int n) {
    const SamplingArguments& s = a.row_table[n].sampling;
    Candidate best{0, 0xFFFFFu};
    OwnRows own(c.block);
#pragma unroll 1
    for (int row = own.first + c.lane; row < own.end; row += 32) best.offer(score_row(s, s.scores[row], row), row);
    best = warp_best(best);
    u64* candidates = a.candidates + n * NormedPlace::CANDIDATES * BLOCKS + c.block;
    if (c.lane < NormedPlace::CANDIDATES) store_relaxed64(candidates + c.lane * BLOCKS, c.lane ? 0 : (u64)best.key << 32 | (0xFFFFFFFFu - best.id));
}

// This block's part of a pass of one row.
__device__ __forceinline__ void count_row(const Consumer& c, const SamplingArguments& s, WarpHistogram& shared, Histogram* histogram, const Cut& cut) {
    constexpr int CHUNK = 4064;  // see CHUNK_ROWS
    OwnRows own(c.block);
    bool by_mass = cut.stage == 1;
#pragma unroll 1
    for (int start = own.first; start < own.end; start += CHUNK) {
#pragma unroll 1
        for (int i = c.lane; i < BINS; i += 32) shared.count[i] = shared.low[i] = shared.high[i] = 0;
        __syncwarp();
        int end = min(own.end, start + CHUNK);
        each_score<false>(c, s, start, end, [&](int row, float z) {
            u64 key = order_key(z, row);
            if (key < cut.kept || key >> cut.shift >> 8 != cut.prefix) return;
            u32 digit = (u32)(key >> cut.shift) & (BINS - 1);
            atomicAdd(shared.count + digit, 1u);
            if (by_mass) {
                u64 mass = mass_of(z);
                atomicAdd(shared.low + digit, (u32)mass & ((1u << MASS_LOW_BITS) - 1));
                atomicAdd(shared.high + digit, (u32)(mass >> MASS_LOW_BITS));
            }
        });
        __syncwarp();
#pragma unroll 1
        for (int i = c.lane; i < BINS; i += 32) {
            u32 count = shared.count[i];
            if (!count) continue;
            u64 mass = ((u64)shared.high[i] << MASS_LOW_BITS) + shared.low[i];
            atomicAdd(histogram->count + i, count);
            if (mass) atomicAdd(histogram->mass + i, mass);
        }
        __syncwarp();
    }
}

// The bin in which the summed weights, from the highest bin down, reach the target; lane l has 8 bins from 255 - 8 l down.
__device__ __forceinline__ void settle_digit(const Consumer& c, const SamplingArguments& s, const Histogram* histogram, Cut& cut) {
    bool by_mass = cut.stage == 1;
    u64 weights[8], own = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int digit = BINS - 1 - 8 * c.lane - i;
        weights[i] = by_mass ? load_relaxed64(histogram->mass + digit) : load_relaxed(histogram->count + digit);
        own += weights[i];
    }
    u64 reached = warp_inclusive_sum(own, c.lane), total = __shfl_sync(0xFFFFFFFFu, reached, 31);
    u64 target = cut.target;
    if (by_mass && cut.shift == KEY_BITS - 8) target = __double2ull_rz(ceil(__dmul_rn(s.top_p, __ull2double_rn(total))));
    if (target > total) target = total;
    u64 before = reached - own;
    bool here = before < target && target <= reached;
    u32 digit = 0;
    u64 left = 0;
    if (here) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (before < target && target <= before + weights[i]) digit = BINS - 1 - 8 * c.lane - i, left = target - before;
            before += weights[i];
        }
    }
    u32 found = __ballot_sync(0xFFFFFFFFu, here);
    int lane = found ? __ffs(found) - 1 : 31;  // a target that no bin reaches: the last
    digit = __shfl_sync(0xFFFFFFFFu, digit, lane);
    left = __shfl_sync(0xFFFFFFFFu, left, lane);
    u32 count = load_relaxed(histogram->count + digit);
    cut.prefix = cut.prefix << 8 | digit;
    cut.target = left;
    if (cut.shift == 0 || count == 1 || (!by_mass && count == left)) {
        u64 least = cut.prefix << cut.shift;
        if (least > cut.kept) cut.kept = least;
        next_stage(s, cut, cut.stage + 1);
    } else {
        cut.shift -= 8;
    }
}

// The kept token with the largest z + noise, of this block's tokens; every lane gets it.
__device__ __forceinline__ Candidate draw_row(const Consumer& c, const SamplingArguments& s, u64 kept, u64 position) {
    Candidate best{0, 0xFFFFFu};
    OwnRows own(c.block);
    float least = s.min_p;
    u64 seed = s.seed;
    each_score<false>(c, s, own.first, own.end, [&](int row, float z) {
        if (order_key(z, row) < kept || (least > 0.0f && elementary_exp(z) < least)) return;
        best.offer(ordered(add_rounded(z, gumbel(row, position, seed))), row);
    });
    return warp_best(best);
}

// The best of `count` candidates for a row.
__device__ __forceinline__ Candidate best_candidate(const Consumer& c, const u64* candidates, int count) {
    u64 winner = 0;
#pragma unroll 4
    for (int i = c.lane; i < count; i += 32) {
        u64 word = load_relaxed64(candidates + i);
        if (word > winner) winner = word;
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        u64 other = __shfl_xor_sync(0xFFFFFFFFu, winner, offset);
        if (other > winner) winner = other;
    }
    return {(u32)(winner >> 32), 0xFFFFFFFFu - (u32)winner};
}
