// Where things lie in device memory: parameters and state of each layer, and the channels between blocks.
// The order of the parameters is that of gpu/parameters.py, the order of the state that of State in gpu/decoder.py.
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

constexpr int PROJECTED_LINEAR = CONV_DIM + VALUE_DIM + 2 * VALUE_HEADS;  // rows: q, k, v | z | b | a
constexpr int PROJECTED_FULL = 2 * QUERY_DIM + 2 * KV_DIM;                // rows: per head 256 query and 256 gate | k | v
// Of a head of the delta rule: its output times the gate, not normed yet, and the sum of squares of each pair of it.
constexpr int PAIRS_PER_HEAD = VALUE_HEAD_DIM / 2;
constexpr int MIXED_HEAD = VALUE_HEAD_DIM + PAIRS_PER_HEAD;
constexpr int MIXED_LINEAR = VALUE_HEADS * MIXED_HEAD;

// The vectors that blocks exchange; each has two buffers, used by even and odd layers in turn.
struct Channels {
    u32* after_mixer;  // [COPIES, HIDDEN]: the residual stream
    u32* after_mlp;    // [COPIES, HIDDEN]
    u32* projected;    // [PROJECTED]: outputs of in_proj or of q, k, v
    u32* mixed;        // [COPIES, VALUE_HEADS, MIXED_HEAD]: the delta rule's output; or [COPIES, QUERY_DIM]: attention's
    u32* partial;      // [HEADS, MAX_SPLITS, HEAD_DIM + 4]: attention over a part of the context
    u32* activated;    // [COPIES, INTERMEDIATE]
};

__device__ constexpr int round8(int n) { return (n + 7) / 8 * 8; }  // eight words are a sector
constexpr int PROJECTED_WORDS = round8(PROJECTED_LINEAR > PROJECTED_FULL ? PROJECTED_LINEAR : PROJECTED_FULL);
constexpr int MIXED_WORDS = MIXED_LINEAR > QUERY_DIM ? MIXED_LINEAR : QUERY_DIM;
constexpr int PARTIAL_WORDS = round8(HEADS * MAX_SPLITS * (HEAD_DIM + 4));
constexpr int CHANNEL_WORDS = COPIES * (2 * HIDDEN + MIXED_WORDS + INTERMEDIATE) + PROJECTED_WORDS + PARTIAL_WORDS;

__device__ __forceinline__ Channels channels_of(u32* exchange, int layer) {
    u32* at = exchange + (layer & 1) * CHANNEL_WORDS;
    Channels channels;
    channels.after_mixer = at, at += COPIES * HIDDEN;
    channels.after_mlp = at, at += COPIES * HIDDEN;
    channels.projected = at, at += PROJECTED_WORDS;
    channels.mixed = at, at += COPIES * MIXED_WORDS;
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

    static constexpr bool EXCHANGED = true;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int thread = consumer->thread;
        if (thread >= groups * 8) return;
        int row = group * 8 + thread, own = row - 8 * first_group(HIDDEN / 8, consumer->block);
        residual[own] += sum(thread);
        publish_to_all<HIDDEN>(channel, row, residual[own], tag);
    }
};
