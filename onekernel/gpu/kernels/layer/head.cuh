// Final norm, LM head, and the choice of the next token.
#pragma once

#include "sampling/score.cuh"
#include "state.cuh"

// A candidate as one 64-bit word that compares as (logit, lowest id first): the logit's bits mapped to an unsigned
// order, the id inverted in 20 bits, and below them flags and the tag.
constexpr u32 STOP_REQUESTED = 1u << 8;

struct Candidate {
    u32 key;  // ordered(logit); 0 is below every number
    u32 id;

    __device__ __forceinline__ void offer(u32 other_key, u32 other_id) {
        if (other_key > key || (other_key == key && other_id < id)) key = other_key, id = other_id;
    }
};

__device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        best.offer(__shfl_xor_sync(0xFFFFFFFFu, best.key, offset), __shfl_xor_sync(0xFFFFFFFFu, best.id, offset));
    return best;
}

struct HeadFinish {
    const Consumer* consumer;
    float* logits;  // [VOCAB] or null
    const SamplingArguments* sampling;
    bool sampled;  // or the highest logit is the token
    Candidate best;

    static constexpr bool EXCHANGED = false;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int row = group * 8 + consumer->thread;
        if (consumer->thread >= groups * 8 || row >= VOCAB) return;
        float logit = sum(consumer->thread) * inverse_rms<HIDDEN>(*consumer);
        if (logits) logits[row] = logit;
        if (row < VOCABULARY_SIZE) best.offer(sampled ? score_row(*sampling, logit, row) : ordered(logit), row);
    }
};

// Every block leaves its best candidate; one warp of each reads them all, and all come to the same choice.
struct Choice {
    u32 token;
    u32 key;    // ordered(its logit or score)
    u32 flags;  // of all blocks

    // 0, or what kept every token from being chosen: the highest score is 1 no number, 2 infinite, 3 minus infinity.
    __device__ __forceinline__ u32 failure() const {
        return key > KEY_OF_INFINITY ? 1 : key == KEY_OF_INFINITY ? 2 : key <= KEY_OF_MINUS_INFINITY ? 3 : 0;
    }
};
// `published`: this block wrote something for the others since the LM head began, which must be there before its word.
__device__ __forceinline__ Choice choose_token(Consumer& c, Candidate best, Candidate* shared_best, u64* candidates, u32 block_flags, u32 tag,
                                               bool published) {
    best = warp_best(best);
    if (c.lane == 0) shared_best[c.warp] = best;
    consumer_barrier();
    if (c.warp == 0) {
        best = c.lane < CONSUMER_WARPS ? shared_best[c.lane] : Candidate{0, 0xFFFFFu};
        best = warp_best(best);
        if (c.lane == 0) {
            if (published) fence_gpu();
            store_relaxed64(candidates + c.block, (u64)best.key << 32 | (u64)(0xFFFFFu - best.id) << 12 | block_flags | tag);
        }
    }
    if (c.warp == 0) {
        u64 winner = 0;
        u32 flags = 0;
        constexpr int WORDS = (BLOCKS + 31) / 32;  // of a lane
        u64 words[WORDS];
        bool ready;
        do {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) words[i] = load_relaxed64(candidates + min(c.lane + 32 * i, BLOCKS - 1));
            ready = true;
#pragma unroll
            for (int i = 0; i < WORDS; ++i) ready &= ((u32)words[i] & 0xFFu) == tag;
            if (!ready) c.watchdog.check();
        } while (!ready);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            flags |= (u32)words[i];
            if (words[i] >> 12 > winner) winner = words[i] >> 12;
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
            u64 other = __shfl_xor_sync(0xFFFFFFFFu, winner, offset);
            if (other > winner) winner = other;
            flags |= __shfl_xor_sync(0xFFFFFFFFu, flags, offset);
        }
        fence_gpu();  // what the other blocks wrote before their words is there, for the whole block behind the barrier
        u32 id = 0xFFFFFu - (u32)(winner & 0xFFFFFu);
        if (c.lane == 0) shared_best[CONSUMER_WARPS] = {(u32)(winner >> 20), id << 12 | (flags & STOP_REQUESTED)};
    }
    consumer_barrier();
    Candidate chosen = shared_best[CONSUMER_WARPS];
    return {chosen.id >> 12, chosen.key, chosen.id & STOP_REQUESTED};
}
