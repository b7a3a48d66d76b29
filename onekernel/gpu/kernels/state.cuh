// Where things lie in device memory: parameters and state of each layer, and the channels between blocks.
// The order of the parameters is that of gpu/parameters.py, the order of the state that of gpu/state.py.
#pragma once

#include "primitive/gemv.cuh"

constexpr int LINEAR_PARAMETERS = 2 * HIDDEN + 4 * CONV_DIM + 2 * VALUE_HEADS + VALUE_HEAD_DIM;  // float32 words
constexpr int FULL_PARAMETERS = 2 * HIDDEN + 2 * HEAD_DIM;
constexpr long long RECURRENT_STATE = (long long)VALUE_HEADS * VALUE_HEAD_DIM * KEY_HEAD_DIM;
constexpr long long LINEAR_STATE = 4LL * CONV_DIM + RECURRENT_STATE;

__device__ __forceinline__ bool is_full(int layer) { return FULL_LAYER_MASK >> layer & 1; }
__device__ __forceinline__ int full_layers_before(int layer) {
    return __popcll(layer < 64 ? FULL_LAYER_MASK & ((1ull << layer) - 1) : FULL_LAYER_MASK);
}

__device__ __forceinline__ const float* layer_parameters(const float* parameters, int layer) {
    int full = full_layers_before(layer);
    return parameters + (long long)full * FULL_PARAMETERS + (long long)(layer - full) * LINEAR_PARAMETERS;
}

struct LinearLayer {
    const float* conv_weight;          // [CONV_DIM, 4]
    const float* negative_decay_rate;  // [VALUE_HEADS]: -exp(A_log)
    const float* dt_bias;              // [VALUE_HEADS]
    const float* gated_norm;           // [VALUE_HEAD_DIM]
    float* conv_window;                // [CONV_DIM, 4]: the last four inputs, oldest first
    float* recurrent_state;            // [VALUE_HEADS, VALUE_HEAD_DIM, KEY_HEAD_DIM]: S transposed
};

struct FullLayer {
    const float* q_norm;  // [HEAD_DIM]: 1 + weight
    const float* k_norm;
    u16* keys;  // [KV_HEADS, max_context, HEAD_DIM], after norm and RoPE
    u16* values;
};

// The vectors that blocks exchange; each has two copies, used by even and odd layers in turn.
struct Channels {
    u32* after_mixer;  // [HIDDEN]: the residual stream
    u32* after_mlp;    // [HIDDEN]
    u32* projected;    // [PROJECTED]: outputs of in_proj or of q, k, v
    u32* mixed;        // [2 * VALUE_DIM] pairs (o, gate), or [QUERY_DIM]
    u32* partial;      // [HEADS, MAX_SPLITS, HEAD_DIM + 4]: attention over a part of the context
    u32* activated;    // [INTERMEDIATE]
};

constexpr int PROJECTED_MAX = CONV_DIM + VALUE_DIM + 2 * VALUE_HEADS > 2 * QUERY_DIM + 2 * KV_DIM
                                  ? CONV_DIM + VALUE_DIM + 2 * VALUE_HEADS
                                  : 2 * QUERY_DIM + 2 * KV_DIM;
constexpr int MIXED_MAX = 2 * VALUE_DIM > QUERY_DIM ? 2 * VALUE_DIM : QUERY_DIM;
constexpr int PARTIAL_WORDS = HEADS * MAX_SPLITS * (HEAD_DIM + 4);
__device__ constexpr int round4(int n) { return (n + 3) / 4 * 4; }
constexpr int CHANNEL_WORDS = 2 * HIDDEN + round4(PROJECTED_MAX) + MIXED_MAX + PARTIAL_WORDS + INTERMEDIATE;

__device__ __forceinline__ Channels channels_of(u32* exchange, int layer) {
    u32* at = exchange + (layer & 1) * CHANNEL_WORDS;
    Channels channels;
    channels.after_mixer = at, at += HIDDEN;
    channels.after_mlp = at, at += HIDDEN;
    channels.projected = at, at += round4(PROJECTED_MAX);
    channels.mixed = at, at += MIXED_MAX;
    channels.partial = at, at += PARTIAL_WORDS;
    channels.activated = at;
    return channels;
}

// Adds a projection's rows to the residual stream. A block owns the same rows of it in every layer and keeps them in
// float32 in shared memory; the others get the words.
struct ResidualFinish {
    const Consumer* consumer;
    float* residual;  // shared: rows first_group(HIDDEN / 8, block) * 8 and up
    u32* channel;
    u32 tag;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int thread = consumer->thread;
        if (thread >= groups * 8) return;
        int row = group * 8 + thread, own = row - 8 * first_group(HIDDEN / 8, consumer->block);
        residual[own] += sum(thread);
        publish(channel + row, residual[own], tag);
    }
};
