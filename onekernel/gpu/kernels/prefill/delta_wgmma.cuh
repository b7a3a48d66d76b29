// The delta rule over chunks on sm_90a, second and third part.
//
// `carry_state` goes chunk after chunk, an item being (value head, SCAN_COLUMNS value columns), and does only what must be
// done in turn. With S the state that enters a chunk:
//     delta = U - W S,   S <- exp(total) S + (faded k)^T delta.
// Two groups have half of the state's rows each, in float32 in their accumulators; the third makes delta. They hand S and
// delta to each other as fp16 through shared memory, and leave both in the item. `gated_output` then makes all chunks at
// once: output = (faded q) S + scores delta, and its gated norm. The asker brings the items in.
//
// In an item and in shared memory alike, all matrices are operands of wgmma: blocks of rows of 128 bytes, swizzled, or registers.
#pragma once

#include "prefill/delta_chunks.cuh"
#include "prefill/delta_scan.cuh"
#include "primitive/bulk.cuh"
#include "primitive/wgmma.cuh"

constexpr int CARRY_STAGES = 4;  // chunks whose W, k and U are in shared memory
constexpr int CARRY_DELTA = ITEM_QUERY;  // bytes of W and k in an item; U's columns come behind them
constexpr int CARRY_STAGE = CARRY_DELTA + SCAN_COLUMNS * 128;
constexpr int MOST_CHUNKS = 64;
constexpr int STATE_IMAGE = CARRY_STAGES * CARRY_STAGE;                   // [2][SCAN_COLUMNS][64 dims], fp16
constexpr int DELTA_IMAGE = STATE_IMAGE + 2 * SCAN_COLUMNS * 128;         // [SCAN_COLUMNS][64 tokens], fp16
constexpr int CARRY_FADES = DELTA_IMAGE + SCAN_COLUMNS * 128;             // [MOST_CHUNKS]
constexpr int CARRY_BYTES = CARRY_FADES + MOST_CHUNKS * 4;
constexpr int OUTPUT_SLOT = ITEM_BYTES - ITEM_QUERY;                      // of a group: queries, scores, delta, state
constexpr int OUTPUT_BYTES = 3 * OUTPUT_SLOT;
constexpr int DELTA_WGMMA_BYTES = WGMMA ? (CARRY_BYTES > OUTPUT_BYTES ? CARRY_BYTES : OUTPUT_BYTES) : 0;

// The barriers of both, through all layers of a launch, and what the workers have to remember of them.
constexpr int PASSAGE_BYTES = (2 * CARRY_STAGES + 6) * 8 + 16;

struct Passage {
    u32 barriers;
    volatile u32* done;  // in shared memory: chunks carried; for each group, outputs made

    __device__ __forceinline__ u32 full(u32 chunk) const { return barriers + chunk % CARRY_STAGES * 8; }
    __device__ __forceinline__ u32 free(u32 chunk) const { return full(chunk) + CARRY_STAGES * 8; }
    __device__ __forceinline__ u32 slot_full(int group) const { return barriers + (2 * CARRY_STAGES + group) * 8; }
    __device__ __forceinline__ u32 slot_free(int group) const { return slot_full(group) + 24; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    // By all threads, before anything else.
    __device__ __forceinline__ void init() {
        if (thread_index()) return;
        done[0] = done[1] = done[2] = done[3] = 0;
#pragma unroll 1
        for (int i = 0; i < CARRY_STAGES; ++i) barrier_init(full(i), 1), barrier_init(free(i), WORKER_WARPS);
#pragma unroll 1
        for (int i = 0; i < 3; ++i) barrier_init(slot_full(i), 1), barrier_init(slot_free(i), 4);
        barrier_init_fence();
    }
#else
    __device__ __forceinline__ void init() {}
#endif
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int CARRY_PARTS = VALUE_HEAD_DIM / SCAN_COLUMNS;
constexpr int CARRY_FRAGMENTS = SCAN_COLUMNS / 8;
using CarryFragments = float[CARRY_FRAGMENTS][4];

__device__ __forceinline__ void hold_carry(CarryFragments& acc) {
#pragma unroll
    for (int n = 0; n < CARRY_FRAGMENTS; ++n) hold4(acc[n]);
}
// A group's 64 rows of accumulators as fp16, transposed: [SCAN_COLUMNS][64 rows].
__device__ __forceinline__ void store_image(u32 image, const CarryFragments& acc) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < CARRY_FRAGMENTS; n += 2)
        store_matrix_transposed(image + swizzled<128>(8 * n + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2), pack_half2(acc[n][0], acc[n][1]),
                                pack_half2(acc[n][2], acc[n][3]), pack_half2(acc[n + 1][0], acc[n + 1][1]), pack_half2(acc[n + 1][2], acc[n + 1][3]));
}
// An image to device memory, by a group.
__device__ __forceinline__ void copy_image(u8* to, u32 image) {
#pragma unroll
    for (int i = 0; i < SCAN_COLUMNS * 8 / 128; ++i) {
        int at = (thread_index() % 128 + 128 * i) * 16;
        *(uint4*)(to + at) = load_shared4(image + at);
    }
}

// The first two groups.
__device__ __forceinline__ void carry(const PrefillArguments& a, const LinearLayer& layer, int head, int part, u32 shared, const Passage& passage, u32 carried) {
    const int group = thread_index() / 128, lane = thread_index() % 32, chunks = (a.tokens + CHUNK - 1) / CHUNK;
    const int dim = 64 * group + thread_index() / 32 % 4 * 16 + lane / 4;
    float* column = layer.recurrent_state + ((long long)head * VALUE_HEAD_DIM + part * SCAN_COLUMNS + 2 * (lane % 4)) * KEY_HEAD_DIM + dim;
    u8* item = a.items + (long long)head * ITEM_BYTES + ITEM_STATE + group * (VALUE_HEAD_DIM * 128) + part * (SCAN_COLUMNS * 128);
    const u32 image = shared + STATE_IMAGE + group * (SCAN_COLUMNS * 128);
    // No load from device memory is on its way in the loop: the fences would wait for it.
    if (thread_index() < chunks) store_shared(shared + CARRY_FADES + 4 * thread_index(), __float_as_uint(a.fades[thread_index() * VALUE_HEADS + head]));
    CarryFragments state;
#pragma unroll
    for (int n = 0; n < CARRY_FRAGMENTS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[n][i] = column[(8 * n + i % 2) * KEY_HEAD_DIM + i / 2 * 8];
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk, ++carried, item += (long long)VALUE_HEADS * ITEM_BYTES) {
        store_image(image, state);
        fence_async_shared();
        worker_sync();  // the state is there
        copy_image(item, image);
        float fade = __uint_as_float(load_shared(shared + CARRY_FADES + 4 * chunk));
#pragma unroll
        for (int n = 0; n < CARRY_FRAGMENTS; ++n) state[n][0] *= fade, state[n][1] *= fade, state[n][2] *= fade, state[n][3] *= fade;
        worker_sync();  // delta is there
        barrier_wait(passage.full(carried), carried / CARRY_STAGES & 1);
        hold_carry(state);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k)
            wgmma_update(state, wgmma_transposed(shared + carried % CARRY_STAGES * CARRY_STAGE + ITEM_KEY + group * (CHUNK * 128) + k * 2048, CHUNK * 128),
                         wgmma_operand(shared + DELTA_IMAGE) + 2 * k);
        wgmma_commit();
        wgmma_wait<0>();
        hold_carry(state);
        warp_arrive(passage.free(carried));
    }
#pragma unroll
    for (int n = 0; n < CARRY_FRAGMENTS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) column[(8 * n + i % 2) * KEY_HEAD_DIM + i / 2 * 8] = state[n][i];
}

// The third group.
__device__ __forceinline__ void correct(const PrefillArguments& a, int head, int part, u32 shared, const Passage& passage, u32 carried) {
    const int chunks = (a.tokens + CHUNK - 1) / CHUNK;
    u8* item = a.items + (long long)head * ITEM_BYTES + ITEM_DELTA + part * (SCAN_COLUMNS * 128);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk, ++carried, item += (long long)VALUE_HEADS * ITEM_BYTES) {
        barrier_wait(passage.full(carried), carried / CARRY_STAGES & 1);
        const u32 own = shared + carried % CARRY_STAGES * CARRY_STAGE + thread_index() % 128 * 16;
        CarryFragments delta;
#pragma unroll
        for (int n = 0; n < CARRY_FRAGMENTS; n += 2) {
            uint4 v = load_shared4(own + CARRY_DELTA + 1024 * n);
            float2 first = unpack_half2(v.x), second = unpack_half2(v.y), third = unpack_half2(v.z), fourth = unpack_half2(v.w);
            delta[n][0] = first.x, delta[n][1] = first.y, delta[n][2] = second.x, delta[n][3] = second.y;
            delta[n + 1][0] = third.x, delta[n + 1][1] = third.y, delta[n + 1][2] = fourth.x, delta[n + 1][3] = fourth.y;
        }
        uint4 weight[KEY_HEAD_DIM / 16];
#pragma unroll
        for (int k = 0; k < KEY_HEAD_DIM / 16; ++k) weight[k] = load_shared4(own + ITEM_WEIGHT + 2048 * k);
        worker_sync();  // the state is there
        hold_carry(delta);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KEY_HEAD_DIM / 16; ++k)
            wgmma_delta(delta, weight[k].x, weight[k].y, weight[k].z, weight[k].w, wgmma_operand(shared + STATE_IMAGE + k / 4 * (SCAN_COLUMNS * 128)) + k % 4 * 2);
        wgmma_commit();
        wgmma_wait<0>();
        hold_carry(delta);
        store_image(shared + DELTA_IMAGE, delta);
        fence_async_shared();
        worker_sync();  // delta is there
        warp_arrive(passage.free(carried));
        copy_image(item, shared + DELTA_IMAGE);  // U was there: it is read
    }
}

__device__ __forceinline__ void carry_state(const PrefillArguments& a, const LinearLayer& layer, u8* memory, const Passage& passage) {
    u32 carried = passage.done[0], chunks = (a.tokens + CHUNK - 1) / CHUNK;
    move_window(a, layer);
#pragma unroll 1
    for (int item = block_index(); item < VALUE_HEADS * CARRY_PARTS; item += gridDim.x, carried += chunks) {
        fence_async_shared();
        block_sync();  // shared memory is free: the asker begins
        if (thread_index() < 256)
            carry(a, layer, item / CARRY_PARTS, item % CARRY_PARTS, shared_address(memory), passage, carried);
        else
            correct(a, item / CARRY_PARTS, item % CARRY_PARTS, shared_address(memory), passage, carried);
    }
    if (thread_index() == 0) passage.done[0] = carried;
}
// The asker's part, by its first warp.
__device__ __forceinline__ void bring_chunks(const PrefillArguments& a, u32 shared, const Passage& passage, u32& carried) {
#pragma unroll 1
    for (int item = block_index(); item < VALUE_HEADS * CARRY_PARTS; item += gridDim.x) {
        block_sync();
        fence_async();
        const u8* from = a.items + (long long)(item / CARRY_PARTS) * ITEM_BYTES;
        if (thread_index() == WORKERS)
#pragma unroll 1
            for (int chunk = 0; chunk < (a.tokens + CHUNK - 1) / CHUNK; ++chunk, ++carried, from += (long long)VALUE_HEADS * ITEM_BYTES) {
                barrier_wait(passage.free(carried), carried / CARRY_STAGES & 1 ^ 1);
                u32 stage = shared + carried % CARRY_STAGES * CARRY_STAGE;
                barrier_expect(passage.full(carried), CARRY_STAGE);
                bulk_load(stage, from, CARRY_DELTA, passage.full(carried));
                bulk_load(stage + CARRY_DELTA, from + ITEM_DELTA + item % CARRY_PARTS * (SCAN_COLUMNS * 128), SCAN_COLUMNS * 128, passage.full(carried));
            }
        __syncwarp();
    }
}

__device__ __forceinline__ void output_of_chunk(const PrefillArguments& a, const LinearLayer& layer, int chunk, int head, u32 slot, u32 full, u32 free, u32 turn) {
    constexpr int FRAGMENTS = VALUE_HEAD_DIM / 8;
    constexpr float SCALE = 0.08838834764831845f;  // 1 / sqrt(KEY_HEAD_DIM)
    const int lane = thread_index() % 32, token = chunk * CHUNK + thread_index() / 32 % 4 * 16 + lane / 4, column = head * VALUE_HEAD_DIM + 2 * (lane % 4);
    u32 z[2][FRAGMENTS];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const u16* row = a.projected + (long long)min(token + 8 * h, a.tokens - 1) * LINEAR_STRIDE + CONV_DIM + column;
#pragma unroll
        for (int n = 0; n < FRAGMENTS; ++n) z[h][n] = *(const u32*)(row + 8 * n);
    }
    float acc[FRAGMENTS][4];
#pragma unroll
    for (int n = 0; n < FRAGMENTS; ++n) {
        acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
        hold4(acc[n]);
    }
    constexpr int SCORES = ITEM_SCORES - ITEM_QUERY, DELTA = ITEM_DELTA - ITEM_QUERY, STATE = ITEM_STATE - ITEM_QUERY;
    barrier_wait(full, turn & 1);
    uint4 scores[CHUNK / 16];
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) scores[k] = load_shared4(slot + SCORES + (thread_index() % 128 + 128 * k) * 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEY_HEAD_DIM / 16; ++k)
        wgmma_output(acc, wgmma_operand(slot + k / 4 * (CHUNK * 128)) + k % 4 * 2, wgmma_operand(slot + STATE + k / 4 * (VALUE_HEAD_DIM * 128)) + k % 4 * 2);
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k) wgmma_scored(acc, scores[k].x, scores[k].y, scores[k].z, scores[k].w, wgmma_operand(slot + DELTA) + 2 * k);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < FRAGMENTS; ++n) hold4(acc[n]);
    warp_arrive(free);
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float squares = 0;
#pragma unroll
        for (int n = 0; n < FRAGMENTS; ++n) squares += acc[n][2 * h] * acc[n][2 * h] + acc[n][2 * h + 1] * acc[n][2 * h + 1];
        squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 1);
        squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 2);
        scale[h] = SCALE * rsqrt_fast(squares * (SCALE * SCALE / VALUE_HEAD_DIM) + NORM_EPS);
    }
    // Of 32 columns, what this lane has is 16 bytes of `mixed`: see input_place.
#pragma unroll
    for (int m = 0; m < FRAGMENTS / 4; ++m) {
        u32 words[2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* w = layer.gated_norm + 2 * (lane % 4) + 32 * m + 8 * j;
            float first = load_constant(w), second = load_constant(w + 1);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 gate = z[h][4 * m + j];
                words[h][j] = pack2(acc[4 * m + j][2 * h] * scale[h] * first * quick_silu(low_half(gate)), acc[4 * m + j][2 * h + 1] * scale[h] * second * quick_silu(high_half(gate)));
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (token + 8 * h < a.tokens) *(uint4*)input_place<VALUE_DIM>(a.mixed, token + 8 * h, column + 32 * m) = make_uint4(words[h][0], words[h][1], words[h][2], words[h][3]);
    }
}

__device__ __forceinline__ void gated_output(const PrefillArguments& a, const LinearLayer& layer, u8* memory, const Passage& passage) {
    const int group = thread_index() / 128, items = (a.tokens + CHUNK - 1) / CHUNK * VALUE_HEADS;
    u32 turn = passage.done[1 + group];
    fence_async_shared();
    block_sync();  // shared memory is free: the asker begins
#pragma unroll 1
    for (int item = group * gridDim.x + block_index(); item < items; item += 3 * gridDim.x, ++turn)
        output_of_chunk(a, layer, item / VALUE_HEADS, item % VALUE_HEADS, shared_address(memory) + group * OUTPUT_SLOT, passage.slot_full(group), passage.slot_free(group), turn);
    if (thread_index() % 128 == 0) passage.done[1 + group] = turn;
}
// The asker's part, by its first warp. `turns`: of each group, in turn, the parity of its outputs so far.
__device__ __forceinline__ void bring_outputs(const PrefillArguments& a, u32 shared, const Passage& passage, u32& turns) {
    const int items = (a.tokens + CHUNK - 1) / CHUNK * VALUE_HEADS;
    block_sync();
    fence_async();
    int group = 0;
    if (thread_index() == WORKERS)
#pragma unroll 1
        for (int item = block_index(); item < items; item += gridDim.x) {
            barrier_wait(passage.slot_free(group), turns >> group & 1 ^ 1);
            barrier_expect(passage.slot_full(group), OUTPUT_SLOT);
            bulk_load(shared + group * OUTPUT_SLOT, a.items + (long long)item * ITEM_BYTES + ITEM_QUERY, OUTPUT_SLOT, passage.slot_full(group));
            turns ^= 1 << group;
            group = group < 2 ? group + 1 : 0;
        }
    __syncwarp();
}

#else

__device__ __forceinline__ void carry_state(const PrefillArguments&, const LinearLayer&, u8*, const Passage&) {}
__device__ __forceinline__ void gated_output(const PrefillArguments&, const LinearLayer&, u8*, const Passage&) {}

#endif
