// The delta rule and the gated norm. An item is one value head of one row; a warp has 16 of the head's value columns,
// whose state it reads and writes once.
#pragma once

#include "batch/model.cuh"

constexpr int WARP_COLUMNS = VALUE_HEAD_DIM / CONSUMER_WARPS;
static_assert(WARP_COLUMNS == 16 && KEY_HEAD_DIM == 128, "two sums a column make 32, one a lane; a lane has 4 keys");

// Columns of the item after that are loaded as early: as many as there are registers for (see warp.cuh).
#if __CUDA_ARCH__ >= 900
constexpr int AHEAD = WARP_COLUMNS / 2;
#else
constexpr int AHEAD = 1;
#endif

// Keys 4 l to 4 l + 3 of columns of a state.
template <int COLUMNS>
struct StateOf {
    float4 column[COLUMNS];
};
using HeadState = StateOf<WARP_COLUMNS>;
using NextState = StateOf<AHEAD>;

__device__ __forceinline__ float* head_state(const Rows& rows, int n, int layer, int head, const Consumer& c) {
    return recurrent_state(rows.state[n], layer) + ((long long)head * VALUE_HEAD_DIM + c.warp * WARP_COLUMNS) * KEY_HEAD_DIM + 4 * c.lane;
}

__device__ __forceinline__ bool is_item(const BatchArguments& a, const Rows& rows, int item) { return item < a.rows * VALUE_HEADS && rows.kind[item / VALUE_HEADS]; }

template <int COLUMNS>
__device__ __forceinline__ void load_state(const Consumer& c, const BatchArguments& a, const Rows& rows, int layer, int item, StateOf<COLUMNS>& s) {
    bool wanted = is_item(a, rows, item);
    const float* from = head_state(rows, wanted ? item / VALUE_HEADS : 0, layer, item % VALUE_HEADS, c);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) load_l2_if(s.column[i], from + i * KEY_HEAD_DIM, wanted);
}

__device__ __forceinline__ float dot_product(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }

// What becomes of the state: column i is decay * column + k * delta of lane 2 i.
struct Update {
    float decay, delta;
    float4 k;
};

// Leaves an item's output, after the gated norm, for the projection that follows.
__device__ __forceinline__ Update delta_output(Consumer& c, const BatchArguments& a, int item, const HeadState& s, float (*squares)[CONSUMER_WARPS]) {
    int n = item / VALUE_HEADS, head = item % VALUE_HEADS;
    const float* projected = a.projected + (long long)n * PROJECTED_STRIDE;
    const float* keys = projected + head / (VALUE_HEADS / KEY_HEADS) * KEY_HEAD_DIM + 4 * c.lane;
    int own = head * VALUE_HEAD_DIM + c.warp * WARP_COLUMNS + c.lane / 2;  // lanes 2 i and 2 i + 1 speak for column i
    float4 q = load_l2_float4(keys), k = load_l2_float4(keys + KEY_DIM);
    float v = load_l2_float(projected + 2 * KEY_DIM + own), gate = load_l2_float(projected + CONV_DIM + own);
    const float* gates = projected + CONV_DIM + VALUE_DIM + head;
    float beta = load_l2_float(gates), decay = __expf(load_l2_float(gates + VALUE_HEADS));
    float pairs[4] = {dot_product(q, q), dot_product(k, k), dot_product(k, q), 0};
    float pair = warp_sum_scatter(pairs, c.lane), mine = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the columns: 16 sums at a time leave room for the states
        float sums[WARP_COLUMNS];
#pragma unroll
        for (int i = 0; i < WARP_COLUMNS / 2; ++i) {
            float4 column = s.column[half * WARP_COLUMNS / 2 + i];
            sums[2 * i] = dot_product(column, k), sums[2 * i + 1] = dot_product(column, q);
        }
        float sum = __shfl_sync(0xFFFFFFFFu, warp_sum_scatter(sums, c.lane), 2 * c.lane % 32);
        if (c.lane / 16 == half) mine = sum;
    }
    float qq = __shfl_sync(0xFFFFFFFFu, pair, 0), kk = __shfl_sync(0xFFFFFFFFu, pair, 8), kq = __shfl_sync(0xFFFFFFFFu, pair, 16);
    float other = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
    float sk = c.lane % 2 ? other : mine, sq = c.lane % 2 ? mine : other;
    float q_scale = rsqrtf(qq + 1e-6f) * rsqrtf((float)KEY_HEAD_DIM), k_scale = rsqrtf(kk + 1e-6f);
    // S^T k and S^T q come from the state before its update.
    float delta = beta * fmaf(-(decay * k_scale), sk, v);
    float o = fmaf(delta, kq * k_scale * q_scale, decay * q_scale * sq);
    float sum = warp_sum(c.lane % 2 ? 0.0f : __fmul_rn(o, o));
    if (c.lane == 0) squares[c.buffer][c.warp] = sum;
    consumer_barrier();
    float total = 0;
#pragma unroll
    for (int w = 0; w < CONSUMER_WARPS; ++w) total += squares[c.buffer][w];
    c.buffer ^= 1;
    float y = o * rsqrtf(total / VALUE_HEAD_DIM + NORM_EPS) * gate;
    if (c.lane % 2 == 0) *operand_place<VALUE_DIM>(a.mixed, n, own) = to_16_bit(y);
    return {decay, k_scale * delta, k};
}

// `s` and `next`: the states of this block's first item and a half, loaded ahead of the barrier. Ends with the arrival at the
// next barrier, ahead of the last state's way back to memory: no other block reads it. A column whose update is done
// gives its registers to the items to come, so that loads are under way all the time.
__device__ __forceinline__ void delta_rules(Consumer& c, const BatchArguments& a, const Rows& rows, GridBarrier& barrier, int layer, HeadState& s, NextState& next,
                                            float (*squares)[CONSUMER_WARPS]) {
    int items = a.rows * VALUE_HEADS;
#pragma unroll 1
    for (int item = c.block;; item += BLOCKS) {
        bool active = is_item(a, rows, item), last = item + BLOCKS >= items;
        Update u = {};
        if (active) u = delta_output(c, a, item, s, squares);
        if (last) barrier.arrive(c);
        float* to = active ? head_state(rows, item / VALUE_HEADS, layer, item % VALUE_HEADS, c) : nullptr;
        auto place = [&](int later, bool wanted) -> const float* { return wanted ? head_state(rows, later / VALUE_HEADS, layer, later % VALUE_HEADS, c) : nullptr; };
        bool wants_next = is_item(a, rows, item + BLOCKS), wants_later = is_item(a, rows, item + 2 * BLOCKS);
        const float *from_next = place(item + BLOCKS, wants_next), *from_later = place(item + 2 * BLOCKS, wants_later);
#pragma unroll
        for (int i = 0; i < WARP_COLUMNS; ++i) {
            float d = __shfl_sync(0xFFFFFFFFu, u.delta, 2 * i);
            float4 old = s.column[i];
            float4 updated = make_float4(fmaf(u.k.x, d, u.decay * old.x), fmaf(u.k.y, d, u.decay * old.y), fmaf(u.k.z, d, u.decay * old.z), fmaf(u.k.w, d, u.decay * old.w));
            if (active) *(float4*)(to + i * KEY_HEAD_DIM) = updated;
            if (i < AHEAD) {
                s.column[i] = next.column[i];
                load_l2_if(next.column[i], from_later + i * KEY_HEAD_DIM, wants_later);
            } else {
                load_l2_if(s.column[i], from_next + i * KEY_HEAD_DIM, wants_next);
            }
        }
        if (last) break;
    }
}
