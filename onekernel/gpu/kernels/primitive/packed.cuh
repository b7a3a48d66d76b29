// Packed vectors: two columns in one exchanged word, for the vectors that every block needs whole.
//
// A column is a fp16 number of the value / 64 whose lowest bit says which use of the buffer it belongs to. One bit is
// enough where a writer can be no more than one use ahead of any reader: as long as a word's bits are those of the last
// use, it has not been written. Ten bits of precision are more than the eight of the operand that becomes of the value;
// 65504 * 64 is its largest (beyond, NaN), and a step of the smallest is 8e-6.
#pragma once

#include "primitive/exchange.cuh"
#include "primitive/matrix.cuh"

constexpr float PACKED_SCALE = 64;
constexpr int COPIES = 2;  // of such a vector, so that half as many blocks wait for the same lines of L2

// What the lowest bits are in use `use` of a buffer. An untouched buffer holds zeros.
__device__ __forceinline__ u32 epoch_of(u32 use) { return use & 1 ? 0u : 0x00010001u; }
__device__ __forceinline__ bool has_epoch(u32 word, u32 epoch) { return ((word ^ epoch) & 0x00010001u) == 0; }

// Publishes one column a lane. Called by whole warps; columns of neighbouring lanes are neighbours, even ones in even lanes.
template <int COLUMNS>
__device__ __forceinline__ void publish_packed(u32* vector, int column, float value, bool valid, u32 epoch) {
    float next = __shfl_down_sync(0xFFFFFFFFu, value, 1);
    u32 word = (pack_half2(value * (1 / PACKED_SCALE), next * (1 / PACKED_SCALE)) & ~0x00010001u) | epoch;
    if (valid && column % 2 == 0)
#pragma unroll
        for (int i = 0; i < COPIES; ++i) store_relaxed(vector + (i * COLUMNS + column) / 2, word);
}

// The copy of a packed vector that a block reads.
template <int COLUMNS>
__device__ __forceinline__ const u32* packed_copy(const u32* vector, int block) { return vector + block % COPIES * (COLUMNS / 2); }

// Waits for one word, with one sector of traffic a poll.
__device__ __forceinline__ void await_packed(const u32* slot, u32 epoch, Watchdog& watchdog) {
    while (!has_epoch(load_relaxed(slot), epoch)) watchdog.check();
}

// Waits for COUNT times four columns, all loads in flight at once; group i is at slot + i * stride words.
template <int COUNT>
__device__ __forceinline__ void receive_packed(float4 (&out)[COUNT], const u32* slot, int stride, int valid, u32 epoch, Watchdog& watchdog) {
    u64 w[COUNT];
    bool ready;
    do {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < valid) w[i] = load_relaxed64((const u64*)(slot + i * stride));
        ready = true;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < valid) ready &= has_epoch((u32)w[i], epoch) && has_epoch((u32)(w[i] >> 32), epoch);
        if (!ready) watchdog.check();
    } while (!ready);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i < valid) {
            float2 low = unpack_half2((u32)w[i]), high = unpack_half2((u32)(w[i] >> 32));
            out[i] = make_float4(low.x * PACKED_SCALE, low.y * PACKED_SCALE, high.x * PACKED_SCALE, high.y * PACKED_SCALE);
        }
}
