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
#pragma unroll 1
    for (int row = rows.first + c.thread; row < rows.end; row += CONSUMERS) {
        float z = s.scores[row];
        if (order_key(z, row) < kept || (s.min_p > 0.0f && elementary_exp(z) < s.min_p)) continue;
        best.offer(ordered(add_rounded(z, gumbel(row, position, s.seed))), row);
    }
    return best;
}

// This thread's candidate, now that the highest score is known.
__device__ __forceinline__ Candidate sample_rows(Consumer& c, const SamplingArguments& s, SelectScratch& shared, u32* passes,
                                                 float highest, u64 position) {
    c.enter(PHASE_SAMPLING, LAYERS);
    temper_rows(c, s, highest);
    u64 kept = 0;
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; ++by_mass) {
        bool wanted = by_mass ? s.top_p < 1.0 : s.top_k > 0 && s.top_k < VOCABULARY_SIZE;
        if (wanted) kept = cut(c, s, shared, passes, by_mass, s.top_k, kept);
    }
    return draw(c, s, kept, position);
}

// The token of this step. Called by all consumer warps; every thread of every block returns the same.
// `sampled`: or the highest logit is taken. `best`: this thread's candidate from the LM head.
__device__ __forceinline__ Choice choose(Consumer& c, const DecodeArguments& a, bool sampled, Candidate best, SamplingScratch& shared,
                                         Candidate* shared_best, u32* passes, int step, u32 flags, u32 tag) {
    const SamplingArguments& s = a.sampling;
    u64* lists = s.lists + (step & 1) * BLOCKS * LIST_WORDS;
    if (sampled) consumer_barrier();  // the block's scores and logits are written
    if (sampled && s.logprobs >= 0) publish_logprobs(c, a.logits, shared.logprobs, s.logprobs, lists + c.block * LIST_WORDS);
    u64* candidates = a.candidates + (step & 1) * BLOCKS;
    Choice choice;
#pragma unroll 1
    for (bool again = sampled && !s.greedy;; again = false) {
        choice = choose_token(c, best, shared_best, candidates, flags, tag, sampled);
        if (!again || choice.failure()) break;
        best = sample_rows(c, s, shared.select, passes, from_ordered(choice.key), a.position + step + 1);
        candidates += 2 * BLOCKS;
        flags = choice.flags;
    }
    if (!sampled || choice.failure()) return choice;
    if (s.counts && c.thread == 0 && OwnRows(c.block).own(choice.token))
        s.counts[choice.token] = (s.counts[choice.token] + 1) | 1u << 31;
    u64* record = s.records + (step - (a.given - 1)) % OUTPUT_RING * RECORD_WORDS;
    if (s.logprobs >= 0 && c.block == 0) {
        report_logprobs(c, a.logits, shared.logprobs, s.logprobs, lists, choice.token, record);
        consumer_barrier();  // the scratch's place is needed for activations
    }
    return choice;
}
