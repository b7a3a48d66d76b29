// Tagged words: how blocks hand each other vectors without barriers.
//
// An exchanged element is one 32-bit word: a float whose lowest 8 bits are replaced by a tag that says which use of the
// buffer it belongs to. A reader polls just the words it needs until their tags are right. Value and tag arrive in one
// store, so there is no fence, no counter and no second trip through L2.
#pragma once

#include "primitive/memory.cuh"
#include "primitive/watchdog.cuh"

// Tags run from 1 to 255; 0 is what an untouched buffer holds.
__device__ __forceinline__ u32 tag_of(u32 use) { return 1u + use % 255u; }

__device__ __forceinline__ u32 tagged(float value, u32 tag) { return ((__float_as_uint(value) + 0x80u) & ~0xFFu) | tag; }

__device__ __forceinline__ float untagged(u32 word) { return __uint_as_float(word & ~0xFFu); }

__device__ __forceinline__ void publish(u32* slot, float value, u32 tag) { store_relaxed(slot, tagged(value, tag)); }

__device__ __forceinline__ bool has_tag(u32 word, u32 tag) { return ((word ^ tag) & 0xFFu) == 0; }
__device__ __forceinline__ bool have_tag(uint4 w, u32 tag) { return (((w.x ^ tag) | (w.y ^ tag) | (w.z ^ tag) | (w.w ^ tag)) & 0xFFu) == 0; }

// Waits for one word, with one sector of traffic a poll and not a whole slice: hundreds of warps that poll all that they
// are waiting for keep L2 from the weights, and from the very words that they wait for.
__device__ __forceinline__ void await_word(const u32* slot, u32 tag, Watchdog& watchdog) {
    while (!has_tag(load_relaxed(slot), tag)) watchdog.check();
}

// Waits for `COUNT` groups of four words, all loads in flight at once; group i is at slot + i * stride.
template <int COUNT>
__device__ __forceinline__ void receive4_many(float4 (&out)[COUNT], const u32* slot, int stride, int valid, u32 tag,
                                              Watchdog& watchdog) {
    uint4 w[COUNT];
    bool ready;
    do {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < valid) w[i] = load_relaxed4(slot + i * stride);
        ready = true;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < valid)
                ready &= have_tag(w[i], tag);
        if (!ready) watchdog.check();
    } while (!ready);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i < valid) out[i] = make_float4(untagged(w[i].x), untagged(w[i].y), untagged(w[i].z), untagged(w[i].w));
}

// Waits for single words and groups of four from different places, all loads in flight at once: a wait costs one trip
// through L2, not one per place. Bit i of `valid` says whether word i is wanted.
template <int FOURS, int WORDS>
__device__ __forceinline__ void receive_all(float4 (&fours)[FOURS], const u32* const (&four_slots)[FOURS], float (&words)[WORDS],
                                            const u32* const (&word_slots)[WORDS], u32 valid, u32 tag, Watchdog& watchdog) {
    uint4 f[FOURS];
    u32 w[WORDS];
    bool ready;
    do {
#pragma unroll
        for (int i = 0; i < FOURS; ++i) f[i] = load_relaxed4(four_slots[i]);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) w[i] = valid >> i & 1 ? load_relaxed(word_slots[i]) : tag;
        ready = true;
#pragma unroll
        for (int i = 0; i < FOURS; ++i)
            ready &= have_tag(f[i], tag);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) ready &= has_tag(w[i], tag);
        if (!ready) watchdog.check();
    } while (!ready);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) fours[i] = make_float4(untagged(f[i].x), untagged(f[i].y), untagged(f[i].z), untagged(f[i].w));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = untagged(w[i]);
}

// Waits for single words, all loads in flight at once.
template <int WORDS>
__device__ __forceinline__ void receive_words(float (&words)[WORDS], const u32* const (&slots)[WORDS], u32 tag, Watchdog& watchdog) {
    u32 w[WORDS];
    bool ready;
    do {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) w[i] = load_relaxed(slots[i]);
        ready = true;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) ready &= has_tag(w[i], tag);
        if (!ready) watchdog.check();
    } while (!ready);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = untagged(w[i]);
}

// A vector that every block needs is published twice, so that half as many wait for the same lines of L2.
constexpr int COPIES = 2;

template <int WORDS>
__device__ __forceinline__ void publish_to_all(u32* vector, int at, float value, u32 tag) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) publish(vector + i * WORDS + at, value, tag);
}
template <int WORDS>
__device__ __forceinline__ const u32* copy_for(const u32* vector, int block) { return vector + block % COPIES * WORDS; }
