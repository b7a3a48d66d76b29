// Gated delta net: projections, causal convolution, gates, delta rule, gated norm. (The out projection is in decode.cu.)
#pragma once

#include "primitive/gemv.cuh"
#include "state.cuh"

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

    static constexpr bool EXCHANGED = true;

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

// Queries and keys of the head that this block's warps work on, in shared memory: q, then k.
struct HeadInputs {
    alignas(16) float qk[2][KEY_HEAD_DIM];
};

// What the delta rule reads of one token for one column pair: this lane's part of q and k, and the pair's numbers.
struct DeltaInputs {
    float4 q, k;
    float value[2], gate[2], beta, decay;
};

// The warps of a block work on pairs of one head: each fetches an eighth of its q and k, for all.
__device__ __forceinline__ DeltaInputs receive_delta_inputs(Consumer& c, HeadInputs& shared, const u32* projected, int pair, u32 tag) {
    static_assert(PAIRS_PER_HEAD % CONSUMER_WARPS == 0 && 2 * KEY_HEAD_DIM == CONSUMER_WARPS * 32, "one word of q and k a lane");
    int head = pair / PAIRS_PER_HEAD, key_head = head / (VALUE_HEADS / KEY_HEADS);
    int at = c.thread;  // among q and k
    const u32* own = projected + at / KEY_HEAD_DIM * KEY_DIM + key_head * KEY_HEAD_DIM + at % KEY_HEAD_DIM;
    // Lanes 0 and 1: the values; 2 and 3: the gates; 4: beta; 5: the decay's logarithm.
    const u32* more = projected + (c.lane < 2 ? 2 * KEY_DIM + 2 * pair : c.lane < 4 ? CONV_DIM + 2 * pair - 2
                                   : CONV_DIM + VALUE_DIM + (c.lane - 4) * (VALUE_HEADS - 1) - 4 + head) + c.lane;
    const u32* const slots[2] = {own, c.lane < 6 ? more : own};
    await_word(projected + CONV_DIM + VALUE_DIM + VALUE_HEADS + head, tag, c.watchdog);
    float words[2];
    receive_words<2>(words, slots, tag, c.watchdog);
    shared.qk[0][at] = words[0];
    consumer_barrier();
    DeltaInputs in;
    in.q = *(const float4*)(shared.qk[0] + 4 * c.lane);
    in.k = *(const float4*)(shared.qk[1] + 4 * c.lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        in.value[i] = __shfl_sync(0xFFFFFFFFu, words[1], i);
        in.gate[i] = __shfl_sync(0xFFFFFFFFu, words[1], 2 + i);
    }
    in.beta = __shfl_sync(0xFFFFFFFFu, words[1], 4);
    in.decay = __expf(__shfl_sync(0xFFFFFFFFu, words[1], 5));
    return in;
}

// Delta rule for one column pair. The state is read once: S^T k and S^T q come from the state before its update,
// o = decay * S^T q + delta * (k . q).
__device__ __forceinline__ float2 delta_rule(const DeltaInputs& in, StateColumns& s, int lane) {
    float4 q = in.q, k = in.k;
    float sums[8] = {dot4(q, q), dot4(k, k), dot4(k, q), dot4(s.first, k), dot4(s.second, k), dot4(s.first, q), dot4(s.second, q), 0};
    float mine = warp_sum_scatter(sums, lane);  // lane l: sum l / 4
    float qq = __shfl_sync(0xFFFFFFFFu, mine, 0), kk = __shfl_sync(0xFFFFFFFFu, mine, 4), kq = __shfl_sync(0xFFFFFFFFu, mine, 8);
    float sk0 = __shfl_sync(0xFFFFFFFFu, mine, 12), sk1 = __shfl_sync(0xFFFFFFFFu, mine, 16);
    float sq0 = __shfl_sync(0xFFFFFFFFu, mine, 20), sq1 = __shfl_sync(0xFFFFFFFFu, mine, 24);
    float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)KEY_HEAD_DIM), k_scale = rsqrtf(kk + 1e-6f);
    float delta0 = in.beta * (in.value[0] - in.decay * k_scale * sk0), delta1 = in.beta * (in.value[1] - in.decay * k_scale * sk1);
    float alignment = kq * k_scale * q_scale;
    float2 o = make_float2(in.decay * q_scale * sq0 + delta0 * alignment, in.decay * q_scale * sq1 + delta1 * alignment);
    s.first = decayed_plus(in.decay, s.first, k, k_scale * delta0);
    s.second = decayed_plus(in.decay, s.second, k, k_scale * delta1);
    return o;
}

// Receives this warp's slice of the delta rule's output, with the gated norm: o * gate / rms(o of the head).
__device__ __forceinline__ void receive_gated_norm(Consumer& c, const u32* mixed, u32 tag) {
    constexpr int SLICE = VALUE_DIM / CONSUMER_WARPS;
    constexpr int AT_ONCE = SLICE > VALUE_HEAD_DIM ? 2 : 1;  // heads
    static_assert(VALUE_HEAD_DIM == 4 * 32 && PAIRS_PER_HEAD == 2 * 32, "four columns and two pairs a lane");
    c.locate();
    int start = slice_start(VALUE_DIM, c.warp), end = (start + SLICE + VALUE_HEAD_DIM - 1) / VALUE_HEAD_DIM;
    mixed = copy_for<MIXED_LINEAR>(mixed, c.block);
    await_word(mixed + end * MIXED_HEAD - 1, tag, c.watchdog);
#pragma unroll 1
    for (int head = start / VALUE_HEAD_DIM; head < end; head += AT_ONCE) {
        float4 columns[AT_ONCE];
        float squares[2 * AT_ONCE];
        const u32 *column_slots[AT_ONCE], *square_slots[2 * AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const u32* from = mixed + min(head + i, end - 1) * MIXED_HEAD;
            column_slots[i] = from + 4 * c.lane;
            square_slots[2 * i] = from + VALUE_HEAD_DIM + c.lane;
            square_slots[2 * i + 1] = from + VALUE_HEAD_DIM + 32 + c.lane;
        }
        receive_all<AT_ONCE, 2 * AT_ONCE>(columns, column_slots, squares, square_slots, ~0u, tag, c.watchdog);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            float scale = rsqrtf(warp_sum(squares[2 * i] + squares[2 * i + 1]) / VALUE_HEAD_DIM + NORM_EPS);
            float4 y = make_float4(columns[i].x * scale, columns[i].y * scale, columns[i].z * scale, columns[i].w * scale);
            int column = (head + i) * VALUE_HEAD_DIM + 4 * c.lane;
            if (column >= start && column < start + SLICE) store_activations(c, (column - start) / 4, y);
        }
    }
    __syncwarp();
    c.mark(MARK_RECEIVED);
}

__device__ __forceinline__ void linear_attention(Consumer& c, const LinearLayer& layer, HeadInputs& head_inputs, const Channels& channels,
                                                 float squares, u32 tag) {
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
        if (pair < COLUMN_PAIRS) {
            if (i) consumer_barrier();  // the last head's q and k are read
            DeltaInputs in = receive_delta_inputs(c, head_inputs, channels.projected, pair, tag);
            float2 o = delta_rule(in, state[i], c.lane);
            int at = pair / PAIRS_PER_HEAD * MIXED_HEAD, in_head = pair % PAIRS_PER_HEAD;
            if (c.lane < COPIES) {
                u32* head = channels.mixed + c.lane * MIXED_LINEAR + at;
                store_relaxed2(head + 2 * in_head, tagged(o.x * in.gate[0], tag), tagged(o.y * in.gate[1], tag));
                publish(head + VALUE_HEAD_DIM + in_head, o.x * o.x + o.y * o.y, tag);
            }
            *(float4*)state_column(layer, pair, c.lane) = state[i].first;
            *(float4*)(state_column(layer, pair, c.lane) + KEY_HEAD_DIM) = state[i].second;
        }
    }
    c.mark(MARK_ATTENDED);
    pause(POLL_AFTER_PUBLISHING);
    receive_gated_norm(c, channels.mixed, tag);
}
