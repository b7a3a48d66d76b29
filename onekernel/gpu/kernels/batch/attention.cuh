// Attention of every row over its own context. A warp takes one item: (row, kv head, split of the context), with one read
// of the keys and values for all query heads of the kv head, on the tensor cores: scores are positions times heads, the
// output is dims times heads. The splits depend on the row's position alone, and are merged
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

// Where the result of a split stands: HEAD_DIM sums in the order of `partial_dim`, their weights' maximum and total.
__device__ __forceinline__ float* partial_place(const BatchArguments& a, int n, int head, int split) {
    return a.partial + (((long long)n * HEADS + head) * a.most_splits + split) * PARTIAL_STRIDE;
}
// Of place i = 32 t + 16 q + 8 r + j: the fragments of the products with V, whose rows are dims in this order.
__device__ __forceinline__ int partial_dim(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i / 16 % 2 * 4 + i / 8 % 2 * 2 + i % 2; }

// Dims 8 l to 8 l + 7 of a projected head.
__device__ __forceinline__ void load_head(float (&x)[DIMS], const float* head, int lane) {
    float4 v[2] = {load_l2_float4(head + DIMS * lane), load_l2_float4(head + DIMS * lane + 4)};
    x[0] = v[0].x, x[1] = v[0].y, x[2] = v[0].z, x[3] = v[0].w;
    x[4] = v[1].x, x[5] = v[1].y, x[6] = v[1].z, x[7] = v[1].w;
}

// Norm and RoPE of one head, as norm_and_rope.
__device__ __forceinline__ void norm_and_turn(float (&x)[DIMS], const NormAndRope& constants, int lane) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < DIMS; ++i) squares = fmaf(x[i], x[i], squares);
    float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + NORM_EPS);
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
        x[i] = __fmul_rn(x[i], __fmul_rn(scale, constants.weight[i]));
        float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], HALF_LANES);
        float2 r = constants.turn[i];
        float turned = fmaf(other, lane < HALF_LANES ? -r.y : r.y, x[i] * r.x);
        if (lane < 2 * HALF_LANES) x[i] = turned;
    }
}

// What a warp keeps in shared memory: queries after norm and RoPE.
struct WarpAttention {
    uint4 queries[GROUP_HEADS][32];
};

constexpr int BLOCK_POSITIONS = 16;                // multiplied at a time
constexpr int DIM_TILES = HEAD_DIM / 32, HALF_TILES = DIM_TILES / 2;
static_assert(LEAST_BATCH_SPLIT % BLOCK_POSITIONS == 0 && GROUP_HEADS <= 8, "the columns of a product are query heads");

// Half of the dims of 16 positions; lane l has positions l / 4 and l / 4 + 8, of each tile of 32 dims 8 (l % 4) and up.
struct PositionTiles {
    uint4 low[HALF_TILES], high[HALF_TILES];

    // Of `cache`, keys or values, up to position `last`.
    __device__ __forceinline__ void load(const u16* cache, int first, int last, int half, int lane) {
        const u16* at = cache + half * 32 * HALF_TILES + 8 * (lane % 4);
        const u16* row[2] = {at + (long long)min(first + lane / 4, last) * HEAD_DIM, at + (long long)min(first + 8 + lane / 4, last) * HEAD_DIM};
#pragma unroll
        for (int t = 0; t < HALF_TILES; ++t) low[t] = load_l2(row[0] + 32 * t), high[t] = load_l2(row[1] + 32 * t);
    }
};

__device__ __forceinline__ void attend_split(Consumer& c, const BatchArguments& a, const Rows& rows, WarpAttention& shared, int layer, int n, int kv_head, int split) {
    constexpr float SCALE = 1.4426950408889634f * 0.0625f;  // exp2 in place of exp, 1 / sqrt(HEAD_DIM)
    int position = rows.position[n], max_context = rows.max_context[n];
    Splits splits = batch_splits(position);
    int begin = split * splits.length, end = min(begin + splits.length, position + 1);
    u16* keys = keys_of(rows.state[n], layer, max_context) + (long long)kv_head * max_context * HEAD_DIM;
    u16* values = keys + (long long)KV_DIM * max_context;
    PositionTiles lower, upper;
    lower.load(keys, begin, end - 1, 0, c.lane);
    upper.load(keys, begin, end - 1, 1, c.lane);

    // The queries, and in the last split the new key and value.
    const float* projected = a.projected + (long long)n * PROJECTED_STRIDE;
    bool is_last = end == position + 1;
    const float* norm = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    NormAndRope constants = fetch_norm_and_rope(norm, a.rope + (long long)position * (ROTARY_DIM / 2), c.lane);
    float key_norm[DIMS], next[DIMS];
#pragma unroll
    for (int d = 0; d < DIMS; ++d) key_norm[d] = load_constant(norm + HEAD_DIM + c.lane * DIMS + d);
    auto place = [&](int i) { return projected + (i < GROUP_HEADS ? (kv_head * GROUP_HEADS + i) * 2 * HEAD_DIM : 2 * QUERY_DIM + (i - GROUP_HEADS) * KV_DIM + kv_head * HEAD_DIM); };
    load_head(next, place(0), c.lane);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < (is_last ? GROUP_HEADS + 2 : GROUP_HEADS); ++i) {
        float x[DIMS];
#pragma unroll
        for (int d = 0; d < DIMS; ++d) x[d] = next[d];
        load_head(next, place(min(i + 1, GROUP_HEADS + 1)), c.lane);
        if (i == GROUP_HEADS)
#pragma unroll
            for (int d = 0; d < DIMS; ++d) constants.weight[d] = key_norm[d];
        if (i <= GROUP_HEADS) norm_and_turn(x, constants, c.lane);
        float scale = i < GROUP_HEADS ? SCALE : 1.0f;
#pragma unroll
        for (int d = 0; d < DIMS; ++d) x[d] *= scale;
        uint4 packed = pack8(x);
        if (i < GROUP_HEADS)
            shared.queries[i][c.lane] = packed;
        else
            *(uint4*)((i == GROUP_HEADS ? keys : values) + (long long)position * HEAD_DIM + c.lane * DIMS) = packed;
    }
    __syncwarp();
    if (is_last && begin + BLOCK_POSITIONS > position) {  // the new key is among those that were loaded too early
        lower.load(keys, begin, end - 1, 0, c.lane);
        upper.load(keys, begin, end - 1, 1, c.lane);
    }
    const uint4* query = shared.queries[min(c.lane / 4, GROUP_HEADS - 1)] + c.lane % 4;

    // Lane l speaks for heads 2 (l % 4) and the next, and for positions l / 4 and l / 4 + 8, or as many dims.
    float out[DIM_TILES][2][4], peak[2] = {-1e30f, -1e30f}, total[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < DIM_TILES; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][0][i] = out[t][1][i] = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += BLOCK_POSITIONS) {
        float scores[4] = {};
        auto score = [&](const PositionTiles& k, int half) {
#pragma unroll
            for (int t = 0; t < HALF_TILES; ++t) {
                uint4 low = k.low[t], high = k.high[t], v = query[4 * (half * HALF_TILES + t)];
                const u32 first_half[4] = {low.x, high.x, low.y, high.y}, second_half[4] = {low.z, high.z, low.w, high.w};
                multiply16(scores, first_half, v.x, v.y);
                multiply16(scores, second_half, v.z, v.w);
            }
        };
        score(lower, 0);
        lower.load(values, first, end - 1, 0, c.lane);
        score(upper, 1);
        upper.load(values, first, end - 1, 1, c.lane);
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (first + c.lane / 4 >= end) scores[i] = -1e30f;
            if (first + 8 + c.lane / 4 >= end) scores[2 + i] = -1e30f;
            float best = fmaxf(peak[i], fmaxf(scores[i], scores[2 + i]));
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) best = fmaxf(best, __shfl_xor_sync(0xFFFFFFFFu, best, offset));
            shrink[i] = exp2_fast(peak[i] - best);
            peak[i] = best;
            scores[i] = exp2_fast(scores[i] - best);
            scores[2 + i] = exp2_fast(scores[2 + i] - best);
            total[i] = fmaf(total[i], shrink[i], scores[i]) + scores[2 + i];
        }
        u32 weights[2] = {transpose8(pack2(scores[0], scores[1])), transpose8(pack2(scores[2], scores[3]))};
        auto add = [&](const PositionTiles& v, int half) {
#pragma unroll
            for (int t = 0; t < HALF_TILES; ++t) {
                const u32 low[4] = {v.low[t].x, v.low[t].y, v.low[t].z, v.low[t].w}, high[4] = {v.high[t].x, v.high[t].y, v.high[t].z, v.high[t].w};
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    float(&o)[4] = out[half * HALF_TILES + t][p];
                    o[0] *= shrink[0], o[1] *= shrink[1], o[2] *= shrink[0], o[3] *= shrink[1];
                    const u32 dims[4] = {transpose8(low[2 * p]), transpose8(low[2 * p + 1]), transpose8(high[2 * p]), transpose8(high[2 * p + 1])};
                    multiply16(o, dims, weights[0], weights[1]);
                }
            }
        };
        int next = first + BLOCK_POSITIONS;
        add(lower, 0);
        lower.load(keys, next, end - 1, 0, c.lane);
        add(upper, 1);
        upper.load(keys, next, end - 1, 1, c.lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) total[i] += __shfl_xor_sync(0xFFFFFFFFu, total[i], offset);
    }
    if (c.lane % 4 * 2 >= GROUP_HEADS) return;
    float* to = partial_place(a, n, kv_head * GROUP_HEADS + c.lane % 4 * 2, split) + c.lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (c.lane % 4 * 2 + i >= GROUP_HEADS) break;
        if (c.lane < 4) *(float2*)(to + HEAD_DIM) = make_float2(peak[i], total[i]);
#pragma unroll
        for (int t = 0; t < DIM_TILES; ++t)
#pragma unroll
            for (int p = 0; p < 4; ++p) to[32 * t + 8 * p] = out[t][p / 2][p % 2 * 2 + i];
        to += (long long)a.most_splits * PARTIAL_STRIDE;
    }
}

// By one warp: the first item of each row, and how many items there are.
__device__ __forceinline__ void count_items(const Consumer& c, const BatchArguments& a, const Rows& rows, int* first_item) {
    int total = 0;
#pragma unroll 1
    for (int n = c.lane; n - c.lane < a.rows; n += 32) {
        int count = n < a.rows && rows.kind[n] ? KV_HEADS * batch_splits(rows.position[n]).count : 0, sum = count;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            int other = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
            if (c.lane >= offset) sum += other;
        }
        if (n < a.rows) first_item[n] = total + sum - count;
        total += __shfl_sync(0xFFFFFFFFu, sum, 31);
    }
    if (c.lane == 0) first_item[a.rows] = total;
}

struct AttentionItem {
    int n, kv_head, split;

    __device__ __forceinline__ AttentionItem(const BatchArguments& a, const int* first_item, int item) : n(0) {
        int end = a.rows;  // the last row that begins here or before
#pragma unroll 1
        while (end - n > 1) {
            int middle = (n + end) / 2;
            if (first_item[middle] <= item) n = middle;
            else end = middle;
        }
        int count = (first_item[n + 1] - first_item[n]) / KV_HEADS, own = item - first_item[n];
        kv_head = own / count, split = own % count;
    }
};

// Asks for the keys and values of each warp's first item: they do not depend on this step, and can come ahead of the barrier.
__device__ __forceinline__ void prefetch_cache(const Consumer& c, const BatchArguments& a, const Rows& rows, const int* first_item, int layer) {
    int item = c.block + BLOCKS * c.warp;
    if (item >= first_item[a.rows]) return;
    AttentionItem own(a, first_item, item);
    int position = rows.position[own.n], max_context = rows.max_context[own.n], length = batch_splits(position).length, begin = own.split * length;
    int lines = min(min(length, LEAST_BATCH_SPLIT), position - begin) * (HEAD_DIM / 64);
    const u16* keys = keys_of(rows.state[own.n], layer, max_context) + ((long long)own.kv_head * max_context + begin) * HEAD_DIM;
#pragma unroll 1
    for (int i = c.lane; i < lines; i += 32) prefetch_l2(keys + 64 * i), prefetch_l2(keys + (long long)KV_DIM * max_context + 64 * i);
}

__device__ __forceinline__ void attend_rows(Consumer& c, const BatchArguments& a, const Rows& rows, const int* first_item, WarpAttention* shared, int layer) {
    int items = first_item[a.rows];
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < items; item += WARPS) {
        AttentionItem own(a, first_item, item);
        attend_split(c, a, rows, shared[c.warp], layer, own.n, own.kv_head, own.split);
    }
}

// Merges the splits of (row, head, half of its dims), applies the output gate.
__device__ __forceinline__ void merge_rows(Consumer& c, const BatchArguments& a, const Rows& rows) {
    constexpr int HALVES = HEAD_DIM / 128;
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < a.rows * HEADS * HALVES; item += WARPS) {
        int n = item / (HEADS * HALVES), head = item / HALVES % HEADS, place = item % HALVES * 128 + 4 * c.lane;
        if (!rows.kind[n]) continue;
        int count = batch_splits(rows.position[n]).count;
        int dim = partial_dim(place);  // and the next, then those 8 dims on
        const float* gates = a.projected + (long long)n * PROJECTED_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + dim;
        float4 gate = make_float4(load_l2_float(gates), load_l2_float(gates + 1), load_l2_float(gates + 8), load_l2_float(gates + 9));
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
            total = fmaf(total, scale, warp_sum(__fmul_rn(weight, own_total)));
            o = make_float4(o.x * scale, o.y * scale, o.z * scale, o.w * scale);
            int end = min(32, count - first);
            const float* parts = partial_place(a, n, head, first) + place;
#pragma unroll 4
            for (int i = 0; i < end; ++i, parts += PARTIAL_STRIDE) {
                float4 part = load_l2_float4(parts);
                float w = __shfl_sync(0xFFFFFFFFu, weight, i);
                o = make_float4(fmaf(w, part.x, o.x), fmaf(w, part.y, o.y), fmaf(w, part.z, o.z), fmaf(w, part.w, o.w));
            }
        }
        float inverse = 1.0f / total;
        u16* to = operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + dim);
        *(u32*)to = pack2(o.x * inverse * quick_sigmoid(gate.x), o.y * inverse * quick_sigmoid(gate.y));
        *(u32*)(to + 8) = pack2(o.z * inverse * quick_sigmoid(gate.z), o.w * inverse * quick_sigmoid(gate.w));
    }
}
