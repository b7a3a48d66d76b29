// Causal attention on sm_90a: as in attention.cuh, with wgmma.
//
// An item is (kv head, tokens, part of the keys): two tiles of 64 rows, one a token and query head. The groups have one
// task each. The asker brings queries, keys and values in, in tiles of 64 keys. The third group of workers makes the
// scores of one row tile after the other, softens them, and leaves 16-bit weights in shared memory, with the factor by
// which a row's sum shrinks where its maximum has grown. Each of the first two has half of the dims of both row tiles,
// in registers, and multiplies the weights with the values. So softmax and products overlap, and no thread needs more
// than 160 registers.
//
// Queries, keys and values lie in blocks of 64 dims, each with rows of 128 bytes. Where there are too few items for all
// SMs, the keys are dealt to several (`attention_splits`), which leave unscaled sums with their maximum, and
// `merge_attention` adds them up.
#pragma once

#include "prefill/attention.cuh"
#include "primitive/bulk.cuh"
#include "primitive/wgmma.cuh"

constexpr int ROW_TILES = 2;
constexpr int WIDE_KEYS = 64;  // of a tile
constexpr int TILE_BYTES = WIDE_KEYS * KEY_ROW;
constexpr int TOKENS_AN_ITEM = ROW_TILES * TOKENS_A_TILE;
constexpr int WIDE_QUERY_BYTES = QUERY_ROWS * KEY_ROW;
constexpr int WEIGHT_BYTES = QUERY_ROWS * WIDE_KEYS * 2;
// In shared memory: queries, two tiles of keys, two of values, weights of each row tile, factors, maxima and sums.
constexpr int WIDE_TILES = ROW_TILES * WIDE_QUERY_BYTES;
constexpr int WIDE_WEIGHTS = WIDE_TILES + 4 * TILE_BYTES;
constexpr int WIDE_FACTORS = WIDE_WEIGHTS + ROW_TILES * WEIGHT_BYTES;
constexpr int WIDE_RESULTS = WIDE_FACTORS + ROW_TILES * QUERY_ROWS * 4;
constexpr int WIDE_ATTENTION_BYTES = WIDE_RESULTS + ROW_TILES * QUERY_ROWS * 8;
static_assert(ROW_TILES * QUERY_ROWS * HEAD_DIM * 4 <= WIDE_WEIGHTS, "the output waits in float32 where queries, keys and values were");
static_assert(HEAD_DIM == 256, "two groups have 128 dims each");

// The barriers of attention, through all layers of a launch, and what the workers have to remember of them.
constexpr int HANDSHAKE_BYTES = 13 * 8 + 8;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Handshake {
    u32 barriers;
    volatile u32* done;  // in shared memory: tiles of keys, and items, that are behind

    // Of key tile `tile` since the launch began. `values`: its values, and not its keys.
    __device__ __forceinline__ u32 full(u32 tile, bool values) const { return barriers + (tile % 2 * 2 + values) * 8; }
    __device__ __forceinline__ u32 free(u32 tile, bool values) const { return full(tile, values) + 32; }
    __device__ __forceinline__ u32 weights(int row_tile) const { return barriers + 64 + row_tile * 8; }
    __device__ __forceinline__ u32 weights_read(int row_tile) const { return barriers + 80 + row_tile * 8; }
    __device__ __forceinline__ u32 queries() const { return barriers + 96; }

    // By all threads, before anything else.
    __device__ __forceinline__ void init() {
        if (thread_index()) return;
        done[0] = done[1] = 0;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            barrier_init(full(i / 2, i % 2), 1);               // the warp of the asker that brought it
            barrier_init(free(i / 2, i % 2), i % 2 ? 8 : 4);  // the warps that read it
        }
#pragma unroll 1
        for (int i = 0; i < ROW_TILES; ++i) barrier_init(weights(i), 4), barrier_init(weights_read(i), 8);
        barrier_init(queries(), 4);
        barrier_init_fence();
    }
};

// Of a row of 256 dims in blocks of 64: the place of 16 bytes, with 64 rows a block.
__device__ __forceinline__ u32 block_place(int row, int chunk) { return chunk / 8 * (64 * 128) + swizzled<128>(row, chunk % 8); }

// One item of attention, from its number.
struct AttentionItem {
    int kv_head, split, first_token, last_key, first_tile, end_tile;

    __device__ __forceinline__ AttentionItem(const PrefillArguments& a, int item) {
        int tiles = (a.tokens + TOKENS_AN_ITEM - 1) / TOKENS_AN_ITEM;
        kv_head = item % KV_HEADS, split = item / KV_HEADS % a.attention_splits;
        first_token = (tiles - 1 - item / KV_HEADS / a.attention_splits) * TOKENS_AN_ITEM;  // the last tokens have the most keys: they come first
        last_key = a.position + min(first_token + TOKENS_AN_ITEM, a.tokens) - 1;
        int key_tiles = last_key / WIDE_KEYS + 1;
        first_tile = key_tiles * split / a.attention_splits, end_tile = key_tiles * (split + 1) / a.attention_splits;
    }
};
__device__ __forceinline__ int attention_items(const PrefillArguments& a) { return (a.tokens + TOKENS_AN_ITEM - 1) / TOKENS_AN_ITEM * KV_HEADS * a.attention_splits; }

// 64 rows by a warp; behind row `last`, that one again.
__device__ __forceinline__ void bring_tile(u32 to, const u16* from, int last) {
    const int lane = thread_index() % 32;
    if (last < WIDE_KEYS - 1) {
#pragma unroll 1
        for (int row = 0; row < WIDE_KEYS; ++row) copy_async16(to + block_place(row, lane), from + min(row, last) * HEAD_DIM);
        return;
    }
    u32 at[8];  // of rows whose place is alike: one instruction a row is left
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = to + block_place(i, lane);
#pragma unroll
    for (int row = 0; row < WIDE_KEYS; ++row) copy_async16(at[row % 8] + row / 8 * 1024, from + row * HEAD_DIM);
}

// The asker's part of an item. Each of its warps brings a quarter of the queries, and then keys or values of every other tile.
__device__ __forceinline__ void bring_item(const PrefillArguments& a, int layer, int number, u32 shared, const Handshake& h, u32 tiles) {
    const AttentionItem item(a, number);
    const int warp = thread_index() / 32 % 4, lane = thread_index() % 32, values = warp % 2;
#pragma unroll 2
    for (int row = warp; row < ROW_TILES * QUERY_ROWS; row += 4) {
        int token = min(item.first_token + row / QUERY_ROWS * TOKENS_A_TILE + row % QUERY_ROWS / GROUP_QUERIES, a.tokens - 1);
        int head = item.kv_head * GROUP_QUERIES + row % QUERY_ROWS % GROUP_QUERIES;
        copy_async16(shared + row / QUERY_ROWS * WIDE_QUERY_BYTES + block_place(row % QUERY_ROWS, lane),
                     a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + 8 * lane);
    }
    copy_commit();
    const u16* from = (const u16*)full_layer(a, layer).keys + ((long long)(values ? KV_HEADS : 0) + item.kv_head) * a.max_context * HEAD_DIM + 8 * lane;
    bool queries = true;  // still on their way
#pragma unroll 1
    for (int i = (warp / 2 ^ tiles) & 1; i < item.end_tile - item.first_tile; i += 2) {
        const u32 tile = tiles + i, to = shared + WIDE_TILES + (2 * (tile % 2) + values) * TILE_BYTES;
        const int first_key = (item.first_tile + i) * WIDE_KEYS;
        if (tile >= 2) barrier_wait(h.free(tile, values), tile / 2 - 1 & 1);
        bring_tile(to, from + (long long)first_key * HEAD_DIM, item.last_key - first_key);
        copy_commit();
        if (queries) {
            copy_wait<1>();
            fence_async_shared();
            warp_arrive(h.queries());
            queries = false;
        }
        copy_wait<0>();
        fence_async_shared();
        warp_arrive(h.full(tile, values));
    }
    if (queries) {
        copy_wait<0>();
        fence_async_shared();
        warp_arrive(h.queries());
    }
}

using Scores = float[WIDE_KEYS / 8][4];

__device__ __forceinline__ void hold_scores(Scores& scores) {
#pragma unroll
    for (int n = 0; n < WIDE_KEYS / 8; ++n) hold4(scores[n]);
}
// Begins the product of a row tile's queries and a tile of keys.
__device__ __forceinline__ void begin_scores(Scores& scores, u32 queries, u32 keys) {
    hold_scores(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
        wgmma_scores(scores, wgmma_operand(queries + k / 4 * (QUERY_ROWS * 128)) + k % 4 * 2, wgmma_operand(keys + k / 4 * (WIDE_KEYS * 128)) + k % 4 * 2, k > 0);
    wgmma_commit();
}

// Scores to weights, in shared memory. `visible`: how many keys of the tile the row tile's first token sees, less one.
__device__ __forceinline__ void soften(Scores& scores, float (&peak)[2], float (&sum)[2], int visible, u32 weights, u32 factors) {
    constexpr float SCALE = 0.0625f * 1.44269504f;  // 1 / sqrt(HEAD_DIM), and exp2 in place of exp
    const int lane = thread_index() % 32, row = thread_index() / 32 % 4 * 16 + lane / 4;
    if (visible < WIDE_KEYS - 1) {
        int last[2] = {visible + row / GROUP_QUERIES - lane % 4 * 2, visible + (row + 8) / GROUP_QUERIES - lane % 4 * 2};
#pragma unroll
        for (int n = 0; n < WIDE_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (8 * n + i % 2 > last[i / 2]) scores[n][i] = -3e38f;
    }
    float highest[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int n = 0; n < WIDE_KEYS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 1));
        highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 2));
        float grown = fmaxf(peak[i], highest[i] * SCALE), factor = exp2_fast(peak[i] - grown);
        peak[i] = grown;
        sum[i] *= factor;
        if (lane % 4 == 0) store_shared(factors + (row + 8 * i) * 4, __float_as_uint(factor));
    }
#pragma unroll
    for (int n = 0; n < WIDE_KEYS / 8; ++n) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i] = exp2_fast(scores[n][i] * SCALE - peak[i / 2]);
            sum[i / 2] += w[i];
        }
        u32 at = weights + swizzled<128>(row, n) + lane % 4 * 4;
        store_shared(at, pack2(w[0], w[1]));
        store_shared(at + 8 * 128, pack2(w[2], w[3]));
    }
}

// The third group's part of an item. `tiles`, `items`: that are behind this one.
__device__ __forceinline__ void score_item(const PrefillArguments& a, const AttentionItem& item, u32 shared, const Handshake& h, u32 tiles, u32 items) {
    const int count = item.end_tile - item.first_tile;
    float peak[ROW_TILES][2] = {{-1e30f, -1e30f}, {-1e30f, -1e30f}}, sum[ROW_TILES][2] = {};
    Scores scores[ROW_TILES];
    auto keys = [&](u32 tile) { return shared + WIDE_TILES + 2 * (tile % 2) * TILE_BYTES; };
    auto finish = [&](int row_tile, int i) {
        if (tiles + i) barrier_wait(h.weights_read(row_tile), tiles + i - 1 & 1);
        soften(scores[row_tile], peak[row_tile], sum[row_tile], a.position + item.first_token + row_tile * TOKENS_A_TILE - (item.first_tile + i) * WIDE_KEYS,
               shared + WIDE_WEIGHTS + row_tile * WEIGHT_BYTES, shared + WIDE_FACTORS + row_tile * (QUERY_ROWS * 4));
        fence_async_shared();
        warp_arrive(h.weights(row_tile));
    };
    barrier_wait(h.queries(), items & 1);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const u32 tile = tiles + i;
        barrier_wait(h.full(tile, false), tile / 2 & 1);
        begin_scores(scores[0], shared, keys(tile));
        begin_scores(scores[1], shared + WIDE_QUERY_BYTES, keys(tile));
        wgmma_wait<1>();
        hold_scores(scores[0]);
        finish(0, i);
        wgmma_wait<0>();
        hold_scores(scores[1]);
        warp_arrive(h.free(tile, false));
        finish(1, i);
    }
    const int lane = thread_index() % 32, row = thread_index() / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float total = sum[r][i];
            total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
            total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
            if (lane % 4 == 0) store_shared2(shared + WIDE_RESULTS + (r * QUERY_ROWS + row + 8 * i) * 8, __float_as_uint(peak[r][i]), __float_as_uint(total));
        }
    worker_sync();
}

// A group's 128 dims of all rows, from shared memory (see weigh_item), to device memory.
__device__ __forceinline__ void store_attention(const PrefillArguments& a, const AttentionItem& item, u32 from) {
    constexpr int CHUNKS = HEAD_DIM / 2 / 4;  // four dims each
    const int group = thread_index() / 128;
#pragma unroll 2
    for (int i = thread_index() % 128; i < ROW_TILES * QUERY_ROWS * CHUNKS; i += 128) {
        int row = i / CHUNKS, of_tile = row % QUERY_ROWS / GROUP_QUERIES, token = item.first_token + row / QUERY_ROWS * TOKENS_A_TILE + of_tile;
        int head = item.kv_head * GROUP_QUERIES + row % QUERY_ROWS % GROUP_QUERIES, dim = group * (HEAD_DIM / 2) + i % CHUNKS * 4;
        if (of_tile >= TOKENS_A_TILE || token >= a.tokens) continue;
        uint4 v = load_shared4(from + row * (CHUNKS * 16) + ((i % CHUNKS ^ (row & 7)) << 4));
        if (a.attention_splits > 1) {
            *(uint4*)(a.attention + (((long long)item.split * a.tokens + token) * HEADS + head) * (HEAD_DIM + 4) + dim) = v;
        } else {
            uint2 gate = *(const uint2*)(a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + dim);
            store_input<QUERY_DIM>(a.mixed, token, head * HEAD_DIM + dim,
                                   pack2(__uint_as_float(v.x) * quick_sigmoid(low_half(gate.x)), __uint_as_float(v.y) * quick_sigmoid(high_half(gate.x))),
                                   pack2(__uint_as_float(v.z) * quick_sigmoid(low_half(gate.y)), __uint_as_float(v.w) * quick_sigmoid(high_half(gate.y))));
        }
    }
}

// The part of the first two groups: each has 128 dims.
__device__ __forceinline__ void weigh_item(const PrefillArguments& a, const AttentionItem& item, u32 shared, const Handshake& h, u32 tiles) {
    const int group = thread_index() / 128, lane = thread_index() % 32, row = thread_index() / 32 % 4 * 16 + lane / 4;
    float out[ROW_TILES][HEAD_DIM / 16][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[0][n][i] = out[1][n][i] = 0;
#pragma unroll 1
    for (u32 tile = tiles, end = tiles + (item.end_tile - item.first_tile); tile < end; ++tile) {
        const u32 values = shared + WIDE_TILES + (2 * (tile % 2) + 1) * TILE_BYTES + group * (TILE_BYTES / 2);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
            barrier_wait(h.weights(r), tile & 1);
            if (r == 0) barrier_wait(h.full(tile, true), tile / 2 & 1);
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) factor[i] = __uint_as_float(load_shared(shared + WIDE_FACTORS + (r * QUERY_ROWS + row + 8 * i) * 4));
            if (__any_sync(0xFFFFFFFFu, factor[0] != 1.0f || factor[1] != 1.0f))
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 16; ++n) out[r][n][0] *= factor[0], out[r][n][1] *= factor[0], out[r][n][2] *= factor[1], out[r][n][3] *= factor[1];
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n) hold4(out[r][n]);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < WIDE_KEYS / 16; ++k)
                wgmma_values(out[r], wgmma_operand(shared + WIDE_WEIGHTS + r * WEIGHT_BYTES) + 2 * k, wgmma_transposed(values + k * 2048, WIDE_KEYS * 128));
            wgmma_commit();
            wgmma_wait<0>();
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n) hold4(out[r][n]);
            warp_arrive(h.weights_read(r));
            if (r == ROW_TILES - 1) warp_arrive(h.free(tile, true));
        }
    }
    worker_sync();  // maxima and sums are there, and all else is read: the output takes its place
    const u32 waiting = shared + group * (ROW_TILES * QUERY_ROWS * HEAD_DIM / 2 * 4);
    const bool split = a.attention_splits > 1;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int place = r * QUERY_ROWS + row + 8 * i, of_tile = (row + 8 * i) / GROUP_QUERIES, token = item.first_token + r * TOKENS_A_TILE + of_tile;
            uint2 known = load_shared2(shared + WIDE_RESULTS + place * 8);
            float scale = split ? 1.0f : reciprocal_fast(__uint_as_float(known.y));
            if (split && group + lane % 4 == 0 && of_tile < TOKENS_A_TILE && token < a.tokens)
                *(uint2*)(a.attention + (((long long)item.split * a.tokens + token) * HEADS + item.kv_head * GROUP_QUERIES + (row + 8 * i) % GROUP_QUERIES) * (HEAD_DIM + 4) +
                          HEAD_DIM) = known;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; ++n)
                store_shared2(waiting + place * (HEAD_DIM / 2 * 4) + (((2 * n + lane % 4 / 2) ^ (place & 7)) << 4) + lane % 2 * 8, __float_as_uint(out[r][n][2 * i] * scale),
                              __float_as_uint(out[r][n][2 * i + 1] * scale));
        }
    group_barrier(1 + group, 128);
    store_attention(a, item, waiting);
}

__device__ __forceinline__ void attend_wide(const PrefillArguments& a, u8* memory, const Handshake& h) {
    u32 shared = shared_address(memory), tiles = h.done[0], items = h.done[1];
#pragma unroll 1
    for (int number = block_index(); number < attention_items(a); number += gridDim.x) {
        const AttentionItem item(a, number);
        fence_async_shared();
        block_sync();  // shared memory is free: the asker begins
        if (thread_index() >= 256)
            score_item(a, item, shared, h, tiles, items);
        else
            weigh_item(a, item, shared, h, tiles);
        tiles += item.end_tile - item.first_tile, ++items;
    }
    if (thread_index() == 0) h.done[0] = tiles, h.done[1] = items;
}

// The asker's part.
__device__ __forceinline__ void bring(const PrefillArguments& a, int layer, const u8* memory, const Handshake& h, u32& tiles) {
    u32 shared = shared_address(memory);
#pragma unroll 1
    for (int number = block_index(); number < attention_items(a); number += gridDim.x) {
        block_sync();
        fence_async_shared();
        bring_item(a, layer, number, shared, h, tiles);
        const AttentionItem item(a, number);
        tiles += item.end_tile - item.first_tile;
    }
}

// The parts of each token and head, put together by a warp; lane l has dims 4 l to 4 l + 3 and 128 further.
__device__ __forceinline__ void merge_attention(const PrefillArguments& a) {
    if (a.attention_splits == 1) return;
    const int lane = thread_index() % 32, row = HEADS * (HEAD_DIM + 4);
    for (int i = block_index() * WORKER_WARPS + thread_index() / 32; i < a.tokens * HEADS; i += gridDim.x * WORKER_WARPS) {
        int token = i / HEADS, head = i % HEADS;
        const float* part = a.attention + (long long)token * row + head * (HEAD_DIM + 4);
        const long long next = (long long)a.tokens * row;
        float best = -1e30f, total = 0;
        for (int s = lane; s < a.attention_splits; s += 32) best = fmaxf(best, part[s * next + HEAD_DIM]);
        best = warp_max(best);
        float4 x[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
#pragma unroll 4
        for (int s = 0; s < a.attention_splits; ++s) {
            float2 known = *(const float2*)(part + s * next + HEAD_DIM);
            float share = exp2_fast(known.x - best);
            total += share * known.y;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float4 v = *(const float4*)(part + s * next + 128 * h + 4 * lane);
                x[h].x += share * v.x, x[h].y += share * v.y, x[h].z += share * v.z, x[h].w += share * v.w;
            }
        }
        float scale = reciprocal_fast(total);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int dim = 128 * h + 4 * lane;
            uint2 gate = *(const uint2*)(a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + dim);
            store_input<QUERY_DIM>(a.mixed, token, head * HEAD_DIM + dim,
                                   pack2(x[h].x * scale * quick_sigmoid(low_half(gate.x)), x[h].y * scale * quick_sigmoid(high_half(gate.x))),
                                   pack2(x[h].z * scale * quick_sigmoid(low_half(gate.y)), x[h].w * scale * quick_sigmoid(high_half(gate.y))));
        }
    }
}

#else

struct Handshake {
    u32 barriers;
    volatile u32* done;
    __device__ __forceinline__ void init() {}
};
__device__ __forceinline__ void attend_wide(const PrefillArguments&, u8*, const Handshake&) {}
__device__ __forceinline__ void merge_attention(const PrefillArguments&) {}

#endif
