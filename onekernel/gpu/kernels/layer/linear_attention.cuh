// Gated delta net: projections, causal convolution, gates, delta rule, gated norm. (The out projection is in decode.cu.)
#pragma once

#include "primitive/gemv.cuh"
#include "state.cuh"

constexpr int PROJECTED_LINEAR = CONV_DIM + VALUE_DIM + 2 * VALUE_HEADS;  // rows: q, k, v | z | b | a
constexpr int PAIRS_PER_HEAD = VALUE_HEAD_DIM / 2;
constexpr int COLUMN_PAIRS = VALUE_HEADS * PAIRS_PER_HEAD;  // each warp owns the state of some pairs of value columns
constexpr int PAIRS_PER_WARP = (COLUMN_PAIRS + BLOCKS * CONSUMER_WARPS - 1) / (BLOCKS * CONSUMER_WARPS);

// Finishes the rows of in_proj: q, k, v pass the causal convolution (this thread alone owns the channel's window) and
// SiLU; z becomes gate = norm weight * silu(z); b becomes beta; a becomes the log of the decay.
struct ProjectionFinish {
    LinearLayer layer;
    const Consumer* consumer;
    u32* projected;
    u32 tag;
    float4 window, taps;  // of the row's channel; where there is no channel, taps holds the row's constants

    __device__ __forceinline__ void prepare(int group, int groups) {
        int row = group * 8 + consumer->thread;
        if (consumer->thread >= groups * 8) return;
        if (row < CONV_DIM) {
            window = *(const float4*)(layer.conv_window + 4 * row);
            taps = load_constant4(layer.conv_weight + 4 * row);
        } else if (row < CONV_DIM + VALUE_DIM) {
            taps.x = load_constant(layer.gated_norm + (row - CONV_DIM) % VALUE_HEAD_DIM);
        } else if (row >= PROJECTED_LINEAR - VALUE_HEADS && row < PROJECTED_LINEAR) {
            int head = row - (PROJECTED_LINEAR - VALUE_HEADS);
            taps.x = load_constant(layer.dt_bias + head);
            taps.y = load_constant(layer.negative_decay_rate + head);
        }
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int row = group * 8 + consumer->thread;
        if (consumer->thread >= groups * 8 || row >= PROJECTED_LINEAR) return;
        float y = sum(consumer->thread) * inverse_rms<HIDDEN>(*consumer);
        if (row < CONV_DIM) {
            float u = taps.x * window.y + taps.y * window.z + taps.z * window.w + taps.w * y;
            *(float4*)(layer.conv_window + 4 * row) = make_float4(window.y, window.z, window.w, y);
            y = silu(u);
        } else if (row < CONV_DIM + VALUE_DIM) {
            y = taps.x * silu(y);
        } else if (row < CONV_DIM + VALUE_DIM + VALUE_HEADS) {
            y = sigmoid(y);
        } else {
            float x = y + taps.x;
            float softplus = x > 20.0f ? x : log1pf(__expf(x));
            y = taps.y * softplus;
        }
        publish(projected + row, y, tag);
    }
};

// One pair of value columns of one head: lane l holds rows 4 l to 4 l + 3 of both columns of the state.
struct StateColumns {
    float4 first, second;
};

__device__ __forceinline__ float* state_column(const LinearLayer& layer, int pair, int lane) {
    return layer.recurrent_state + pair * 2 * KEY_HEAD_DIM + 4 * lane;
}

__device__ __forceinline__ float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

__device__ __forceinline__ float4 decayed_plus(float decay, float4 s, float4 k, float d) {
    return make_float4(decay * s.x + k.x * d, decay * s.y + k.y * d, decay * s.z + k.z * d, decay * s.w + k.w * d);
}

// Delta rule for one column pair. The state is read once: S^T k and S^T q come from the state before its update,
// o = decay * S^T q + delta * (k . q). Publishes pairs (o, gate) for the gated norm.
__device__ __forceinline__ void delta_rule(Consumer& c, const LinearLayer& layer, StateColumns& s, int pair, const u32* projected,
                                           u32* mixed, u32 tag) {
    int head = pair / PAIRS_PER_HEAD, key_head = head / (VALUE_HEADS / KEY_HEADS), column = pair * 2;
    const u32* gates = projected + CONV_DIM + VALUE_DIM;
    const u32* value = projected + 2 * KEY_DIM + column;
    const u32* gate = projected + CONV_DIM + column;
    const u32* const four_slots[2] = {projected + key_head * KEY_HEAD_DIM + 4 * c.lane, projected + KEY_DIM + key_head * KEY_HEAD_DIM + 4 * c.lane};
    const u32* const word_slots[6] = {value, value + 1, gate, gate + 1, gates + head, gates + VALUE_HEADS + head};
    float4 qk[2];
    float words[6];
    await_word(word_slots[5], tag, c.watchdog);
    receive_all<2, 6>(qk, four_slots, words, word_slots, 63, tag, c.watchdog);
    float4 q = qk[0], k = qk[1];
    float v0 = words[0], v1 = words[1], gate0 = words[2], gate1 = words[3], beta = words[4], decay = __expf(words[5]);
    float sums[8] = {dot4(q, q), dot4(k, k), dot4(k, q), dot4(s.first, k), dot4(s.second, k), dot4(s.first, q), dot4(s.second, q), 0};
    float mine = warp_sum_scatter(sums, c.lane);  // lane l: sum l / 4
    float qq = __shfl_sync(0xFFFFFFFFu, mine, 0), kk = __shfl_sync(0xFFFFFFFFu, mine, 4), kq = __shfl_sync(0xFFFFFFFFu, mine, 8);
    float sk0 = __shfl_sync(0xFFFFFFFFu, mine, 12), sk1 = __shfl_sync(0xFFFFFFFFu, mine, 16);
    float sq0 = __shfl_sync(0xFFFFFFFFu, mine, 20), sq1 = __shfl_sync(0xFFFFFFFFu, mine, 24);
    float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)KEY_HEAD_DIM), k_scale = rsqrtf(kk + 1e-6f);
    float delta0 = beta * (v0 - decay * k_scale * sk0), delta1 = beta * (v1 - decay * k_scale * sk1);
    float alignment = kq * k_scale * q_scale;
    float o0 = decay * q_scale * sq0 + delta0 * alignment, o1 = decay * q_scale * sq1 + delta1 * alignment;
    if (c.lane == 0) store_relaxed2(mixed + 2 * column, tagged(o0, tag), tagged(gate0, tag));
    if (c.lane == 1) store_relaxed2(mixed + 2 * column + 2, tagged(o1, tag), tagged(gate1, tag));
    s.first = decayed_plus(decay, s.first, k, k_scale * delta0);
    s.second = decayed_plus(decay, s.second, k, k_scale * delta1);
    *(float4*)state_column(layer, pair, c.lane) = s.first;
    *(float4*)(state_column(layer, pair, c.lane) + KEY_HEAD_DIM) = s.second;
}

// Receives this warp's slice of the delta rule's output, with the gated norm: o / rms(o of the head) * gate.
__device__ __forceinline__ void receive_gated_norm(Consumer& c, const u32* mixed, u32 tag) {
    constexpr int SLICE = VALUE_DIM / CONSUMER_WARPS;
    constexpr int AT_ONCE = SLICE > VALUE_HEAD_DIM ? 2 : 1;  // heads
    c.locate();
    int start = slice_start(VALUE_DIM, c.warp), end = (start + SLICE + VALUE_HEAD_DIM - 1) / VALUE_HEAD_DIM;
    await_word(mixed + 2 * end * VALUE_HEAD_DIM - 1, tag, c.watchdog);
#pragma unroll 1
    for (int head = start / VALUE_HEAD_DIM; head < end; head += AT_ONCE) {
        float4 pairs[2 * AT_ONCE];  // of head i: (o, gate) of columns 4 l to 4 l + 3 in 2 i and 2 i + 1
        const u32* slots[2 * AT_ONCE];
        float none[1];
        const u32* const no_slot[1] = {nullptr};
#pragma unroll
        for (int i = 0; i < 2 * AT_ONCE; ++i)
            slots[i] = mixed + 2 * (min(head + i / 2, end - 1) * VALUE_HEAD_DIM + 4 * c.lane) + i % 2 * 4;
        receive_all<2 * AT_ONCE, 1>(pairs, slots, none, no_slot, 0, tag, c.watchdog);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            float4 low = pairs[2 * i], high = pairs[2 * i + 1];
            float squares = low.x * low.x + low.z * low.z + high.x * high.x + high.z * high.z;
            float scale = rsqrtf(warp_sum(squares) / VALUE_HEAD_DIM + NORM_EPS);
            float4 y = make_float4(low.x * low.y * scale, low.z * low.w * scale, high.x * high.y * scale, high.z * high.w * scale);
            int column = (head + i) * VALUE_HEAD_DIM + 4 * c.lane;
            if (column >= start && column < start + SLICE) store_activations(c, (column - start) / 4, y);
        }
    }
    __syncwarp();
    c.mark(MARK_RECEIVED);
}

__device__ __forceinline__ void linear_attention(Consumer& c, const LinearLayer& layer, const Channels& channels, float squares,
                                                 u32 tag) {
    // The state does not depend on this token: fetch it while the projections stream.
    StateColumns state[PAIRS_PER_WARP];
    c.locate();
    int first_pair = c.block * CONSUMER_WARPS + c.warp;
#pragma unroll
    for (int i = 0; i < PAIRS_PER_WARP; ++i) {
        int pair = first_pair + i * BLOCKS * CONSUMER_WARPS;
        if (pair < COLUMN_PAIRS) {
            state[i].first = *(const float4*)state_column(layer, pair, c.lane);
            state[i].second = *(const float4*)(state_column(layer, pair, c.lane) + KEY_HEAD_DIM);
        }
    }
    ProjectionFinish finish{layer, &c, channels.projected, tag};
    gemv<PROJECTED_LINEAR, HIDDEN>(c, squares, finish);

    c.enter(PHASE_DELTA_RULE, c.watchdog.layer);
    first_pair = c.block * CONSUMER_WARPS + c.warp;
#pragma unroll
    for (int i = 0; i < PAIRS_PER_WARP; ++i) {
        int pair = first_pair + i * BLOCKS * CONSUMER_WARPS;
        if (pair < COLUMN_PAIRS) delta_rule(c, layer, state[i], pair, channels.projected, channels.mixed, tag);
    }
    c.mark(MARK_ATTENDED);
    receive_gated_norm(c, channels.mixed, tag);
}
