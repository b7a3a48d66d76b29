// Attention of every row over its own context. An item is (row, kv head, split of the context); its keys and values come
// through the ring of the weights, a stage of each for 32 positions, and are read once for all query heads of the kv
// head. The splits depend on the row's position alone, and are merged in their order, so that company changes nothing.
//
// A block takes items that follow each other. Other blocks may have written their keys and values, in steps before: the
// producer waits until the step's items are counted, behind the barrier that those writes are ahead of.
#pragma once

#include "batch/delta_rule.cuh"

constexpr int LEAST_BATCH_SPLIT = 32;  // positions
constexpr int MOST_BATCH_SPLITS = 256;
constexpr int CHUNK_POSITIONS = STAGE_BYTES / (2 * HEAD_DIM), WARP_POSITIONS = CHUNK_POSITIONS / CONSUMER_WARPS;
static_assert(CHUNK_POSITIONS == 32 && LEAST_BATCH_SPLIT % CHUNK_POSITIONS == 0, "a lane speaks for a position");

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

struct AttentionItem {
    int n, kv_head, split, begin, end;  // positions `begin` to `end` of row n
    bool is_last;                       // of the row's splits: position end - 1 is that of this step's token

    __device__ __forceinline__ AttentionItem(const BatchArguments& a, const Rows& rows, const int* first_item, int item) : n(0) {
        int last = a.rows;  // the last row that begins here or before
#pragma unroll 1
        while (last - n > 1) {
            int middle = (n + last) / 2;
            if (first_item[middle] <= item) n = middle;
            else last = middle;
        }
        int count = (first_item[n + 1] - first_item[n]) / KV_HEADS, own = item - first_item[n], position = rows.position[n];
        int length = batch_splits(position).length;
        kv_head = own / count, split = own % count;
        begin = split * length, end = min(begin + length, position + 1), is_last = end == position + 1;
    }
    __device__ __forceinline__ u16* keys(const Rows& rows, int layer) const {
        return keys_of(rows.state[n], layer, rows.max_context[n]) + (long long)kv_head * rows.max_context[n] * HEAD_DIM;
    }
    // From keys to values.
    __device__ __forceinline__ long long distance(const Rows& rows) const { return (long long)KV_DIM * rows.max_context[n]; }
};

struct BatchAttention {
    float queries[GROUP_HEADS][HEAD_DIM];                                  // after norm and RoPE, scaled
    alignas(16) uint4 fresh[2][2][HEAD_DIM / 8];                           // of items in turn: this step's key and value
    alignas(16) float scores[2][CHUNK_POSITIONS][PADDED_HEADS];            // of chunks in turn
    alignas(16) float weights[CONSUMER_WARPS][CHUNK_POSITIONS][PADDED_HEADS];
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

// A warp a head: the queries of a kv head, and behind the last split the new key and value, for the cache and for now.
__device__ __forceinline__ void prepare_heads(const Consumer& c, const BatchArguments& a, const Rows& rows, BatchAttention& shared, const AttentionItem& item, int layer, int turn) {
    constexpr float SCALE = 1.4426950408889634f * 0.0625f;  // exp2 in place of exp, 1 / sqrt(HEAD_DIM)
    int position = rows.position[item.n];
    bool is_query = c.warp < GROUP_HEADS, is_key = c.warp == CONSUMER_WARPS - 1, is_value = c.warp == CONSUMER_WARPS - 2;
    if (!is_query && !(item.is_last && (is_key || is_value))) return;
    int at = is_query ? (item.kv_head * GROUP_HEADS + c.warp) * 2 * HEAD_DIM : 2 * QUERY_DIM + (is_value ? KV_DIM : 0) + item.kv_head * HEAD_DIM;
    const float* head = a.projected + (long long)item.n * PROJECTED_STRIDE + at + DIMS * c.lane;
    const float* norm = layer_parameters(a.parameters, layer) + 2 * HIDDEN + (is_key ? HEAD_DIM : 0);
    float4 v[2] = {load_l2_float4(head), load_l2_float4(head + 4)};
    NormAndRope constants = fetch_norm_and_rope(norm, a.rope + (long long)position * (ROTARY_DIM / 2), c.lane);
    float x[DIMS] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
    if (!is_value) norm_and_turn(x, constants, c.lane);
    if (is_query) {
        float4* to = (float4*)(shared.queries[c.warp] + DIMS * c.lane);
        to[0] = make_float4(x[0] * SCALE, x[1] * SCALE, x[2] * SCALE, x[3] * SCALE);
        to[1] = make_float4(x[4] * SCALE, x[5] * SCALE, x[6] * SCALE, x[7] * SCALE);
    } else {
        uint4 packed = pack8(x);
        shared.fresh[turn][is_value][c.lane] = packed;
        *(uint4*)(item.keys(rows, layer) + (is_value ? item.distance(rows) : 0) + (long long)position * HEAD_DIM + DIMS * c.lane) = packed;
    }
}

// The stage that this warp takes next.
__device__ __forceinline__ const u8* next_stage(Consumer& c) {
    if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
    const u8* slot = c.ring.slots + c.next.slot * STAGE_BYTES;
    c.next.advance();
    return slot;
}

// All items of this block. Warp w has positions 4 w and up of a chunk for the scores, and dims 32 w and up for the sums.
__device__ __forceinline__ void attend_rows(Consumer& c, const BatchArguments& a, const Rows& rows, const int* first_item, BatchAttention& shared, int layer) {
    constexpr int SCORES = WARP_POSITIONS * PADDED_HEADS, LANES_A_SCORE = 32 / SCORES;
    static_assert(SCORES <= 32 && WARP_POSITIONS == 4, "a lane a score at least");
    int items = first_item[a.rows], end_item = item_begin(items, c.block + 1), turn = 0;
    int last_n = -1, last_kv = -1;
    float q[GROUP_HEADS][DIMS];
#pragma unroll 1
    for (int i = item_begin(items, c.block); i < end_item; ++i) {
        AttentionItem item(a, rows, first_item, i);
        bool is_new = item.n != last_n || item.kv_head != last_kv;
        if (is_new || item.is_last) {
            prepare_heads(c, a, rows, shared, item, layer, i % 2);
            consumer_barrier();
            last_n = item.n, last_kv = item.kv_head;
#pragma unroll
            for (int h = 0; h < GROUP_HEADS; ++h) {
                const float4* from = (const float4*)(shared.queries[h] + DIMS * c.lane);
                float4 low = from[0], high = from[1];
                q[h][0] = low.x, q[h][1] = low.y, q[h][2] = low.z, q[h][3] = low.w;
                q[h][4] = high.x, q[h][5] = high.y, q[h][6] = high.z, q[h][7] = high.w;
            }
        }
        float out[GROUP_HEADS][2], peak[GROUP_HEADS], total[GROUP_HEADS];
#pragma unroll
        for (int h = 0; h < GROUP_HEADS; ++h) out[h][0] = out[h][1] = total[h] = 0, peak[h] = -1e30f;
#pragma unroll 1
        for (int first = item.begin; first < item.end; first += CHUNK_POSITIONS, turn ^= 1) {
            int count = min(CHUNK_POSITIONS, item.end - first), fresh = item.is_last ? item.end - 1 - first : -1;
            const u8* keys = next_stage(c);
            float sums[SCORES];
#pragma unroll
            for (int p = 0; p < WARP_POSITIONS; ++p) {
                int place = c.warp * WARP_POSITIONS + p;
                float k[DIMS];
                unpack8(k, ((const uint4*)(place == fresh ? (const u8*)shared.fresh[i % 2][0] : keys + place * 2 * HEAD_DIM))[c.lane]);
#pragma unroll
                for (int h = 0; h < PADDED_HEADS; ++h) {
                    float sum = 0;
                    if (h < GROUP_HEADS)
#pragma unroll
                        for (int d = 0; d < DIMS; ++d) sum = fmaf(k[d], q[h < GROUP_HEADS ? h : 0][d], sum);
                    sums[p * PADDED_HEADS + h] = sum;
                }
            }
            release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
            float score = warp_sum_scatter(sums, c.lane);
            int own = c.lane / LANES_A_SCORE;
            if (c.lane % LANES_A_SCORE == 0) shared.scores[turn][c.warp * WARP_POSITIONS + own / PADDED_HEADS][own % PADDED_HEADS] = score;
            consumer_barrier();
            float (*weights)[PADDED_HEADS] = shared.weights[c.warp];
#pragma unroll
            for (int h = 0; h < GROUP_HEADS; ++h) {
                float own_score = c.lane < count ? shared.scores[turn][c.lane][h] : -1e30f;
                float best = fmaxf(peak[h], warp_max(own_score)), shrink = exp2_fast(peak[h] - best), weight = exp2_fast(own_score - best);
                peak[h] = best;
                total[h] = fmaf(total[h], shrink, warp_sum(weight));
                out[h][0] *= shrink, out[h][1] *= shrink;
                weights[c.lane][h] = weight;
            }
            const u8* values = next_stage(c);
            __syncwarp();
            int column = c.warp * 64 + c.lane % 16 * 4;  // bytes: two dims
#pragma unroll 4
            for (int p = c.lane / 16; p < CHUNK_POSITIONS; p += 2) {
                u32 v = *(const u32*)((p == fresh ? (const u8*)shared.fresh[i % 2][1] : values + p * 2 * HEAD_DIM) + column);
                if (p >= count) v = 0;
                float low = low_half(v), high = high_half(v);
#pragma unroll
                for (int h = 0; h < GROUP_HEADS; ++h) out[h][0] = fmaf(weights[p][h], low, out[h][0]), out[h][1] = fmaf(weights[p][h], high, out[h][1]);
            }
            release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
        }
        float* to = partial_place(a, item.n, item.kv_head * GROUP_HEADS, item.split);
#pragma unroll
        for (int h = 0; h < GROUP_HEADS; ++h, to += (long long)a.most_splits * PARTIAL_STRIDE) {
            float low = out[h][0] + __shfl_xor_sync(0xFFFFFFFFu, out[h][0], 16), high = out[h][1] + __shfl_xor_sync(0xFFFFFFFFu, out[h][1], 16);
            if (c.lane / 16 == h % 2) *(float2*)(to + c.warp * 32 + c.lane % 16 * 2) = make_float2(low, high);
            if (c.thread == 0) *(float2*)(to + HEAD_DIM) = make_float2(peak[h], total[h]);
        }
    }
}

// Merges the splits of (row, head, half of its dims), applies the output gate.
__device__ __forceinline__ void merge_rows(Consumer& c, const BatchArguments& a, const Rows& rows) {
    constexpr int HALVES = HEAD_DIM / 128;
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < a.rows * HEADS * HALVES; item += BLOCKS * CONSUMER_WARPS) {
        int n = item / (HEADS * HALVES), head = item / HALVES % HEADS, place = item % HALVES * 128 + 4 * c.lane;
        if (!rows.kind[n]) continue;
        int count = batch_splits(rows.position[n]).count;
        float4 gate = load_l2_float4(a.projected + (long long)n * PROJECTED_STRIDE + head * 2 * HEAD_DIM + HEAD_DIM + place);
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
        *(u32*)operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + place) = pack2(o.x * inverse * quick_sigmoid(gate.x), o.y * inverse * quick_sigmoid(gate.y));
        *(u32*)operand_place<QUERY_DIM>(a.mixed, n, head * HEAD_DIM + place + 2) = pack2(o.z * inverse * quick_sigmoid(gate.z), o.w * inverse * quick_sigmoid(gate.w));
    }
}
