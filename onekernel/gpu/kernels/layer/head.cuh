// Final norm, LM head, and the choice of the next token.
#pragma once

#include "state.cuh"

// A candidate as one 64-bit word that compares as (logit, lowest id first): the logit's bits mapped to an unsigned
// order, the id inverted in 20 bits, and below them flags and the tag.
constexpr u32 STOP_REQUESTED = 1u << 8;

__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

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
    Candidate best;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int row = group * 8 + consumer->thread;
        if (consumer->thread >= groups * 8 || row >= VOCAB) return;
        float logit = sum(consumer->thread) * inverse_rms<HIDDEN>(*consumer);
        if (logits) logits[row] = logit;
        if (row < VOCABULARY_SIZE) best.offer(ordered(logit), row);
    }
};

// Every block leaves its best candidate; one warp of each reads them all, and all come to the same choice.
struct Choice {
    u32 token;
    bool stop;
};
__device__ __forceinline__ Choice choose_token(Consumer& c, Candidate best, Candidate* shared_best, u64* candidates, bool stop_requested, u32 tag) {
    best = warp_best(best);
    if (c.lane == 0) shared_best[c.warp] = best;
    consumer_barrier();
    if (c.warp == 0) {
        best = c.lane < CONSUMER_WARPS ? shared_best[c.lane] : Candidate{0, 0xFFFFFu};
        best = warp_best(best);
        if (c.lane == 0) {
            // What this block wrote for later tokens (KV cache) is ordered before the word.
            fence_gpu();
            store_relaxed64(candidates + c.block, (u64)best.key << 32 | (u64)(0xFFFFFu - best.id) << 12 | (stop_requested ? STOP_REQUESTED : 0) | tag);
        }
    }
    if (c.warp == 0) {
        u64 winner = 0;
        u32 flags = 0;
        for (int block = c.lane; block < BLOCKS; block += 32) {
            u64 word = load_relaxed64(candidates + block);
            while ((word & 0xFFu) != tag) {
                c.watchdog.check();
                word = load_relaxed64(candidates + block);
            }
            flags |= (u32)word;
            word >>= 12;
            if (word > winner) winner = word;
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
            u64 other = __shfl_xor_sync(0xFFFFFFFFu, winner, offset);
            if (other > winner) winner = other;
            flags |= __shfl_xor_sync(0xFFFFFFFFu, flags, offset);
        }
        fence_gpu();  // what the other blocks wrote before their words is there, for the whole block behind the barrier
        if (c.lane == 0) shared_best[CONSUMER_WARPS] = {flags, 0xFFFFFu - (u32)(winner & 0xFFFFFu)};
    }
    consumer_barrier();
    Candidate chosen = shared_best[CONSUMER_WARPS];
    return {chosen.id, (chosen.key & STOP_REQUESTED) != 0};
}
