// The delta rule and the gated norm. An item is one value head of one row; a warp has 16 of the head's value columns,
// whose state it reads and writes once.
#pragma once

#include "batch/model.cuh"

constexpr int WARP_COLUMNS = VALUE_HEAD_DIM / CONSUMER_WARPS;
static_assert(WARP_COLUMNS == 16 && KEY_HEAD_DIM == 128, "two sums a column make 32, one a lane; a lane has 4 keys");

struct HeadState {
    float4 column[WARP_COLUMNS];  // keys 4 l to 4 l + 3 of each
};

__device__ __forceinline__ float* head_state(const Rows& rows, int n, int layer, int head, const Consumer& c) {
    return recurrent_state(rows.state[n], layer) + ((long long)head * VALUE_HEAD_DIM + c.warp * WARP_COLUMNS) * KEY_HEAD_DIM + 4 * c.lane;
}

__device__ __forceinline__ void load_state(const Consumer& c, const BatchArguments& a, const Rows& rows, int layer, int item, HeadState& s) {
    int n = min(item / VALUE_HEADS, a.rows - 1);  // any state will do where there is no item: a branch here costs registers
    const float* from = head_state(rows, n, layer, item % VALUE_HEADS, c);
#pragma unroll
    for (int i = 0; i < WARP_COLUMNS; ++i) s.column[i] = load_l2_float4(from + i * KEY_HEAD_DIM);
}

__device__ __forceinline__ void delta_rule(Consumer& c, const BatchArguments& a, const Rows& rows, int layer, int item, HeadState& s, float (*squares)[CONSUMER_WARPS]) {
    int n = item / VALUE_HEADS, head = item % VALUE_HEADS;
    if (!rows.kind[n]) return;  // the whole block
    const float* projected = a.projected + (long long)n * PROJECTED_STRIDE;
    const float* keys = projected + head / (VALUE_HEADS / KEY_HEADS) * KEY_HEAD_DIM + 4 * c.lane;
    int own = head * VALUE_HEAD_DIM + c.warp * WARP_COLUMNS + c.lane / 2;  // lanes 2 i and 2 i + 1 speak for column i
    float4 q = load_l2_float4(keys), k = load_l2_float4(keys + KEY_DIM);
    float v = load_l2_float(projected + 2 * KEY_DIM + own), gate = load_l2_float(projected + CONV_DIM + own);
    const float* gates = projected + CONV_DIM + VALUE_DIM + head;
    float beta = load_l2_float(gates), decay = __expf(load_l2_float(gates + VALUE_HEADS));
    float sums[2 * WARP_COLUMNS];
#pragma unroll
    for (int i = 0; i < WARP_COLUMNS; ++i) sums[2 * i] = dot4(s.column[i], k), sums[2 * i + 1] = dot4(s.column[i], q);
    float pairs[4] = {dot4(q, q), dot4(k, k), dot4(k, q), 0};
    float pair = warp_sum_scatter(pairs, c.lane), mine = warp_sum_scatter(sums, c.lane);
    float qq = __shfl_sync(0xFFFFFFFFu, pair, 0), kk = __shfl_sync(0xFFFFFFFFu, pair, 8), kq = __shfl_sync(0xFFFFFFFFu, pair, 16);
    float other = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
    float sk = c.lane % 2 ? other : mine, sq = c.lane % 2 ? mine : other;
    float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)KEY_HEAD_DIM), k_scale = rsqrtf(kk + 1e-6f);
    // S^T k and S^T q come from the state before its update.
    float delta = beta * (v - decay * k_scale * sk);
    float o = decay * q_scale * sq + delta * (kq * k_scale * q_scale);
    float sum = warp_sum(c.lane % 2 ? 0.0f : o * o);
    if (c.lane == 0) squares[c.buffer][c.warp] = sum;
    float* to = head_state(rows, n, layer, head, c);
#pragma unroll
    for (int i = 0; i < WARP_COLUMNS; ++i) {
        float d = k_scale * __shfl_sync(0xFFFFFFFFu, delta, 2 * i);
        *(float4*)(to + i * KEY_HEAD_DIM) = decayed_plus(decay, s.column[i], k, d);
    }
    consumer_barrier();
    float total = 0;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) total += squares[c.buffer][w];
    float y = o * rsqrtf(total / VALUE_HEAD_DIM + NORM_EPS) * gate;
    if (c.lane % 2 == 0) *operand_place<VALUE_DIM>(a.mixed, n, own) = to_16_bit(y);
    c.buffer ^= 1;
}

// `s`: the state of this block's first item, loaded ahead of the barrier.
__device__ __forceinline__ void delta_rules(Consumer& c, const BatchArguments& a, const Rows& rows, int layer, HeadState& s, float (*squares)[CONSUMER_WARPS]) {
#pragma unroll 1
    for (int item = c.block; item < a.rows * VALUE_HEADS; item += BLOCKS) {
        HeadState next;
        load_state(c, a, rows, layer, item + BLOCKS, next);
        delta_rule(c, a, rows, layer, item, s, squares);
#pragma unroll
        for (int i = 0; i < WARP_COLUMNS; ++i) s.column[i] = next.column[i];
    }
}
