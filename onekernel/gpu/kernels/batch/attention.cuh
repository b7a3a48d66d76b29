// Attention of every row over its own context. A warp takes one item: (row, kv head, split of the context), with one read
// of the keys and values for all query heads of the kv head. The splits depend on the row's position alone, and are merged
// in their order, so that company changes nothing.
#pragma once

#include "batch/model.cuh"

constexpr int LEAST_BATCH_SPLIT = 32;   // positions
constexpr int MOST_BATCH_SPLITS = 256;
constexpr int WARPS = BLOCKS * CONSUMER_WARPS;

__device__ __forceinline__ Splits batch_splits(int position) {
    int tokens = position + 1;
    int length = (tokens + MOST_BATCH_SPLITS - 1) / MOST_BATCH_SPLITS;
    length = (length + LEAST_BATCH_SPLIT - 1) / LEAST_BATCH_SPLIT * LEAST_BATCH_SPLIT;
    return {(tokens + length - 1) / length, length};
}

// Where the result of a split stands: HEAD_DIM sums, their weights' maximum and total.
__device__ __forceinline__ float* partial_place(const BatchArguments& a, int n, int head, int split) {
    return a.partial + (((long long)n * HEADS + head) * a.most_splits + split) * PARTIAL_STRIDE;
}

// Dims 8 l to 8 l + 7 of a projected head.
__device__ __forceinline__ void load_head(float (&x)[DIMS], const float* head, int lane) {
    float4 v[2] = {load_l2_float4(head + DIMS * lane), load_l2_float4(head + DIMS * lane + 4)};
    x[0] = v[0].x, x[1] = v[0].y, x[2] = v[0].z, x[3] = v[0].w;
    x[4] = v[1].x, x[5] = v[1].y, x[6] = v[1].z, x[7] = v[1].w;
}

__device__ __forceinline__ void attend_split(Consumer& c, const BatchArguments& a, const Rows& rows, int layer, int n, int kv_head, int split) {
    constexpr float LOG2E = 1.4426950408889634f;
    int position = rows.position[n], max_context = rows.max_context[n];
    Splits splits = batch_splits(position);
    int begin = split * splits.length, end = min(begin + splits.length, position + 1);
    u16* keys = keys_of(rows.state[n], layer, max_context) + (long long)kv_head * max_context * HEAD_DIM;
    u16* values = keys + (long long)KV_DIM * max_context;
    uint4 k[AT_ONCE], v[AT_ONCE];
    auto fetch = [&](uint4 (&to)[AT_ONCE], const u16* from, int first) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) to[i] = load_l2(from + (long long)min(first + i, end - 1) * HEAD_DIM + c.lane * DIMS);
    };
    fetch(k, keys, begin);
    fetch(v, values, begin);

    const float* q_norm = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    const float* projected = a.projected + (long long)n * PROJECTED_STRIDE;
    const float2* rope = a.rope + (long long)position * (ROTARY_DIM / 2);
    float q[GROUP_HEADS][DIMS], o[GROUP_HEADS][DIMS];
    NormAndRope constants = fetch_norm_and_rope(q_norm, rope, c.lane);
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head) {
        load_head(q[head], projected + (kv_head * GROUP_HEADS + head) * 2 * HEAD_DIM, c.lane);
        norm_and_rope(q[head], constants, c.lane);
#pragma unroll
        for (int i = 0; i < DIMS; ++i) q[head][i] *= LOG2E * 0.0625f, o[head][i] = 0;
    }
    uint4 new_key = make_uint4(0, 0, 0, 0), new_value = new_key;
    if (end == position + 1) {  // what stands at `position` in the cache is not used
        float x[DIMS];
        constants = fetch_norm_and_rope(q_norm + HEAD_DIM, rope, c.lane);
        load_head(x, projected + 2 * QUERY_DIM + kv_head * HEAD_DIM, c.lane);
        norm_and_rope(x, constants, c.lane);
        new_key = pack8(x);
        load_head(x, projected + 2 * QUERY_DIM + KV_DIM + kv_head * HEAD_DIM, c.lane);
        new_value = pack8(x);
        *(uint4*)(keys + (long long)position * HEAD_DIM + c.lane * DIMS) = new_key;
        *(uint4*)(values + (long long)position * HEAD_DIM + c.lane * DIMS) = new_value;
    }

    // In the scattered form, lane l speaks for position l / LANES_PER_POSITION of those at once, and for one head.
    constexpr int SCORES = AT_ONCE * PADDED_HEADS;
    constexpr int LANES_PER_SCORE = 32 / SCORES, LANES_PER_POSITION = 32 / AT_ONCE;
    float peak = -1e30f, total = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += AT_ONCE) {
        float scores[SCORES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (first + i == position) k[i] = new_key, v[i] = new_value;
            float key[DIMS];
            unpack8(key, k[i]);
#pragma unroll
            for (int head = 0; head < PADDED_HEADS; ++head) {
                float sum = 0;
                if (head < GROUP_HEADS)
#pragma unroll
                    for (int d = 0; d < DIMS; ++d) sum += q[head < GROUP_HEADS ? head : 0][d] * key[d];
                scores[i * PADDED_HEADS + head] = sum;
            }
        }
        fetch(k, keys, first + AT_ONCE);
        float score = warp_sum_scatter(scores, c.lane);
        bool inside = first + c.lane / LANES_PER_POSITION < end;
        float best = inside ? score : -1e30f;
#pragma unroll
        for (int offset = LANES_PER_POSITION; offset < 32; offset *= 2) best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, offset));
        float new_peak = fmaxf(peak, best);
        float scale = exp2_fast(peak - new_peak), weight = inside ? exp2_fast(score - new_peak) : 0.0f;
        peak = new_peak;
        total = total * scale + weight;
#pragma unroll
        for (int head = 0; head < GROUP_HEADS; ++head) {
            float s = __shfl_sync(0xFFFFFFFFu, scale, head * LANES_PER_SCORE);
#pragma unroll
            for (int d = 0; d < DIMS; ++d) o[head][d] *= s;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            float x[DIMS];
            unpack8(x, v[i]);
#pragma unroll
            for (int head = 0; head < GROUP_HEADS; ++head) {
                float p = __shfl_sync(0xFFFFFFFFu, weight, i * LANES_PER_POSITION + head * LANES_PER_SCORE);
#pragma unroll
                for (int d = 0; d < DIMS; ++d) o[head][d] += p * x[d];
            }
        }
        fetch(v, values, first + AT_ONCE);
    }
#pragma unroll
    for (int offset = LANES_PER_POSITION; offset < 32; offset *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
    int my_head = c.lane / LANES_PER_SCORE;
    if (c.lane < LANES_PER_POSITION && c.lane % LANES_PER_SCORE == 0 && my_head < GROUP_HEADS)
        *(float2*)(partial_place(a, n, kv_head * GROUP_HEADS + my_head, split) + HEAD_DIM) = make_float2(peak, total);
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head) {
        float4* to = (float4*)(partial_place(a, n, kv_head * GROUP_HEADS + head, split) + DIMS * c.lane);
        to[0] = make_float4(o[head][0], o[head][1], o[head][2], o[head][3]);
        to[1] = make_float4(o[head][4], o[head][5], o[head][6], o[head][7]);
    }
}

__device__ __forceinline__ void attend_rows(Consumer& c, const BatchArguments& a, const Rows& rows, int layer) {
    int item = c.block + BLOCKS * c.warp, first = 0;
#pragma unroll 1
    for (int n = 0; n < a.rows; ++n) {
        if (!rows.kind[n]) continue;
        int count = batch_splits(rows.position[n]).count;
#pragma unroll 1
        for (; item < first + KV_HEADS * count; item += WARPS) attend_split(c, a, rows, layer, n, (item - first) / count, (item - first) % count);
        first += KV_HEADS * count;
    }
}

// Merges the splits of (row, head, half of its dims), applies the output gate.
__device__ __forceinline__ void merge_rows(Consumer& c, const BatchArguments& a, const Rows& rows) {
    constexpr int HALVES = HEAD_DIM / 128;
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < a.rows * HEADS * HALVES; item += WARPS) {
        int n = item / (HEADS * HALVES), head = item / HALVES % HEADS, dim = item % HALVES * 128 + 4 * c.lane;
        if (!rows.kind[n]) continue;
        int count = batch_splits(rows.position[n]).count;
        float4 gate = load_l2_float4(a.projected + (long long)n * PROJECTED_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + dim);
        float4 o = make_float4(0, 0, 0, 0);
        float peak = -1e30f, total = 0;
#pragma unroll 1
        for (int first = 0; first < count; first += 32) {
            bool valid = first + c.lane < count;
            float own_peak = -1e30f, own_total = 0;
            if (valid) {
                const float* at = partial_place(a, n, head, first + c.lane) + HEAD_DIM;
                own_peak = load_l2_float(at), own_total = load_l2_float(at + 1);
            }
            float new_peak = fmaxf(peak, warp_max(own_peak)), scale = exp2_fast(peak - new_peak);
            float weight = valid ? exp2_fast(own_peak - new_peak) : 0.0f;
            peak = new_peak;
            total = total * scale + warp_sum(weight * own_total);
            o = make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale);
            int end = min(32, count - first);
#pragma unroll 4
            for (int i = 0; i < end; ++i) {
                float4 part = load_l2_float4(partial_place(a, n, head, first + i) + dim);
                float w = __shfl_sync(0xFFFFFFFFu, weight, i);
                o.x += w * part.x, o.y += w * part.y, o.z += w * part.z, o.w += w * part.w;
            }
        }
        float inverse = 1.0f / total;
        *(uint2*)operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + dim) =
            make_uint2(pack2(o.x * inverse * sigmoid(gate.x), o.y * inverse * sigmoid(gate.y)), pack2(o.z * inverse * sigmoid(gate.z), o.w * inverse * sigmoid(gate.w)));
    }
}
