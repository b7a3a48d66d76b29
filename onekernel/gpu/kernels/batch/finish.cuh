// What becomes of the products: each finish has the sums of 16 rows of weights (row threadIdx.x % 16) for some rows of
// the batch, scaled by the norm of the input where there is one.
#pragma once

#include "batch/gemm.cuh"

// 1 / rms of each row's residual stream, from the sums of squares that the blocks left. Ready behind the next barrier.
__device__ __forceinline__ void find_inverse_rms(const Consumer& c, const BatchArguments& a, float* inverse) {
#pragma unroll 1
    for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
        float total = 0;
#pragma unroll 4
        for (int block = c.lane; block < BLOCKS; block += 32) total += load_l2_float(a.squares + n * BLOCKS + block);
        total = warp_sum(total);
        if (c.lane == 0) inverse[n] = rsqrtf(total / HIDDEN + NORM_EPS);
    }
}

struct Finish {
    const Consumer* consumer;
    const BatchArguments* arguments;
    const Rows* rows;
    float* inverse;  // shared: 1 / rms of each row's input

    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void prepare(int, int, int) {}
    __device__ __forceinline__ void end(int) {}
};

// Of a product whose input is the residual stream, times the weights of the norm and in 16 bits.
struct NormedFinish : Finish {
    __device__ __forceinline__ void begin(int pass) {
        if (pass == 0) find_inverse_rms(*consumer, *arguments, inverse);
    }
};

// in_proj: q, k, v pass the causal convolution (this thread alone has the channel's window) and SiLU; z becomes gate =
// norm weight * silu(z); b becomes beta; a becomes the log of the decay.
struct LinearProjection : NormedFinish {
    LinearLayer layer;
    int index;  // of the layer
    float4 taps, window[COLUMNS_A_THREAD];

    __device__ __forceinline__ void prepare(int pass, int first, int count) {
        int row = first + consumer->thread % 16;
        if (consumer->thread % 16 >= count) return;
        if (row < CONV_DIM) {
            taps = load_constant4(layer.conv_weight + 4 * row);
            each_column(*consumer, [&](int i, int column) {
                int n = pass * PASS_COLUMNS + column;
                if (n < arguments->rows && rows->kind[n]) window[i] = *(const float4*)(conv_window(rows->state[n], index) + 4 * row);
            });
        } else if (row < CONV_DIM + VALUE_DIM) {
            taps.x = load_constant(layer.gated_norm + (row - CONV_DIM) % VALUE_HEAD_DIM);
        } else if (row >= PROJECTED_LINEAR - VALUE_HEADS && row < PROJECTED_LINEAR) {
            int head = row - (PROJECTED_LINEAR - VALUE_HEADS);
            taps.x = load_constant(layer.dt_bias + head);
            taps.y = load_constant(layer.negative_decay_rate + head);
        }
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int pass, int first, int count, Sum sum) {
        int row = first + consumer->thread % 16;
        if (consumer->thread % 16 >= count || row >= PROJECTED_LINEAR) return;
        each_column(*consumer, [&](int i, int column) {
            int n = pass * PASS_COLUMNS + column;
            if (n >= arguments->rows || !rows->kind[n]) return;
            float y = sum(column) * inverse[n];
            if (row < CONV_DIM) {
                float u = taps.x * window[i].y + taps.y * window[i].z + taps.z * window[i].w + taps.w * y;
                *(float4*)(conv_window(rows->state[n], index) + 4 * row) = make_float4(window[i].y, window[i].z, window[i].w, y);
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
            arguments->projected[(long long)n * PROJECTED_STRIDE + row] = y;
        });
    }
};

struct FullProjection : NormedFinish {
    template <class Sum>
    __device__ __forceinline__ void operator()(int pass, int first, int count, Sum sum) {
        int row = first + consumer->thread % 16;
        if (consumer->thread % 16 >= count || row >= PROJECTED_FULL) return;
        each_column(*consumer, [&](int, int column) {
            int n = pass * PASS_COLUMNS + column;
            if (n < arguments->rows) arguments->projected[(long long)n * PROJECTED_STRIDE + row] = sum(column) * inverse[n];
        });
    }
};

// Adds a projection's rows to the residual stream, of which a block keeps the same rows in every layer, and leaves the
// input of the next product: residual * norm weight in 16 bits, and the block's sum of squares.
struct ResidualUpdate : Finish {
    const float* weight;  // of the norm that comes next
    float (*residual)[BATCH_COLUMNS];  // shared: [own row][row of the batch]
    float* squares;                    // shared: [row of the batch], of the pairs of groups so far

    template <class Sum>
    __device__ __forceinline__ void operator()(int pass, int first, int count, Sum sum) {
        int own = first - 8 * first_group(HIDDEN / 8, consumer->block), local = consumer->thread % 16;
        bool valid = local < count;
        float scale = valid ? load_constant(weight + first + local) : 0.0f;
        each_column(*consumer, [&](int, int column) {
            int n = pass * PASS_COLUMNS + column;
            float x = 0;
            if (valid) {
                x = residual[own + local][n] += sum(column);
                *operand_place<HIDDEN>(arguments->input, n, first + local) = to_16_bit(x * scale);
            }
            x *= x;
#pragma unroll
            for (int offset = 1; offset < 16; offset *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
            if (local) return;
            if (own) x += squares[n];
            squares[n] = x;
            arguments->squares[n * BLOCKS + consumer->block] = x;
        });
    }
};

// silu(gate) * up: of each 8 rows, 4 are of gate_proj and 4 the same of up_proj.
struct Activation : NormedFinish {
    template <class Sum>
    __device__ __forceinline__ void operator()(int pass, int first, int count, Sum sum) {
        int local = consumer->thread % 16, channel = first / 2 + local / 8 * 4 + local % 4;
        each_column(*consumer, [&](int, int column) {
            int n = pass * PASS_COLUMNS + column;
            float y = sum(column) * inverse[n], up = __shfl_down_sync(0xFFFFFFFFu, y, 4);
            if (local % 8 < 4 && local < count) *operand_place<INTERMEDIATE>(arguments->activated, n, channel) = to_16_bit(silu(y) * up);
        });
    }
};

// The LM head: this thread's best token for each of its rows of the batch, and the scores of rows that are sampled.
struct TokenScores : NormedFinish {
    Candidate best[COLUMNS_A_THREAD];

    __device__ __forceinline__ void begin(int pass) {
        NormedFinish::begin(pass);
#pragma unroll
        for (int i = 0; i < COLUMNS_A_THREAD; ++i) best[i] = {0, 0xFFFFFu};
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int pass, int first, int count, Sum sum) {
        int row = first + consumer->thread % 16;
        if (consumer->thread % 16 >= count || row >= VOCAB) return;
        each_column(*consumer, [&](int i, int column) {
            int n = pass * PASS_COLUMNS + column;
            if (n >= arguments->rows || !rows->kind[n]) return;
            float logit = sum(column) * inverse[n];
            const BatchRow& r = arguments->row_table[n];
            if (r.logits) r.logits[row] = logit;
            if (row < VOCABULARY_SIZE) best[i].offer(rows->kind[n] == ROW_SAMPLED ? score_row(r.sampling, logit, row) : ordered(logit), row);
        });
    }
    __device__ __forceinline__ void end(int pass) {
        each_column(*consumer, [&](int i, int column) {
            Candidate b = best[i];
#pragma unroll
            for (int offset = 1; offset < 16; offset *= 2)
                b.offer(__shfl_xor_sync(0xFFFFFFFFu, b.key, offset), __shfl_xor_sync(0xFFFFFFFFu, b.id, offset));
            if (consumer->thread % 16 == 0) store_relaxed64(arguments->candidates + (pass * PASS_COLUMNS + column) * BLOCKS + consumer->block, (u64)b.key << 32 | (0xFFFFFFFFu - b.id));
        });
    }
};
