// The delta rule and the gated norm. An item is one value head of one row; its state comes through the ring of the
// weights, STATE_STAGES stages of 32 value columns, of which a warp has four. A block has the same items in every layer
// of every step, so that no other block reads or writes their states, and they can be on their way long before.
#pragma once

#include "batch/model.cuh"
#include "primitive/bulk.cuh"

constexpr int WARP_COLUMNS = VALUE_HEAD_DIM / CONSUMER_WARPS;
constexpr int STATE_BYTES = VALUE_HEAD_DIM * KEY_HEAD_DIM * 4;  // of a head
constexpr int STATE_STAGES = STATE_BYTES / STAGE_BYTES, STAGE_COLUMNS = VALUE_HEAD_DIM / STATE_STAGES, COLUMNS_AT_ONCE = STAGE_COLUMNS / CONSUMER_WARPS;
static_assert(WARP_COLUMNS == 16 && KEY_HEAD_DIM == 128, "two sums a column make 32, one a lane; a lane has 4 keys");
static_assert(STATE_BYTES % STAGE_BYTES == 0 && COLUMNS_AT_ONCE == 4, "sums of two stages are made at once");

// This block's first item from `item` on, in a step of that parity; a.rows * VALUE_HEADS or more if there is none.
__device__ __forceinline__ int next_item(const BatchArguments& a, const Rows& rows, int parity, int item) {
    while (item < a.rows * VALUE_HEADS && !rows.streamed[parity][item / VALUE_HEADS]) item += BLOCKS;
    return item;
}
__device__ __forceinline__ float* head_state(const Rows& rows, int layer, int item) {
    return recurrent_state(rows.state[item / VALUE_HEADS], layer) + (long long)(item % VALUE_HEADS) * VALUE_HEAD_DIM * KEY_HEAD_DIM;
}

// ---- producer ----

// Fills a stage with `bytes` (a multiple of 512) of a state. Other than weights it is written in the same launch.
__device__ __forceinline__ void fill_state_stage(Ring& ring, RingPosition at, const u8* source, u32 bytes) {
#if __CUDA_ARCH__ >= 800
    fill_stage(ring, at, source, bytes);
#else
    uint4* slot = (uint4*)(ring.slots + at.slot * STAGE_BYTES);
#pragma unroll 8
    for (u32 i = threadIdx.x % 32; i < bytes / 16; i += 32) slot[i] = load_l2(source + 16 * i);
    mark_landed(ring, at.stage + 1);
#endif
}

// ---- consumers ----

// Column i of a lane's 16 value columns.
__device__ __forceinline__ int value_column(const Consumer& c, int i) { return i / COLUMNS_AT_ONCE * STAGE_COLUMNS + c.warp * COLUMNS_AT_ONCE + i % COLUMNS_AT_ONCE; }

__device__ __forceinline__ float dot_product(float4 a, float4 b) { return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x))); }

// What in_proj left for an item: a lane's four keys, and for lanes 2 i and 2 i + 1 what belongs to column i.
struct ItemInputs {
    float4 q, k;
    float v, gate, beta, log_decay;

    __device__ __forceinline__ void load(const Consumer& c, const BatchArguments& a, int item) {
        int head = item % VALUE_HEADS;
        const float* projected = a.projected + (long long)(item / VALUE_HEADS) * PROJECTED_STRIDE;
        const float* keys = projected + head / (VALUE_HEADS / KEY_HEADS) * KEY_HEAD_DIM + 4 * c.lane;
        int own = head * VALUE_HEAD_DIM + value_column(c, c.lane / 2);
        const float* gates = projected + CONV_DIM + VALUE_DIM + head;
        q = load_l2_float4(keys), k = load_l2_float4(keys + KEY_DIM);
        v = load_l2_float(projected + 2 * KEY_DIM + own), gate = load_l2_float(projected + CONV_DIM + own);
        beta = load_l2_float(gates), log_decay = load_l2_float(gates + VALUE_HEADS);
    }
};

// All items of this block, up to the last state's way back to memory: ahead of that it arrives at the next barrier.
__device__ __forceinline__ void delta_rules(Consumer& c, const BatchArguments& a, const Rows& rows, GridBarrier& barrier, int layer, int parity,
                                            float (*squares)[CONSUMER_WARPS]) {
    int end = a.rows * VALUE_HEADS, item = next_item(a, rows, parity, c.block);
    ItemInputs in;
    in.load(c, a, min(item, end - 1));
    if (item >= end) barrier.arrive(c);
#pragma unroll 1
    while (item < end) {
        float4 q = in.q, k = in.k;
        float v = in.v, gate = in.gate, beta = in.beta, decay = __expf(in.log_decay);
        int next = next_item(a, rows, parity, item + BLOCKS);
        bool last = next >= end, active = rows.kind[item / VALUE_HEADS] != ROW_IDLE;
        in.load(c, a, last ? item : next);
        float pairs[4] = {dot_product(q, q), dot_product(k, k), dot_product(k, q), 0};
        float pair = warp_sum_scatter(pairs, c.lane), mine = 0;
        float4 state[WARP_COLUMNS];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // two stages at a time: 16 sums
            float sums[WARP_COLUMNS];
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
                const float4* source = (const float4*)(c.ring.slots + c.next.slot * STAGE_BYTES) + c.warp * COLUMNS_AT_ONCE * (KEY_HEAD_DIM / 4) + c.lane;
#pragma unroll
                for (int i = 0; i < COLUMNS_AT_ONCE; ++i) {
                    float4 column = source[i * (KEY_HEAD_DIM / 4)];
                    state[(2 * half + s) * COLUMNS_AT_ONCE + i] = column;
                    sums[2 * (s * COLUMNS_AT_ONCE + i)] = dot_product(column, k), sums[2 * (s * COLUMNS_AT_ONCE + i) + 1] = dot_product(column, q);
                }
                c.next.advance();
                if (s) release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
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
        float square = warp_sum(c.lane % 2 ? 0.0f : __fmul_rn(o, o));
        if (c.lane == 0) squares[c.buffer][c.warp] = square;
        consumer_barrier();
        float total = 0;
#pragma unroll
        for (int w = 0; w < CONSUMER_WARPS; ++w) total += squares[c.buffer][w];
        c.buffer ^= 1;
        float y = o * rsqrtf(total / VALUE_HEAD_DIM + NORM_EPS) * gate;
        int place = item % VALUE_HEADS * VALUE_HEAD_DIM + value_column(c, c.lane / 2);
        if (active && c.lane % 2 == 0) *operand_place<VALUE_DIM>(a.mixed, item / VALUE_HEADS, place) = to_16_bit(y);
        if (last) barrier.arrive(c);
        float* to = head_state(rows, layer, item) + c.warp * COLUMNS_AT_ONCE * KEY_HEAD_DIM + 4 * c.lane;
        float change = k_scale * delta;
#pragma unroll
        for (int i = 0; i < WARP_COLUMNS; ++i) {
            float d = __shfl_sync(0xFFFFFFFFu, change, 2 * i);
            float4 old = state[i];
            float4 updated = make_float4(fmaf(k.x, d, decay * old.x), fmaf(k.y, d, decay * old.y), fmaf(k.z, d, decay * old.z), fmaf(k.w, d, decay * old.w));
            store4_if(to + (i / COLUMNS_AT_ONCE * STAGE_COLUMNS + i % COLUMNS_AT_ONCE) * KEY_HEAD_DIM, updated, active);
        }
        item = next;
    }
}
