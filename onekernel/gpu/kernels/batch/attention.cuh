// Attention of every row over its own context. A warp takes an item: (row, kv head, split of the context), whose keys and
// values come through the ring of the weights, a stage of each for 32 positions, and are read once for all query heads of
// the kv head, on the tensor cores: scores are positions times heads, the output is dims times heads. The splits depend
// on the row's position alone, and are merged in their order, so that company changes nothing.
//
// A block takes items that follow each other. Other blocks may have written their keys and values, in steps before: the
// producer waits until the step's items are counted, behind the barrier that those writes are ahead of.
#pragma once

#include "batch/delta_rule.cuh"

constexpr int LEAST_BATCH_SPLIT = 32;  // positions
constexpr int MOST_BATCH_SPLITS = 256;
constexpr int POSITION_BYTES = 2 * HEAD_DIM, CHUNK_POSITIONS = STAGE_BYTES / POSITION_BYTES, HALF_CHUNK = 16;
constexpr int DIM_TILES = HEAD_DIM / 32;
static_assert(CHUNK_POSITIONS == 2 * HALF_CHUNK && LEAST_BATCH_SPLIT % CHUNK_POSITIONS == 0, "16 positions are multiplied at a time");
static_assert(GROUP_HEADS <= 8, "the columns of a product are query heads");

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

// Of place i = 32 t + 16 q + 8 r + j: the fragments of the products with values, whose rows are dims in this order.
__device__ __forceinline__ int partial_dim(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i / 16 % 2 * 4 + i / 8 % 2 * 2 + i % 2; }

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

// This block's items of all.
__device__ __forceinline__ int item_begin(int items, int block) { return (int)((long long)items * block / BLOCKS); }

// An item, and the way to the next.
struct AttentionItem {
    const Rows& rows;
    const int* first_item;
    int last_row, n, kv_head, split, count, length, position;

    __device__ __forceinline__ AttentionItem(const BatchArguments& a, const Rows& rows, const int* first_item, int item)
        : rows(rows), first_item(first_item), last_row(a.rows - 1), n(0) {
        int end = a.rows;  // the last row that begins here or before
#pragma unroll 1
        while (end - n > 1) {
            int middle = (n + end) / 2;
            if (first_item[middle] <= item) n = middle;
            else end = middle;
        }
        enter_row();
        int own = item - first_item[n];
        kv_head = own / count, split = own % count;
    }
    __device__ __forceinline__ void enter_row() {
        position = rows.position[n];
        Splits splits = batch_splits(position);
        count = splits.count, length = splits.length, kv_head = split = 0;
    }
    __device__ __forceinline__ void advance() {
        if (++split < count) return;
        split = 0;
        if (++kv_head < KV_HEADS) return;
        do ++n;
        while (n < last_row && first_item[n + 1] == first_item[n]);
        if (n <= last_row) enter_row();
    }
    __device__ __forceinline__ int begin() const { return split * length; }
    __device__ __forceinline__ int end() const { return min(begin() + length, position + 1); }
    __device__ __forceinline__ int chunks() const { return (end() - begin() + CHUNK_POSITIONS - 1) / CHUNK_POSITIONS; }
    __device__ __forceinline__ u16* keys(int layer) const {
        return keys_of(rows.state[n], layer, rows.max_context[n]) + (long long)kv_head * rows.max_context[n] * HEAD_DIM;
    }
    // From keys to values.
    __device__ __forceinline__ long long distance() const { return (long long)KV_DIM * rows.max_context[n]; }
};

// What a warp keeps in shared memory: queries after norm and RoPE.
struct WarpAttention {
    uint4 queries[GROUP_HEADS][32];
};

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

// Queries into shared memory, two heads at a time, and behind the last split the new key and value into the cache and
// `fresh`.
__device__ __forceinline__ void prepare_heads(const Consumer& c, const BatchArguments& a, WarpAttention& shared, const AttentionItem& item, int layer, bool is_last, uint4 (&fresh)[2]) {
    constexpr float SCALE = 1.4426950408889634f * 0.0625f;  // exp2 in place of exp, 1 / sqrt(HEAD_DIM)
    static_assert(GROUP_HEADS % 2 == 0, "the key and the value are a pair");
    const float* projected = a.projected + (long long)item.n * PROJECTED_STRIDE + DIMS * c.lane;
    const float* norm = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    NormAndRope constants = fetch_norm_and_rope(norm, a.rope + (long long)item.position * (ROTARY_DIM / 2), c.lane);
#pragma unroll 1
    for (int i = 0; i < (is_last ? GROUP_HEADS + 2 : GROUP_HEADS); i += 2) {
        bool is_query = i < GROUP_HEADS;
        float x[2][DIMS];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float* head = projected + (is_query ? (item.kv_head * GROUP_HEADS + i + j) * 2 * HEAD_DIM : 2 * QUERY_DIM + j * KV_DIM + item.kv_head * HEAD_DIM);
            float4 v[2] = {load_l2_float4(head), load_l2_float4(head + 4)};
            x[j][0] = v[0].x, x[j][1] = v[0].y, x[j][2] = v[0].z, x[j][3] = v[0].w;
            x[j][4] = v[1].x, x[j][5] = v[1].y, x[j][6] = v[1].z, x[j][7] = v[1].w;
        }
        if (!is_query)
#pragma unroll
            for (int d = 0; d < DIMS; ++d) constants.weight[d] = load_constant(norm + HEAD_DIM + c.lane * DIMS + d);
        norm_and_turn(x[0], constants, c.lane);
        if (is_query) {
            norm_and_turn(x[1], constants, c.lane);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int d = 0; d < DIMS; ++d) x[j][d] *= SCALE;
                shared.queries[i + j][c.lane] = pack8(x[j]);
            }
        } else {
            u16* to = item.keys(layer) + (long long)item.position * HEAD_DIM + DIMS * c.lane;
            fresh[0] = pack8(x[0]), fresh[1] = pack8(x[1]);
            *(uint4*)to = fresh[0];
            *(uint4*)(to + item.distance()) = fresh[1];
        }
    }
    __syncwarp();
}

// One item, whose stages begin at c.next.
__device__ __forceinline__ void attend_item(Consumer& c, const BatchArguments& a, WarpAttention& shared, const AttentionItem& item, int layer) {
    int end = item.end();
    bool is_last = end == item.position + 1;
    uint4 fresh[2];
    prepare_heads(c, a, shared, item, layer, is_last, fresh);
    const uint4* query = shared.queries[min(c.lane / 4, GROUP_HEADS - 1)] + c.lane % 4;

    // Lane l speaks for heads 2 (l % 4) and the next, and for positions l / 4 and l / 4 + 8, or as many dims.
    float out[DIM_TILES][2][4] = {}, peak[2] = {-1e30f, -1e30f}, total[2] = {0, 0};
#pragma unroll 1
    for (int first = item.begin(); first < end; first += CHUNK_POSITIONS) {
        int count = min(CHUNK_POSITIONS, end - first);
        u8* stages[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            await_stage(c, c.next.stage);
            stages[i] = c.ring.slots + c.next.slot * STAGE_BYTES;
            advance_ring(c.next, 1);
        }
        if (is_last && first + count == end) {  // the position of this step's token: what came of it is old
#pragma unroll
            for (int i = 0; i < 2; ++i) ((uint4*)(stages[i] + (count - 1) * POSITION_BYTES))[c.lane] = fresh[i];
            __syncwarp();
        }
#pragma unroll 1
        for (int start = 0; start < count; start += HALF_CHUNK) {
            int rows[2] = {min(start + c.lane / 4, count - 1) * POSITION_BYTES + c.lane % 4 * 16, min(start + 8 + c.lane / 4, count - 1) * POSITION_BYTES + c.lane % 4 * 16};
            float even[4] = {}, scores[4] = {};
#pragma unroll 4
            for (int t = 0; t < DIM_TILES; ++t) {
                uint4 low = *(const uint4*)(stages[0] + rows[0] + 64 * t), high = *(const uint4*)(stages[0] + rows[1] + 64 * t), v = query[4 * t];
                const u32 first_half[4] = {low.x, high.x, low.y, high.y}, second_half[4] = {low.z, high.z, low.w, high.w};
                multiply16(even, first_half, v.x, v.y);
                multiply16(scores, second_half, v.z, v.w);
            }
            float shrink[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                scores[i] = start + c.lane / 4 < count ? scores[i] + even[i] : -1e30f;
                scores[2 + i] = start + 8 + c.lane / 4 < count ? scores[2 + i] + even[2 + i] : -1e30f;
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
#pragma unroll
            for (int t = 0; t < DIM_TILES; ++t) {
                uint4 v = *(const uint4*)(stages[1] + rows[0] + 64 * t), w = *(const uint4*)(stages[1] + rows[1] + 64 * t);
                const u32 low[4] = {v.x, v.y, v.z, v.w}, high[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    float(&o)[4] = out[t][p];
                    o[0] *= shrink[0], o[1] *= shrink[1], o[2] *= shrink[0], o[3] *= shrink[1];
                    const u32 dims[4] = {transpose8(low[2 * p]), transpose8(low[2 * p + 1]), transpose8(high[2 * p]), transpose8(high[2 * p + 1])};
                    multiply16(o, dims, weights[0], weights[1]);
                }
            }
        }
        if (is_last) fence_async();  // a bulk copy comes where `fresh` was written
        release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) total[i] += __shfl_xor_sync(0xFFFFFFFFu, total[i], offset);
    }
    if (c.lane % 4 * 2 >= GROUP_HEADS) return;
    float* to = partial_place(a, item.n, item.kv_head * GROUP_HEADS + c.lane % 4 * 2, item.split) + c.lane / 4;
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

// All items of this block, one after the other to the warps in turn.
__device__ __forceinline__ void attend_rows(Consumer& c, const BatchArguments& a, const Rows& rows, const int* first_item, WarpAttention* shared, int layer) {
    int items = first_item[a.rows], first = item_begin(items, c.block), end = item_begin(items, c.block + 1);
    if (first == end) return;
    RingPosition at = c.next;
    AttentionItem item(a, rows, first_item, first);
#pragma unroll 1
    for (int i = first; i < end; ++i, item.advance()) {
        if ((i - first) % CONSUMER_WARPS == c.warp) {
            release_stage(c.ring, at.stage - 1, c.warp, c.lane);  // those of the others' items
            c.next = at;
            attend_item(c, a, shared[c.warp], item, layer);
            __syncwarp();
        }
        advance_ring(at, 2 * item.chunks());
    }
    release_stage(c.ring, at.stage - 1, c.warp, c.lane);
    await_stage(c, at.stage - 1);
    c.next = at;
}

// Merges the splits of (row, head, half of its dims), applies the output gate.
__device__ __forceinline__ void merge_rows(Consumer& c, const BatchArguments& a, const Rows& rows) {
    constexpr int HALVES = HEAD_DIM / 128;
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < a.rows * HEADS * HALVES; item += BLOCKS * CONSUMER_WARPS) {
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
        *(u32*)operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + dim) = pack2(o.x * inverse * quick_sigmoid(gate.x), o.y * inverse * quick_sigmoid(gate.y));
        *(u32*)operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + dim + 8) = pack2(o.z * inverse * quick_sigmoid(gate.z), o.w * inverse * quick_sigmoid(gate.w));
    }
}
