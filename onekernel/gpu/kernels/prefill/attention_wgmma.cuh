// Causal attention on sm_90a: as in attention.cuh, with wgmma.
//
// An item is (kv head, tokens, part of the keys). Two groups of four warps have 64 rows each, one a token and query head, and
// read the same tiles of WIDE_KEYS keys; the other groups load these, and lend their registers. Queries, keys
// and values lie in blocks of 64 dims, each with rows of 128 bytes. Where there are too few items for all SMs, the keys are dealt to several (`attention_splits`), which
// leave unscaled sums with their maximum, and `merge_attention` adds them up.
#pragma once

#include "prefill/attention.cuh"
#include "primitive/wgmma.cuh"

constexpr int ATTENTION_TILES = 2;  // groups of four warps that multiply, each with rows of its own
constexpr int WIDE_KEYS = 64;       // of a tile
constexpr int WIDE_STAGE = 2 * WIDE_KEYS * KEY_ROW;
constexpr int TOKENS_AN_ITEM = ATTENTION_TILES * TOKENS_A_TILE;
constexpr int LOADERS = PREFILL_THREADS - 128 * ATTENTION_TILES;
constexpr int WIDE_QUERY_BYTES = QUERY_ROWS * KEY_ROW;
constexpr int WIDE_STAGES = 2;
constexpr int WIDE_ATTENTION_BYTES = ATTENTION_TILES * WIDE_QUERY_BYTES + WIDE_STAGES * WIDE_STAGE;
static_assert(WIDE_ATTENTION_BYTES >= ATTENTION_TILES * QUERY_ROWS * HEAD_DIM * 4, "the output waits there in float32");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of a row of 256 dims in blocks of 64: the place of 16 bytes, with ROWS rows a block.
template <int ROWS>
__device__ __forceinline__ u32 block_place(int row, int chunk) {
    return chunk / 8 * (ROWS * 128) + swizzled<128>(row, chunk % 8);
}

__device__ __forceinline__ void load_keys(const PrefillArguments& a, const u16* keys, long long to_values, int first_key, int last_key, u32 stage) {
#pragma unroll 4
    for (int i = thread_index() - 128 * ATTENTION_TILES; i < WIDE_KEYS * 32; i += LOADERS) {
        int row = i / 32, chunk = i % 32;
        const u16* key = keys + (long long)min(first_key + row, last_key) * HEAD_DIM + 8 * chunk;
        u32 to = stage + block_place<WIDE_KEYS>(row, chunk);
        copy_async16(to, key);
        copy_async16(to + WIDE_KEYS * KEY_ROW, key + to_values);
    }
}

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

// The part of the other groups: queries, then one tile of keys after the other.
__device__ __forceinline__ void load_item(const PrefillArguments& a, int layer, int number, u32 shared) {
    AttentionItem item(a, number);
    const u32 stages = shared + ATTENTION_TILES * WIDE_QUERY_BYTES;
    FullLayer l = full_layer(a, layer);
    const u16* keys = l.keys + (long long)item.kv_head * a.max_context * HEAD_DIM;
    const long long to_values = l.values - l.keys;
    __syncthreads();  // shared memory is free
#pragma unroll 2
    for (int i = thread_index() - 128 * ATTENTION_TILES; i < ATTENTION_TILES * QUERY_ROWS * 32; i += LOADERS) {
        int row = i / 32 % QUERY_ROWS, of = i / 32 / QUERY_ROWS;
        int token = min(item.first_token + of * TOKENS_A_TILE + row / GROUP_QUERIES, a.tokens - 1), head = item.kv_head * GROUP_QUERIES + row % GROUP_QUERIES;
        copy_async16(shared + of * WIDE_QUERY_BYTES + block_place<QUERY_ROWS>(row, i % 32),
                     a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + 8 * (i % 32));
    }
    if (item.first_tile < item.end_tile) load_keys(a, keys, to_values, item.first_tile * WIDE_KEYS, item.last_key, stages);
    copy_commit();
#pragma unroll 1
    for (int key_tile = item.first_tile; key_tile < item.end_tile; ++key_tile) {
        copy_wait<0>();
        fence_async();
        __syncthreads();  // the tile is there, and the one before is read
        if (key_tile + 1 < item.end_tile)
            load_keys(a, keys, to_values, (key_tile + 1) * WIDE_KEYS, item.last_key, stages + (key_tile + 1 - item.first_tile) % 2 * WIDE_STAGE);
        copy_commit();
    }
    copy_wait<0>();
    __syncthreads();
}

__device__ __forceinline__ void attend_item(const PrefillArguments& a, int number, u32 shared) {
    const int group = thread_index() / 128;
    const AttentionItem item(a, number);
    const int own_token = item.first_token + group * TOKENS_A_TILE, kv_head = item.kv_head, split = item.split;
    const u32 stages = shared + ATTENTION_TILES * WIDE_QUERY_BYTES;
    __syncthreads();  // shared memory is free
    float out[2][HEAD_DIM / 16][4];  // halves of the dims
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) out[n / 16][n % 16][0] = out[n / 16][n % 16][1] = out[n / 16][n % 16][2] = out[n / 16][n % 16][3] = 0;
    float peak[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};
    auto row = [] { return thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4; };  // the first of this lane's two
#pragma unroll 1
    for (int key_tile = item.first_tile; key_tile < item.end_tile; ++key_tile) {
        __syncthreads();  // the tile is there, and the one before is read
        u32 stage = stages + (key_tile - item.first_tile) % 2 * WIDE_STAGE;
        int first_key = key_tile * WIDE_KEYS;
        if (own_token >= a.tokens || first_key > a.position + min(own_token + TOKENS_A_TILE, a.tokens) - 1) continue;  // behind this group's tokens
        float scores[WIDE_KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < WIDE_KEYS / 8; ++n) {
            scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
            hold4(scores[n]);
        }
        u32 queries = shared + group * WIDE_QUERY_BYTES;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; ++k)
            wgmma_scores(scores, wgmma_operand(queries + k / 4 * (QUERY_ROWS * 128)) + k % 4 * 2, wgmma_operand(stage + k / 4 * (WIDE_KEYS * 128)) + k % 4 * 2);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < WIDE_KEYS / 8; ++n) hold4(scores[n]);
        constexpr float SCALE = 0.0625f * 1.44269504f;  // 1 / sqrt(HEAD_DIM), and exp2 in place of exp
        float highest[2] = {peak[0], peak[1]};
        int first_row = row(), beyond = a.position + own_token - first_key - thread_index() % 4 * 2;  // lane % 4 = thread % 4
        int last[2] = {beyond + first_row / GROUP_QUERIES, beyond + (first_row + 8) / GROUP_QUERIES};
#pragma unroll
        for (int n = 0; n < WIDE_KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = 8 * n + i % 2 <= last[i / 2] ? scores[n][i] * SCALE : -3e38f;
                highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
            }
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 1));
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xFFFFFFFFu, highest[i], 2));
            shrink[i] = exp2_fast(peak[i] - highest[i]);
            peak[i] = highest[i];
            sum[i] *= shrink[i];
        }
        u32 weights[WIDE_KEYS / 16][4];
#pragma unroll
        for (int n = 0; n < WIDE_KEYS / 8; ++n) {
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                w[i] = exp2_fast(scores[n][i] - peak[i / 2]);
                sum[i / 2] += w[i];
            }
            weights[n / 2][n % 2 * 2] = pack2(w[0], w[1]);
            weights[n / 2][n % 2 * 2 + 1] = pack2(w[2], w[3]);
        }
        if (__any_sync(0xFFFFFFFFu, shrink[0] != 1.0f || shrink[1] != 1.0f))
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; ++n) out[n / 16][n % 16][0] *= shrink[0], out[n / 16][n % 16][1] *= shrink[0], out[n / 16][n % 16][2] *= shrink[1], out[n / 16][n % 16][3] *= shrink[1];
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) hold4(out[n / 16][n % 16]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < WIDE_KEYS / 16; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                wgmma_values(out[half], weights[k][0], weights[k][1], weights[k][2], weights[k][3],
                             wgmma_transposed(stage + WIDE_KEYS * KEY_ROW + half * (WIDE_KEYS * KEY_ROW / 2) + k * 2048, WIDE_KEYS * 128));
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n) hold4(out[n / 16][n % 16]);
    }
    __syncthreads();  // all is read: the output takes the place
    const int thread = thread_index(), lane = thread % 32, own_row = row();
    u32 waiting = shared + group * (QUERY_ROWS * HEAD_DIM * 4);
    float scale[2] = {1, 1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
        if (a.attention_splits == 1)
            scale[i] = __fdividef(1.0f, sum[i]);
        else if (lane % 4 == 0 && (own_row + 8 * i) / GROUP_QUERIES < TOKENS_A_TILE && own_token + (own_row + 8 * i) / GROUP_QUERIES < a.tokens) {
            int token = own_token + (own_row + 8 * i) / GROUP_QUERIES, head = kv_head * GROUP_QUERIES + (own_row + 8 * i) % GROUP_QUERIES;
            *(float2*)(a.attention + ((long long)split * a.tokens + token) * HEADS * (HEAD_DIM + 4) + head * (HEAD_DIM + 4) + HEAD_DIM) = make_float2(peak[i], sum[i]);
        }
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
        u32 at = waiting + own_row * (HEAD_DIM * 4) + (((2 * n + lane % 4 / 2) ^ (own_row & 7)) << 4) + lane % 2 * 8;
        store_shared2(at, __float_as_uint(out[n / 16][n % 16][0] * scale[0]), __float_as_uint(out[n / 16][n % 16][1] * scale[0]));
        store_shared2(at + 8 * HEAD_DIM * 4, __float_as_uint(out[n / 16][n % 16][2] * scale[1]), __float_as_uint(out[n / 16][n % 16][3] * scale[1]));
    }
    group_barrier(1 + group, 128);
#pragma unroll 1
    for (int i = thread % 128; i < QUERY_ROWS * HEAD_DIM / 4; i += 128) {
        int r = i / (HEAD_DIM / 4), chunk = i % (HEAD_DIM / 4), token = own_token + r / GROUP_QUERIES, head = kv_head * GROUP_QUERIES + r % GROUP_QUERIES;
        if (r / GROUP_QUERIES >= TOKENS_A_TILE || token >= a.tokens) continue;
        uint4 v = load_shared4(waiting + r * (HEAD_DIM * 4) + ((chunk ^ (r & 7)) << 4));
        if (a.attention_splits > 1) {
            *(uint4*)(a.attention + ((long long)split * a.tokens + token) * HEADS * (HEAD_DIM + 4) + head * (HEAD_DIM + 4) + 4 * chunk) = v;
        } else {
            uint2 gate = *(const uint2*)(a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + 4 * chunk);
            store_input<QUERY_DIM>(a.mixed, token, head * HEAD_DIM + 4 * chunk,
                                   pack2(__uint_as_float(v.x) * quick_sigmoid(low_half(gate.x)), __uint_as_float(v.y) * quick_sigmoid(high_half(gate.x))),
                                   pack2(__uint_as_float(v.z) * quick_sigmoid(low_half(gate.y)), __uint_as_float(v.w) * quick_sigmoid(high_half(gate.y))));
        }
    }
}

__device__ __forceinline__ void attend_wide(const PrefillArguments& a, int layer, u8* memory) {
    u32 shared = shared_address(memory);
    if (thread_index() < 128 * ATTENTION_TILES) {
        more_registers<216>();
#pragma unroll 1
        for (int item = block_index(); item < attention_items(a); item += gridDim.x) attend_item(a, item, shared);
        fewer_registers<128>();
    } else {
        fewer_registers<40>();
#pragma unroll 1
        for (int item = block_index(); item < attention_items(a); item += gridDim.x) load_item(a, layer, item, shared);
        more_registers<128>();
    }
}

// The parts of each token and head, put together by a warp; lane l has dims 4 l to 4 l + 3 and 128 further.
__device__ __forceinline__ void merge_attention(const PrefillArguments& a) {
    if (a.attention_splits == 1) return;
    const int lane = thread_index() % 32, row = HEADS * (HEAD_DIM + 4);
    for (int i = block_index() * PREFILL_WARPS + thread_index() / 32; i < a.tokens * HEADS; i += gridDim.x * PREFILL_WARPS) {
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
        float scale = __fdividef(1.0f, total);
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

__device__ __forceinline__ void attend_wide(const PrefillArguments&, int, u8*) {}
__device__ __forceinline__ void merge_attention(const PrefillArguments&) {}

#endif
