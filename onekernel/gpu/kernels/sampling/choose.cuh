// The choice of a token by SamplingParams, the same as onekernel/sampling/sampler.py makes of the same logits.
#pragma once

#include "sampling/logprobs.cuh"
#include "sampling/philox.cuh"
#include "sampling/select.cuh"

union SamplingScratch {
    SelectScratch select;
    LogprobScratch logprobs;
};

// The kept token with the largest z + noise, as far as this thread's rows go.
__device__ __forceinline__ Candidate draw(const Consumer& c, const SamplingArguments& s, u64 kept, u64 position) {
    Candidate best{0, 0xFFFFFu};
    OwnRows rows(c.block);
    for (int row = rows.first + 4 * c.thread; row < rows.end; row += ROWS_AT_ONCE) {
        Quad z(s.scores + row);
        u32 keep = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (row + i < VOCABULARY_SIZE && order_key(z.value[i], row + i) >= kept && (s.min_p == 0.0f || elementary_exp(z.value[i]) >= s.min_p))
                keep |= 1u << i;
        if (!keep) continue;
        uint4 random = random_words(row / 4, position, s.seed);
        u32 words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (keep >> i & 1) best.offer(ordered(add_rounded(z.value[i], gumbel(words[i]))), row + i);
    }
    return best;
}

// Called by all consumer warps once the block's logits are written; `made` counts the tokens of this launch before this
// one, which will stand at `position`. Every thread of every block returns the same.
__device__ __forceinline__ Choice sample_token(Consumer& c, const DecodeArguments& a, SamplingScratch& shared, Candidate* shared_best, u32* passes,
                                               int step, int made, int position, u32 flags, u32 tag) {
    const SamplingArguments& s = a.sampling;
    c.enter(PHASE_SAMPLING, LAYERS);
    consumer_barrier();
    u64* lists = s.lists + (step & 1) * BLOCKS * LIST_WORDS;
    if (s.logprobs >= 0) publish_logprobs(c, a.logits, shared.logprobs, s.logprobs, lists + c.block * LIST_WORDS);
    Candidate best = adjust_rows(c, s, a.logits);
    Choice choice = choose_token(c, best, shared_best, a.candidates + (2 + (step & 1)) * BLOCKS, flags, tag);
    if (choice.failure()) return choice;
    if (!s.greedy) {
        flags = choice.flags;
        temper_rows(c, s, from_ordered(choice.key));
        u64 kept = 0;
        if (s.top_k > 0 && s.top_k < VOCABULARY_SIZE) kept = cut(c, s, shared.select, passes, false, s.top_k, kept);
        if (s.top_p < 1.0) kept = cut(c, s, shared.select, passes, true, 0, kept);
        best = draw(c, s, kept, position);
        choice = choose_token(c, best, shared_best, a.candidates + (step & 1) * BLOCKS, flags & STOP_REQUESTED, tag);
    }
    if (s.counts && c.thread == 0 && OwnRows(c.block).own(choice.token)) s.counts[choice.token] = (s.counts[choice.token] + 1) | 1u << 31;
    if (s.logprobs >= 0 && c.block == 0)
        report_logprobs(c, a.logits, shared.logprobs, s.logprobs, lists, choice.token, s.records + made % OUTPUT_RING * RECORD_WORDS);
    return choice;
}
