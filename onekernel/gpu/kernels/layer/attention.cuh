// Gated attention: projections, q and k norm, RoPE, attention over the KV cache, output gate. (o_proj is in decode.cu.)
//
// The context is split over blocks: an item is (kv head, split). Every item serves all query heads of its kv head with
// one read of K and V and publishes a partial result (maximum, sum, weighted values); the splits are merged by
// log-sum-exp, spread over all blocks by (head, 8 dims).
#pragma once

#include "state.cuh"

constexpr int GROUP_HEADS = HEADS / KV_HEADS;               // query heads of a kv head
constexpr int PADDED_HEADS = GROUP_HEADS <= 1 ? 1 : GROUP_HEADS <= 2 ? 2 : GROUP_HEADS <= 4 ? 4 : 8;
constexpr int AT_ONCE = PADDED_HEADS <= 4 ? 4 : 2;          // positions that a warp handles together
constexpr int LEAST_SPLIT = CONSUMER_WARPS * AT_ONCE;
constexpr int DIMS = HEAD_DIM / 32;  // dims that a lane holds
constexpr int PARTIAL_STRIDE = HEAD_DIM + 4;
static_assert(DIMS == 8, "a lane holds 8 dims of a head: head_dim must be 256");
static_assert(GROUP_HEADS + 2 <= CONSUMER_WARPS, "a warp for each query head of a kv head, for the new key, and for the new value");
static_assert(PROJECTED_FULL / 8 >= BLOCKS, "a block without rows would not wait until its warps are done with their activations");

struct PublishFinish {
    const Consumer* consumer;
    u32* projected;
    u32 tag;

    static constexpr bool EXCHANGED = true;

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

// Receives a vector of a head's size; lane l gets dims 8 l to 8 l + 7.
__device__ __forceinline__ void receive_head(float (&x)[DIMS], const u32* head, u32 tag, Consumer& c) {
    float4 v[2];
    await_word(head + HEAD_DIM - 1, tag, c.watchdog);
    receive4_many<2>(v, head + c.lane * DIMS, 4, 2, tag, c.watchdog);
    x[0] = v[0].x, x[1] = v[0].y, x[2] = v[0].z, x[3] = v[0].w;
    x[4] = v[1].x, x[5] = v[1].y, x[6] = v[1].z, x[7] = v[1].w;
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

// The largest score of a head over all warps of the block; every lane gets it.
__device__ __forceinline__ float block_peak(const AttentionScratch& scratch, int head, int lane) {
    static_assert(CONSUMER_WARPS == 8, "three steps");
    float peak = scratch.peak[lane % CONSUMER_WARPS][head];
    peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2));
    return fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 4));
}

__device__ __forceinline__ void attend(Consumer& c, const FullLayer& layer, const Channels& channels, AttentionScratch& scratch,
                                       const float2* rope, int position, int max_context, u32 tag) {
    constexpr float LOG2E = 1.4426950408889634f;
    Splits splits = splits_of(position);
    int kv_head = c.block % KV_HEADS, split = c.block / KV_HEADS;
    if (split >= splits.count) return;
    int begin = split * splits.length, end = min(begin + splits.length, position + 1);
    u16* keys = layer.keys + (long long)kv_head * max_context * HEAD_DIM;
    u16* values = layer.values + (long long)kv_head * max_context * HEAD_DIM;

    // The first keys and values do not depend on this token: fetch them before waiting for the queries. What is fetched
    // at or beyond `position` is not used.
    uint4 k[AT_ONCE], v[AT_ONCE];
    auto fetch = [&](uint4 (&to)[AT_ONCE], const u16* from, int first) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) to[i] = load_l2(from + min(first + i, end - 1) * HEAD_DIM + c.lane * DIMS);
    };
    int first = begin + c.warp * AT_ONCE;
    fetch(k, keys, first);
    fetch(v, values, first);

    // Warp h takes query head h of the group, the last but one the new value, the last the new key.
    bool is_query = c.warp < GROUP_HEADS, is_key = c.warp == CONSUMER_WARPS - 1, is_value = c.warp == CONSUMER_WARPS - 2;
    if (is_query || (end == position + 1 && (is_key || is_value))) {
        NormAndRope constants = fetch_norm_and_rope(is_query ? layer.q_norm : layer.k_norm, rope, c.lane);
        int at = is_query ? (kv_head * GROUP_HEADS + c.warp) * 2 * HEAD_DIM : 2 * QUERY_DIM + (is_value ? KV_DIM : 0) + kv_head * HEAD_DIM;
        float x[DIMS];
        receive_head(x, channels.projected + at, tag, c);
        if (!is_value) norm_and_rope(x, constants, c.lane);
        if (is_query) {
#pragma unroll
            for (int i = 0; i < DIMS; ++i) scratch.queries[c.warp][c.lane * DIMS + i] = x[i] * (LOG2E * 0.0625f);
        } else {
            uint4 packed = pack8(x);
            (is_key ? scratch.new_key : scratch.new_value)[c.lane] = packed;
            *(uint4*)((is_key ? keys : values) + (long long)position * HEAD_DIM + c.lane * DIMS) = packed;
        }
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
#pragma unroll
    for (int head = 0; head < GROUP_HEADS; ++head) {
        float scale = exp2_fast(scratch.peak[c.warp][head] - block_peak(scratch, head, c.lane));
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
#pragma unroll 1
    for (int head = 0; head < GROUP_HEADS; ++head, partial += MAX_SPLITS * PARTIAL_STRIDE) {
        static_assert(HEAD_DIM == CONSUMER_WARPS * 32, "one dim a thread");
        float sum = 0;  // of dim `thread` in the order d * 32 + lane, for conflict-free access
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS / 2; ++w) sum += scratch.values[w][head][c.thread];
        publish(partial + c.lane * DIMS + c.warp, sum, tag);
        if (c.warp == head) {
            float best = block_peak(scratch, head, c.lane);
            float part = c.lane < CONSUMER_WARPS ? scratch.total[c.lane][head] * exp2_fast(scratch.peak[c.lane][head] - best) : 0.0f;
            part = warp_sum(part);
            if (c.lane == 0) store_relaxed2(partial + HEAD_DIM, tagged(best, tag), tagged(part, tag));
        }
    }
    consumer_barrier();  // the scratch's place is needed for activations
}

// Merges the splits of (head, 8 dims), applies the output gate and publishes.
__device__ __forceinline__ void merge_splits(Consumer& c, const Channels& channels, int position, u32 tag) {
    constexpr int ITEMS = HEADS * HEAD_DIM / 8;
    constexpr int AT_ONCE = 8, ROUND = 4 * AT_ONCE;  // splits whose values a lane, and a warp, adds up together
    int splits = splits_of(position).count;
#pragma unroll 1
    for (int item = c.block + BLOCKS * c.warp; item < ITEMS; item += BLOCKS * CONSUMER_WARPS) {
        int head = item / (HEAD_DIM / 8), dim = item % (HEAD_DIM / 8) * 8 + c.lane % 8;
        const u32* partial = channels.partial + (long long)head * MAX_SPLITS * PARTIAL_STRIDE;
        await_word(partial + (splits - 1) * PARTIAL_STRIDE + HEAD_DIM + 1, tag, c.watchdog);
        float total = 0, o = 0, peak = -1e30f, gate = 0;
#pragma unroll 1
        for (int first = 0; first < splits; first += ROUND) {
            // Words: the gate; peak and total of split first + l; the values of splits first + l / 8 + 4 i.
            const u32* slots[3 + AT_ONCE];
            float words[3 + AT_ONCE];
            u32 valid = 1;
            int own = first + c.lane;
            slots[0] = channels.projected + head * 2 * HEAD_DIM + HEAD_DIM + dim;
            slots[1] = partial + own * PARTIAL_STRIDE + HEAD_DIM;
            slots[2] = slots[1] + 1;
            if (own < splits) valid |= 6;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                int split = first + c.lane / 8 + 4 * i;
                slots[3 + i] = partial + split * PARTIAL_STRIDE + dim;
                if (split < splits) valid |= 8u << i;
            }
            float4 none[1];
            const u32* const no_slot[1] = {slots[0] - dim % 4};  // a group of four that is there anyway
            receive_all<1, 3 + AT_ONCE>(none, no_slot, words, slots, valid, tag, c.watchdog);
            gate = words[0];
            float new_peak = fmaxf(peak, warp_max(own < splits ? words[1] : -1e30f));
            float scale = exp2_fast(peak - new_peak), weight = own < splits ? exp2_fast(words[1] - new_peak) : 0.0f;
            peak = new_peak;
            total = total * scale + (own < splits ? weight * words[2] : 0.0f);
            o *= scale;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                float w = __shfl_sync(0xFFFFFFFFu, weight, c.lane / 8 + 4 * i);
                if (valid >> (3 + i) & 1) o += w * words[3 + i];
            }
        }
        total = warp_sum(total);
        o += __shfl_xor_sync(0xFFFFFFFFu, o, 8);
        o += __shfl_xor_sync(0xFFFFFFFFu, o, 16);
        if (c.lane < 8) publish_to_all<QUERY_DIM>(channels.mixed, head * HEAD_DIM + dim, o / total * sigmoid(gate), tag);
    }
}

__device__ __forceinline__ void attention(Consumer& c, const FullLayer& layer, const Channels& channels, AttentionScratch& scratch,
                                          const float2* rope, int position, int max_context, float squares, u32 tag) {
    PublishFinish finish{&c, channels.projected, tag};
    gemv<PROJECTED_FULL, HIDDEN>(c, squares, finish);
    c.enter(PHASE_ATTENTION, c.watchdog.layer);
    attend(c, layer, channels, scratch, rope, position, max_context, tag);
    c.mark(MARK_ATTENDED);
    c.enter(PHASE_MERGE, c.watchdog.layer);
    merge_splits(c, channels, position, tag);
    receive_activations<QUERY_DIM>(c, channels.mixed, tag, nullptr);
}
