// Gated attention: projections, q and k norm, RoPE, attention over the KV cache, output gate, out projection.
//
// The context is split over blocks: an item is (kv head, split). Every item serves all query heads of its kv head with
// one read of K and V and publishes a partial result (maximum, sum, weighted values); the splits are merged by
// log-sum-exp, spread over all blocks by (head, 8 dims).
#pragma once

#include "state.cuh"

constexpr int PROJECTED_FULL = 2 * QUERY_DIM + 2 * KV_DIM;  // rows: per head 256 query and 256 gate | k | v
constexpr int GROUP_HEADS = HEADS / KV_HEADS;               // query heads of a kv head
constexpr int PADDED_HEADS = GROUP_HEADS <= 1 ? 1 : GROUP_HEADS <= 2 ? 2 : GROUP_HEADS <= 4 ? 4 : 8;
constexpr int AT_ONCE = PADDED_HEADS <= 4 ? 4 : 2;          // positions that a warp handles together
constexpr int LEAST_SPLIT = CONSUMER_WARPS * AT_ONCE;
constexpr int DIMS = HEAD_DIM / 32;  // dims that a lane holds
constexpr int PARTIAL_STRIDE = HEAD_DIM + 4;
static_assert(DIMS == 8, "a lane holds 8 dims of a head: head_dim must be 256");
static_assert(GROUP_HEADS < CONSUMER_WARPS, "a warp for each query head of a kv head, and one for the new key and value");
static_assert(MAX_SPLITS <= 64, "merge_splits gives a lane two splits");

struct PublishFinish {
    const Consumer* consumer;
    u32* projected;
    u32 tag;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int row = group * 8 + consumer->thread;
        if (consumer->thread < groups * 8 && row < PROJECTED_FULL) publish(projected + row, sum(consumer->thread) * inverse_rms<HIDDEN>(*consumer), tag);
    }
};

// The constants of norm_and_rope for a lane: fetched before the head is there.
struct NormAndRope {
    float weight[DIMS];
    float2 turn[DIMS];  // (cos, sin) for the pairs (i, i + ROTARY_DIM / 2)
};
constexpr int HALF_LANES = ROTARY_DIM / 2 / DIMS;  // lanes that hold the first half of the rotary dims

__device__ __forceinline__ NormAndRope fetch_norm_and_rope(const float* weight, const float2* rope, int lane) {
    NormAndRope result;
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
        result.weight[i] = load_constant(weight + lane * DIMS + i);
        result.turn[i] = __ldg(rope + (lane % HALF_LANES) * DIMS + i);
    }
    return result;
}

// Norm and RoPE of one head; lane l holds dims 8 l to 8 l + 7.
__device__ __forceinline__ void norm_and_rope(float (&x)[DIMS], const NormAndRope& constants, int lane) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < DIMS; ++i) squares += x[i] * x[i];
    float scale = rsqrtf(warp_sum(squares) / HEAD_DIM + NORM_EPS);
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
        x[i] *= scale * constants.weight[i];
        float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], HALF_LANES);
        if (lane < 2 * HALF_LANES) {
            float2 r = constants.turn[i];
            x[i] = lane < HALF_LANES ? x[i] * r.x - other * r.y : x[i] * r.x + other * r.y;
        }
    }
}

// Receives COUNT vectors of a head's size; lane l gets dims 8 l to 8 l + 7 of each.
template <int COUNT>
__device__ __forceinline__ void receive_heads(float (&x)[COUNT][DIMS], const u32* const (&heads)[COUNT], u32 tag, Consumer& c) {
    float4 v[2 * COUNT];
    const u32* slots[2 * COUNT];
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i) slots[i] = heads[i / 2] + c.lane * DIMS + i % 2 * 4;
    float none[1];
    const u32* const no_slot[1] = {nullptr};
    receive_all<2 * COUNT, 1>(v, slots, none, no_slot, 0, tag, c.watchdog);
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i) {
        float* to = x[i / 2] + i % 2 * 4;
        to[0] = v[i].x, to[1] = v[i].y, to[2] = v[i].z, to[3] = v[i].w;
    }
}

// How the positions 0 .. position are cut: the same for every launch, whatever the number of tokens in it.
struct Splits {
    int count, length;
};
__device__ __forceinline__ Splits splits_of(int position) {
    int tokens = position + 1;
    int length = max(LEAST_SPLIT, (tokens + MAX_SPLITS - 1) / MAX_SPLITS);
    length = (length + LEAST_SPLIT - 1) / LEAST_SPLIT * LEAST_SPLIT;
    return {(tokens + length - 1) / length, length};
}

// Shared memory of an item: normalised queries, then the partial results of the warps.
struct AttentionScratch {
    float queries[GROUP_HEADS][HEAD_DIM];
    float peak[CONSUMER_WARPS][GROUP_HEADS], total[CONSUMER_WARPS][GROUP_HEADS];
    float values[CONSUMER_WARPS / 2][GROUP_HEADS][HEAD_DIM];
    uint4 new_key[32], new_value[32];
};

__device__ __forceinline__ void attend(Consumer& c, const FullLayer& layer, const Channels& channels, AttentionScratch& scratch,
                                       const float2* rope, int position, int max_context, u32 tag) {
    constexpr float LOG2E = 1.4426950408889634f;
    Splits splits = splits_of(position);
    int kv_head = c.block % KV_HEADS, split = c.block / KV_HEADS;
    if (split >= splits.count) return;
    int begin = split * splits.length, end = min(begin + splits.length, position + 1);
    u16* keys = layer.keys + (long long)kv_head * max_context * HEAD_DIM;
    u16* values = layer.values + (long long)kv_head * max_context * HEAD_DIM;

    // The first keys and values do not depend on this token: fetch them before waiting for the queries.
    uint4 k[AT_ONCE], v[AT_ONCE];
    auto fetch = [&](uint4 (&to)[AT_ONCE], const u16* from, int first) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            int at = first + i;
            to[i] = at < end && at != position ? load_l2(from + (long long)at * HEAD_DIM + c.lane * DIMS) : make_uint4(0, 0, 0, 0);
        }
    };
    int first = begin + c.warp * AT_ONCE;
    fetch(k, keys, first);
    fetch(v, values, first);

    const u32* projected = channels.projected;
    NormAndRope constants = fetch_norm_and_rope(c.warp < GROUP_HEADS ? layer.q_norm : layer.k_norm, rope, c.lane);
    if (c.warp < GROUP_HEADS) {
        float x[1][DIMS];
        const u32* const slots[1] = {projected + (kv_head * GROUP_HEADS + c.warp) * 2 * HEAD_DIM};
        receive_heads<1>(x, slots, tag, c);
        norm_and_rope(x[0], constants, c.lane);
#pragma unroll
        for (int i = 0; i < DIMS; ++i) scratch.queries[c.warp][c.lane * DIMS + i] = x[0][i] * (LOG2E * 0.0625f);
    }
    if (end == position + 1 && c.warp == CONSUMER_WARPS - 1) {
        float x[2][DIMS];
        const u32* key = projected + 2 * QUERY_DIM + kv_head * HEAD_DIM;
        const u32* const slots[2] = {key, key + KV_DIM};
        receive_heads<2>(x, slots, tag, c);
        norm_and_rope(x[0], constants, c.lane);
        scratch.new_key[c.lane] = pack8(x[0]);
        scratch.new_value[c.lane] = pack8(x[1]);
        *(uint4*)(keys + (long long)position * HEAD_DIM + c.lane * DIMS) = scratch.new_key[c.lane];
        *(uint4*)(values + (long long)position * HEAD_DIM + c.lane * DIMS) = scratch.new_value[c.lane];
    }
    consumer_barrier();

    float q[GROUP_HEADS][DIMS], o[GROUP_HEADS][DIMS];
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head)
#pragma unroll
        for (int i = 0; i < DIMS; ++i) q[head][i] = scratch.queries[head][c.lane * DIMS + i], o[head][i] = 0;

    // In the scattered form, lane l speaks for position l / LANES_PER_POSITION of those at once, and for one head.
    constexpr int SCORES = AT_ONCE * PADDED_HEADS;
    constexpr int LANES_PER_SCORE = 32 / SCORES, LANES_PER_POSITION = 32 / AT_ONCE;
    int my_head = c.lane / LANES_PER_SCORE % PADDED_HEADS;
    float peak = -1e30f, total = 0;
    for (; first < end; first += LEAST_SPLIT) {
        float scores[SCORES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (first + i == position) k[i] = scratch.new_key[c.lane], v[i] = scratch.new_value[c.lane];
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
        fetch(k, keys, first + LEAST_SPLIT);
        float score = warp_sum_scatter(scores, c.lane);
        bool inside = first + c.lane / LANES_PER_POSITION < end;
        if (!inside) score = -1e30f;
        float best = score;
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
        fetch(v, values, first + LEAST_SPLIT);
    }
#pragma unroll
    for (int offset = LANES_PER_POSITION; offset < 32; offset *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
    if (c.lane < LANES_PER_POSITION && c.lane % LANES_PER_SCORE == 0 && my_head < GROUP_HEADS) {
        scratch.peak[c.warp][my_head] = peak;
        scratch.total[c.warp][my_head] = total;
    }
    consumer_barrier();
    float block_peak[GROUP_HEADS];
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head) {
        block_peak[head] = scratch.peak[0][head];
#pragma unroll
        for (int w = 1; w < CONSUMER_WARPS; ++w) block_peak[head] = fmaxf(block_peak[head], scratch.peak[w][head]);
        float scale = exp2_fast(scratch.peak[c.warp][head] - block_peak[head]);
#pragma unroll
        for (int d = 0; d < DIMS; ++d) {
            o[head][d] *= scale;
            if (c.warp >= CONSUMER_WARPS / 2) scratch.values[c.warp - CONSUMER_WARPS / 2][head][d * 32 + c.lane] = o[head][d];
        }
    }
    consumer_barrier();
    if (c.warp < CONSUMER_WARPS / 2)
#pragma unroll
        for (int head = 0; head < GROUP_HEADS; ++head)
#pragma unroll
            for (int d = 0; d < DIMS; ++d) scratch.values[c.warp][head][d * 32 + c.lane] += o[head][d];
    consumer_barrier();
    u32* partial = channels.partial + ((long long)kv_head * GROUP_HEADS * MAX_SPLITS + split) * PARTIAL_STRIDE;
    for (int i = c.thread; i < GROUP_HEADS * HEAD_DIM; i += CONSUMER_WARPS * 32) {
        int head = i / HEAD_DIM, at = i % HEAD_DIM;  // `at` in the order d * 32 + lane, for conflict-free access
        float sum = 0;
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS / 2; ++w) sum += scratch.values[w][head][at];
        publish(partial + (long long)head * MAX_SPLITS * PARTIAL_STRIDE + at % 32 * DIMS + at / 32, sum, tag);
    }
    if (c.thread < GROUP_HEADS) {
        int head = c.thread;
        float best = scratch.peak[0][head], sum = 0;
        for (int w = 1; w < CONSUMER_WARPS; ++w) best = fmaxf(best, scratch.peak[w][head]);
        for (int w = 0; w < CONSUMER_WARPS; ++w) sum += scratch.total[w][head] * exp2_fast(scratch.peak[w][head] - best);
        u32* at = partial + (long long)head * MAX_SPLITS * PARTIAL_STRIDE + HEAD_DIM;
        store_relaxed2(at, tagged(best, tag), tagged(sum, tag));
    }
}

// Merges the splits of (head, 8 dims), applies the output gate and publishes.
__device__ __forceinline__ void merge_splits(Consumer& c, const Channels& channels, int position, u32 tag) {
    constexpr int ITEMS = HEADS * HEAD_DIM / 8;
    constexpr int PER_LANE = (MAX_SPLITS + 3) / 4;  // splits whose values a lane adds up
    int splits = splits_of(position).count;
    for (int item = c.block + BLOCKS * c.warp; item < ITEMS; item += BLOCKS * CONSUMER_WARPS) {
        int head = item / (HEAD_DIM / 8), dim = item % (HEAD_DIM / 8) * 8 + c.lane % 8;
        const u32* partial = channels.partial + (long long)head * MAX_SPLITS * PARTIAL_STRIDE;
        // Words 0 to 4: the gate, peak and total of splits l and l + 32; then the values of splits l / 8, l / 8 + 4, ...
        const u32* slots[5 + PER_LANE];
        u32 valid = 1;
        slots[0] = channels.projected + head * 2 * HEAD_DIM + HEAD_DIM + dim;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int split = c.lane + 32 * i;
            slots[1 + 2 * i] = partial + split * PARTIAL_STRIDE + HEAD_DIM;
            slots[2 + 2 * i] = slots[1 + 2 * i] + 1;
            if (split < splits) valid |= 3u << (1 + 2 * i);
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            int split = c.lane / 8 + 4 * i;
            slots[5 + i] = partial + split * PARTIAL_STRIDE + dim;
            if (split < splits) valid |= 1u << (5 + i);
        }
        float words[5 + PER_LANE];
        float4 none[1];
        const u32* const no_slot[1] = {slots[0] - dim % 4};  // a group of four that is there anyway
        receive_all<1, 5 + PER_LANE>(none, no_slot, words, slots, valid, tag, c.watchdog);
        float gate = sigmoid(words[0]);
        float peak[2], weight[2], best = -1e30f, total = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            peak[i] = valid >> (1 + 2 * i) & 1 ? words[1 + 2 * i] : -1e30f;
            best = fmaxf(best, peak[i]);
        }
        best = warp_max(best);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            weight[i] = valid >> (1 + 2 * i) & 1 ? exp2_fast(peak[i] - best) : 0.0f;
            total += valid >> (1 + 2 * i) & 1 ? weight[i] * words[2 + 2 * i] : 0.0f;
        }
        total = warp_sum(total);
        float o = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            float w = __shfl_sync(0xFFFFFFFFu, weight[i / 8], (c.lane / 8 + 4 * i) % 32);
            if (valid >> (5 + i) & 1) o += w * words[5 + i];
        }
        o += __shfl_xor_sync(0xFFFFFFFFu, o, 8);
        o += __shfl_xor_sync(0xFFFFFFFFu, o, 16);
        if (c.lane < 8) publish(channels.mixed + head * HEAD_DIM + dim, o / total * gate, tag);
    }
}

__device__ __forceinline__ void attention(Consumer& c, const FullLayer& layer, const Channels& channels, AttentionScratch& scratch,
                                          const float2* rope, int position, int max_context, float squares, u32 tag,
                                          ResidualFinish& add_to_residual) {
    PublishFinish finish{&c, channels.projected, tag};
    gemv<PROJECTED_FULL, HIDDEN>(c, squares, finish);
    c.enter(PHASE_ATTENTION, c.watchdog.layer);
    attend(c, layer, channels, scratch, rope, position, max_context, tag);
    c.mark(MARK_ATTENDED);
    c.enter(PHASE_MERGE, c.watchdog.layer);
    merge_splits(c, channels, position, tag);
    receive_activations<QUERY_DIM>(c, channels.mixed, tag, nullptr);
    gemv<HIDDEN, QUERY_DIM>(c, 0, add_to_residual);
}
