// Causal attention over the KV cache, for many tokens at once.
//
// `rotate` norms and rotates queries (in place) and keys, and writes keys and values to the cache. An item of `attend`
// is (kv head, some tokens): 64 rows, one a token and query head of the kv head, so that all of them use one read of
// the keys. Groups of four warps take tiles of 32 keys in turn; each keeps a running maximum, sum and output
// (FlashAttention), and the groups are merged at the end.
#pragma once

#include "prefill/model.cuh"

constexpr int QUERY_ROWS = 64;
constexpr int TOKENS_A_TILE = QUERY_ROWS / GROUP_QUERIES;
constexpr int KEY_TILE = 32;
constexpr int KEY_ROW = HEAD_DIM * 2;  // bytes
constexpr int KEY_STAGE = 2 * KEY_TILE * KEY_ROW;
constexpr int ATTENTION_GROUP = ATTENTION_STAGES * KEY_STAGE;  // bytes of one group of warps
constexpr int ATTENTION_BYTES = QUERY_ROWS * KEY_ROW + ATTENTION_GROUPS * ATTENTION_GROUP + 8 * QUERY_ROWS * ATTENTION_GROUPS;
static_assert(ATTENTION_GROUP >= QUERY_ROWS * HEAD_DIM * 4, "a group's output waits in its stages");

// Lane l holds dims 8 l to 8 l + 7 of one head; `rope` is (cos, sin) of the pairs (i, i + ROTARY_DIM / 2).
__device__ __forceinline__ uint4 norm_and_rotate(uint4 packed, const float* weight, const float2* rope) {
    constexpr int HALF_LANES = ROTARY_DIM / 2 / 8;
    int lane = thread_index() % 32;
    float x[8], squares = 0;
    unpack8(x, packed);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += x[i] * x[i];
    float scale = rsqrt_fast(warp_sum(squares) / HEAD_DIM + NORM_EPS);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] *= scale * load_constant(weight + 8 * lane + i);
        float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], HALF_LANES);
        if (lane < 2 * HALF_LANES) {
            float2 r = rope[lane % HALF_LANES * 8 + i];
            x[i] = lane < HALF_LANES ? x[i] * r.x - other * r.y : x[i] * r.x + other * r.y;
        }
    }
    return pack8(x);
}

__device__ __forceinline__ void rotate(const PrefillArguments& a, const FullLayer& layer) {
    constexpr int SLOTS = HEADS + 2 * KV_HEADS;
    int lane = thread_index() % 32;
    for (int i = block_index() * WORKER_WARPS + thread_index() / 32; i < a.tokens * SLOTS; i += gridDim.x * WORKER_WARPS) {
        int token = i / SLOTS, slot = i % SLOTS, position = a.position + token;
        u16* row = a.projected + (long long)token * FULL_STRIDE;
        const float2* rope = a.rope + (long long)position * (ROTARY_DIM / 2);
        if (slot < HEADS) {
            uint4* at = (uint4*)(row + slot * 2 * HEAD_DIM) + lane;
            *at = norm_and_rotate(*at, layer.q_norm, rope);
        } else {
            bool is_key = slot < HEADS + KV_HEADS;
            int head = (slot - HEADS) % KV_HEADS;
            uint4 v = *((const uint4*)(row + 2 * QUERY_DIM + (slot - HEADS) * HEAD_DIM) + lane);
            if (is_key) v = norm_and_rotate(v, layer.k_norm, rope);
            u16* cache = (is_key ? layer.keys : layer.values) + ((long long)head * a.max_context + position) * HEAD_DIM;
            *((uint4*)cache + lane) = v;
        }
    }
}

// Keys, then values, of KEY_TILE positions; by the 128 threads of a group.
__device__ __forceinline__ void load_key_tile(const FullLayer& layer, long long head_offset, int first_key, int last_key, u32 stage) {
    int t = thread_index() % 128, chunk = t % 32;
    const u16* from = layer.keys + head_offset + 8 * chunk;
    long long to_values = layer.values - layer.keys;
#pragma unroll 2
    for (int row = t / 32; row < KEY_TILE; row += 4) {
        const u16* key = from + (long long)min(first_key + row, last_key) * HEAD_DIM;
        u32 to = stage + swizzled<KEY_ROW>(row, chunk);
        copy_async16(to, key);
        copy_async16(to + KEY_TILE * KEY_ROW, key + to_values);
    }
}

__device__ __forceinline__ void attend_tile(const PrefillArguments& a, const FullLayer& layer, int kv_head, int tile, u8* memory) {
    int group = thread_index() / 128, warp = thread_index() / 32 % 4, lane = thread_index() % 32;
    int first_token = tile * TOKENS_A_TILE, tokens = min(TOKENS_A_TILE, a.tokens - first_token);
    int keys = a.position + first_token + tokens, key_tiles = (keys + KEY_TILE - 1) / KEY_TILE;
    long long head_offset = (long long)kv_head * a.max_context * HEAD_DIM;
    u32 queries = shared_address(memory), stages = queries + QUERY_ROWS * KEY_ROW + group * ATTENTION_GROUP;
    float* peaks = (float*)(memory + QUERY_ROWS * KEY_ROW + ATTENTION_GROUPS * ATTENTION_GROUP);  // [groups, 64], then sums
    bool active = group < ATTENTION_GROUPS;

    worker_sync();  // shared memory is free
#pragma unroll 2
    for (int i = thread_index(); i < QUERY_ROWS * 32; i += WORKERS) {
        int row = i / 32, token = min(first_token + row / GROUP_QUERIES, a.tokens - 1), head = kv_head * GROUP_QUERIES + row % GROUP_QUERIES;
        copy_async16(queries + swizzled<KEY_ROW>(row, i % 32), a.projected + (long long)token * FULL_STRIDE + head * 2 * HEAD_DIM + 8 * (i % 32));
    }
    if (active)
#pragma unroll 1
        for (int i = 0; i < ATTENTION_STAGES; ++i) {
            int key_tile = group + i * ATTENTION_GROUPS;
            if (key_tile < key_tiles) load_key_tile(layer, head_offset, key_tile * KEY_TILE, keys - 1, stages + i * KEY_STAGE);
            copy_commit();
        }
    else
        copy_commit();
    if (!active) copy_wait<0>();

    float out[HEAD_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0;
    float peak[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};
    int row = 16 * warp + lane / 4;
    int last_key[2] = {a.position + first_token + row / GROUP_QUERIES, a.position + first_token + (row + 8) / GROUP_QUERIES};
    if (active) copy_wait<ATTENTION_STAGES - 1>();
    worker_sync();  // the queries are there, loaded by all
    for (int key_tile = group, slot = 0; active && key_tile < key_tiles; key_tile += ATTENTION_GROUPS) {
        u32 stage = stages + slot * KEY_STAGE;
        copy_wait<ATTENTION_STAGES - 1>();
        group_barrier(1 + group, 128);
        float scores[KEY_TILE / 8][4] = {};
#pragma unroll 2
        for (int k = 0; k < HEAD_DIM / 16; ++k) {
            u32 q[4];
            load_matrix(q, queries + swizzled<KEY_ROW>(16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < KEY_TILE / 8; n += 2) {
                u32 b[4];
                load_matrix(b, stage + swizzled<KEY_ROW>(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                multiply16(scores[n], q, b[0], b[1]);
                multiply16(scores[n + 1], q, b[2], b[3]);
            }
        }
        constexpr float SCALE = 0.0625f * 1.44269504f;  // 1 / sqrt(HEAD_DIM), and exp2 in place of exp
        float highest[2] = {peak[0], peak[1]};
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int key = key_tile * KEY_TILE + 8 * n + 2 * (lane % 4) + i % 2;
                scores[n][i] = key <= last_key[i / 2] ? scores[n][i] * SCALE : -3e38f;
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
        u32 weights[KEY_TILE / 16][4];
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n) {
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
            for (int n = 0; n < HEAD_DIM / 8; ++n) out[n][0] *= shrink[0], out[n][1] *= shrink[0], out[n][2] *= shrink[1], out[n][3] *= shrink[1];
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 2)
#pragma unroll
            for (int k = 0; k < KEY_TILE / 16; ++k) {
                u32 b[4];
                load_matrix_transposed(b, stage + swizzled<KEY_ROW>(KEY_TILE + 16 * k + lane % 16, n + lane / 16));
                multiply16(out[n], weights[k], b[0], b[1]);
                multiply16(out[n + 1], weights[k], b[2], b[3]);
            }
        group_barrier(1 + group, 128);  // the stage is read
        int next = key_tile + ATTENTION_STAGES * ATTENTION_GROUPS;
        if (next < key_tiles) load_key_tile(layer, head_offset, next * KEY_TILE, keys - 1, stage);
        copy_commit();
        slot = slot + 1 < ATTENTION_STAGES ? slot + 1 : 0;
    }
    copy_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
        if (active && lane % 4 == 0) {
            peaks[group * QUERY_ROWS + row + 8 * i] = peak[i];
            peaks[(ATTENTION_GROUPS + group) * QUERY_ROWS + row + 8 * i] = sum[i];
        }
    }
    worker_sync();
    // Each group leaves its share of the result in its own stages, as [fragment][warp][lane] of four floats.
    float4* shares = (float4*)(memory + QUERY_ROWS * KEY_ROW);
    if (active) {
        float share[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float best = -1e30f, total = 0;
#pragma unroll
            for (int g = 0; g < ATTENTION_GROUPS; ++g) best = fmaxf(best, peaks[g * QUERY_ROWS + row + 8 * i]);
#pragma unroll
            for (int g = 0; g < ATTENTION_GROUPS; ++g)
                total += exp2_fast(peaks[g * QUERY_ROWS + row + 8 * i] - best) * peaks[(ATTENTION_GROUPS + g) * QUERY_ROWS + row + 8 * i];
            share[i] = __fdividef(exp2_fast(peak[i] - best), total);
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
            shares[group * (ATTENTION_GROUP / 16) + n * 128 + thread_index() % 128] =
                make_float4(out[n][0] * share[0], out[n][1] * share[0], out[n][2] * share[1], out[n][3] * share[1]);
    }
    worker_sync();
#pragma unroll 2
    for (int f = thread_index(); f < HEAD_DIM / 8 * 128; f += WORKERS) {
        float4 sum = shares[f];
#pragma unroll
        for (int g = 1; g < ATTENTION_GROUPS; ++g) {
            float4 p = shares[g * (ATTENTION_GROUP / 16) + f];
            sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
        }
        int dim = f / 128 * 8 + 2 * (f % 4), first_row = f % 128 / 32 * 16 + f % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int r = first_row + 8 * i, token = r / GROUP_QUERIES, head = kv_head * GROUP_QUERIES + r % GROUP_QUERIES;
            if (token < tokens) {
                u32 gate = *(const u32*)(a.projected + (long long)(first_token + token) * FULL_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + dim);
                *(u32*)input_place<QUERY_DIM>(a.mixed, first_token + token, head * HEAD_DIM + dim) =
                    pack2((i ? sum.z : sum.x) * quick_sigmoid(low_half(gate)), (i ? sum.w : sum.y) * quick_sigmoid(high_half(gate)));
            }
        }
    }
}

__device__ __forceinline__ void attend(const PrefillArguments& a, const FullLayer& layer, u8* memory) {
    int tiles = (a.tokens + TOKENS_A_TILE - 1) / TOKENS_A_TILE;
    // The last tokens have the most keys: they come first.
    for (int item = block_index(); item < tiles * KV_HEADS; item += gridDim.x)
        attend_tile(a, layer, item % KV_HEADS, tiles - 1 - item / KV_HEADS, memory);
}
