// Log-probabilities: what the host needs of the raw logits to report them. The highest logit, the sum of exp(logit -
// highest) in an order that never changes, the chosen token's logit, and the most probable tokens.
#pragma once

#include "sampling/rows.cuh"

constexpr int LIST_WORDS = 1 + MOST_LOGPROBS;  // of a block: highest logit and sum as two floats, then keys

struct LogprobScratch {
    u64 lists[CONSUMER_WARPS][MOST_LOGPROBS];
    float highest[CONSUMER_WARPS], sums[CONSUMER_WARPS];
};

// Orders tokens by (logit descending, id ascending); none is 0.
__device__ __forceinline__ u64 logit_key(float logit, int id) { return (u64)ordered(logit) << 32 | (0xFFFFFFFFu - id); }

__device__ __forceinline__ u64 pack_floats(float high, float low) { return (u64)__float_as_uint(high) << 32 | __float_as_uint(low); }

// The `count` largest keys that the lanes of a warp have, largest first. next(limit) is a lane's largest below `limit`.
template <class Next>
__device__ __forceinline__ void warp_largest(int lane, int count, u64* out, Next next) {
    u64 own = ~0ull, best = ~0ull;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        if (own == best) own = next(best);
        best = own;
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
            u64 other = __shfl_xor_sync(0xFFFFFFFFu, best, offset);
            if (other > best) best = other;
        }
        if (lane == 0) out[i] = best;
    }
}

// Merges lists of `count` keys, largest first, one of each lane (null for none).
__device__ __forceinline__ void merge_lists(int lane, int count, const u64* list, u64* out) {
    int at = 0;
    warp_largest(lane, count, out, [&](u64) { return list && at < count ? list[at++] : 0ull; });
}

// Leaves this block's share for block 0, which may read it once the token is chosen.
__device__ __forceinline__ void publish_logprobs(const Consumer& c, const float* logits, LogprobScratch& shared, int count,
                                                 u64* list) {
    OwnRows rows(c.block);
    float highest = __uint_as_float(0xFF800000u), sum = 0;
#pragma unroll 4
    for (int row = rows.first + c.thread; row < rows.end; row += CONSUMERS) highest = fmaxf(highest, logits[row]);
    highest = warp_max(highest);
    if (c.lane == 0) shared.highest[c.warp] = highest;
    consumer_barrier();
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) highest = fmaxf(highest, shared.highest[w]);
#pragma unroll 1
    for (int row = rows.first + c.thread; row < rows.end; row += CONSUMERS)
        if (logits[row] > __uint_as_float(0xFF800000u)) sum += elementary_exp(logits[row] - highest);
    sum = warp_sum(sum);
    if (c.lane == 0) shared.sums[c.warp] = sum;
    warp_largest(c.lane, count, shared.lists[c.warp], [&](u64 limit) {
        u64 best = 0;
#pragma unroll 4
        for (int row = rows.first + c.thread; row < rows.end; row += CONSUMERS) {
            u64 key = logit_key(logits[row], row);
            if (key < limit && key > best) best = key;
        }
        return best;
    });
    consumer_barrier();
    if (c.warp != 0) return;
    merge_lists(c.lane, count, c.lane < CONSUMER_WARPS ? shared.lists[c.lane] : nullptr, list + 1);
    if (c.lane != 0) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) sum += shared.sums[w];
    list[0] = pack_floats(highest, sum);
}

// Block 0, behind the choice of the token: the record for the host, [highest and sum, the token's logit, keys].
__device__ __forceinline__ void report_logprobs(const Consumer& c, const float* logits, LogprobScratch& shared, int count,
                                                const u64* lists, u32 token, u64* record) {
    static_assert(BLOCKS <= CONSUMERS, "one list a thread");
    const u64* own = c.thread < BLOCKS ? lists + c.thread * LIST_WORDS + 1 : nullptr;
    int at = 0;
    auto next = [&](u64) { return own && at < count ? load_relaxed64(own + at++) : 0ull; };
    warp_largest(c.lane, count, shared.lists[c.warp], next);
    consumer_barrier();
    if (c.warp != 0) return;
    merge_lists(c.lane, count, c.lane < CONSUMER_WARPS ? shared.lists[c.lane] : nullptr, record + 2);
    float highest = __uint_as_float(0xFF800000u);
    for (int block = c.lane; block < BLOCKS; block += 32)
        highest = fmaxf(highest, __uint_as_float((u32)(load_relaxed64(lists + block * LIST_WORDS) >> 32)));
    highest = warp_max(highest);
    float sum = 0;
#pragma unroll 1
    for (int block = c.lane; block < BLOCKS; block += 32) {
        u64 word = load_relaxed64(lists + block * LIST_WORDS);
        sum += __uint_as_float((u32)word) * elementary_exp(__uint_as_float((u32)(word >> 32)) - highest);
    }
    sum = warp_sum(sum);
    if (c.lane != 0) return;
    record[0] = pack_floats(highest, sum);
    record[1] = load_relaxed((const u32*)logits + token);
    fence_system();  // the record before the token
}
