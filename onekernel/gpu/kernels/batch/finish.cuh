// What becomes of the products: each finish has the sums for a thread's row of a pair of row groups and some rows of the
// batch (Place in gemm.cuh), scaled by the norm of the input where there is one.
#pragma once

#include "batch/gemm.cuh"

// 1 / rms of each row's residual stream in a pass, from the sums of squares that the blocks left. Ready behind the next
// barrier. Four blocks' make a word, every eighth word a part, and eight parts the sum: the same order whether 8 or 4
// threads take a row. All loads are on their way at once.
__device__ __forceinline__ void find_inverse_rms(const Consumer& c, const BatchArguments& a, float* inverse, int pass) {
    constexpr int PARTS = 8, TOGETHER = PASS_COLUMNS <= 32 ? PARTS : 4;  // threads a row
    constexpr int WORDS = SQUARES_STRIDE / 4, EACH = (WORDS + PARTS - 1) / PARTS;
    static_assert(TOGETHER * PASS_COLUMNS <= CONSUMER_WARPS * 32, "a thread has one row");
    int own = c.thread / TOGETHER, n = pass * PASS_COLUMNS + own, part = c.thread % TOGETHER;
    bool wanted = own < PASS_COLUMNS && n < a.rows;
    const float* row = a.squares + (wanted ? n : 0) * SQUARES_STRIDE;
    float4 v[PARTS / TOGETHER][EACH];
#pragma unroll
    for (int p = 0; p < PARTS / TOGETHER; ++p)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            int word = part + p * TOGETHER + i * PARTS;
            v[p][i] = make_float4(0, 0, 0, 0);
            load_l2_if(v[p][i], row + 4 * word, wanted && word < WORDS);
            if (BLOCKS % 4 && word == WORDS - 1) {
                v[p][i].w = 0;
                if (BLOCKS % 4 < 3) v[p][i].z = 0;
                if (BLOCKS % 4 < 2) v[p][i].y = 0;
            }
        }
    float total = 0;
#pragma unroll
    for (int p = 0; p < PARTS / TOGETHER; ++p) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum += (v[p][i].x + v[p][i].y) + (v[p][i].z + v[p][i].w);
        total = p ? total + sum : sum;
    }
#pragma unroll
    for (int offset = TOGETHER / 2; offset; offset /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
    if (wanted && part == 0) inverse[n] = rsqrtf(total / HIDDEN + NORM_EPS);
}

struct Finish {
    const Consumer* consumer;
    const BatchArguments* arguments;
    const Rows* rows;
    float* inverse;       // shared: 1 / rms of each row's input
    volatile u32* quiet;  // shared: see hush

    __device__ __forceinline__ void hush_producer() { hush(quiet); }
    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void prepare(int, int, int, int) {}
    __device__ __forceinline__ void end(int) {}
    // Takes the stage of windows behind the weights of rows `first` and up, if there is one.
    __device__ __forceinline__ bool take_windows(Consumer&, int) { return false; }
};

// Of a product whose input is the residual stream, times the weights of the norm and in 16 bits.
struct NormedFinish : Finish {
    __device__ __forceinline__ void begin(int pass) {
        find_inverse_rms(*consumer, *arguments, inverse, pass);
    }
};

constexpr int LINEAR_ROWS = 8 * (((PROJECTED_LINEAR + 7) / 8 + BLOCKS - 1) / BLOCKS);  // of a block

// in_proj: q, k, v pass the causal convolution (this thread alone has the channel's window) and SiLU; z becomes gate =
// norm weight * silu(z); b becomes beta; a becomes the log of the decay.
struct LinearProjection : NormedFinish {
    int index;           // of the layer
    const float4* taps;  // shared: see load_taps
    float4 window[NormedPlace::UNITS][NormedPlace::ELEMENTS];  // where they do not come through the ring
    const u8* stage;    // where they do; of rows stage_first and up
    int stage_first;

    __device__ __forceinline__ bool take_windows(Consumer& c, int first) {
        if (!WINDOWS_IN_RING || first >= CONV_DIM) return false;
        if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
        stage = c.ring.slots + c.next.slot * STAGE_BYTES, stage_first = first;
        c.next.advance();
        return true;
    }
    __device__ __forceinline__ void prepare(int unit, int pass, int first, int count) {
        if (WINDOWS_IN_RING || first >= CONV_DIM) return;
        each_element<NormedPlace>(*consumer, [&](int i, int row, int column) {
            int n = pass * PASS_COLUMNS + column;
            bool wanted = row < count && first + row < CONV_DIM && n < arguments->rows && rows->kind[n];
            load_l2_if(window[unit][i], conv_window(rows->state[wanted ? n : 0], index) + 4 * (first + row), wanted);
        });
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int unit, int pass, int first, int count, Sum sum) {
        int own_first = 8 * first_group((PROJECTED_LINEAR + 7) / 8, consumer->block);
        each_element<NormedPlace>(*consumer, [&](int i, int local, int column) {
            int n = pass * PASS_COLUMNS + column, row = first + local;
            if (local >= count || row >= PROJECTED_LINEAR || n >= arguments->rows || !rows->kind[n]) return;
            float y = __fmul_rn(sum(i), inverse[n]);
            float4 t = taps[row - own_first];
            bool is_decay = row >= CONV_DIM + VALUE_DIM + VALUE_HEADS;
            if (row < CONV_DIM) {
                float4 w = WINDOWS_IN_RING ? *(const float4*)(stage + n * WINDOW_BYTES + (row - stage_first) * 16) : window[unit][i];
                store4_if(conv_window(rows->state[n], index) + 4 * row, make_float4(w.y, w.z, w.w, y), true);
                y = fmaf(t.w, y, fmaf(t.z, w.w, fmaf(t.y, w.z, t.x * w.y)));
            }
            if (!is_decay) {
                float gate = quick_sigmoid(y);
                y = row < CONV_DIM ? y * gate : row < CONV_DIM + VALUE_DIM ? t.x * (y * gate) : gate;
            } else {
                float x = y + t.x;
                y = t.y * softplus(x);
            }
            arguments->projected[(long long)n * PROJECTED_STRIDE + row] = y;
        });
    }
};

// Of this block's rows of in_proj what they need of the parameters: they do not depend on the step, and come ahead of it.
__device__ __forceinline__ void load_taps(const Consumer& c, const BatchArguments& a, float4* taps, int index) {
    constexpr int GROUPS = (PROJECTED_LINEAR + 7) / 8;
    if (index >= LAYERS || is_full(index)) return;
    LinearLayer layer = linear_layer(a, index);
    int first = 8 * first_group(GROUPS, c.block), end = min(8 * first_group(GROUPS, c.block + 1), PROJECTED_LINEAR);
#pragma unroll 1
    for (int row = first + c.thread; row < end; row += CONSUMER_WARPS * 32) {
        float4 t = make_float4(0, 0, 0, 0);
        if (row < CONV_DIM) {
            t = load_constant4(layer.conv_weight + 4 * row);
        } else if (row < CONV_DIM + VALUE_DIM) {
            t.x = load_constant(layer.gated_norm + (row - CONV_DIM) % VALUE_HEAD_DIM);
        } else if (row >= PROJECTED_LINEAR - VALUE_HEADS) {
            t.x = load_constant(layer.dt_bias + row - (PROJECTED_LINEAR - VALUE_HEADS));
            t.y = load_constant(layer.negative_decay_rate + row - (PROJECTED_LINEAR - VALUE_HEADS));
        }
        taps[row - first] = t;
    }
}

// Asks for the conv windows that this block's LinearProjection will want: they are in memory, and a product is short.
__device__ __forceinline__ void prefetch_windows(const Consumer& c, const BatchArguments& a, const Rows& rows, int layer) {
    constexpr int GROUPS = (PROJECTED_LINEAR + 7) / 8;
    if (WINDOWS_IN_RING || layer >= LAYERS || is_full(layer)) return;
    int first = 8 * first_group(GROUPS, c.block), end = min(8 * first_group(GROUPS, c.block + 1), CONV_DIM), lines = (end - first + 7) / 8;
#pragma unroll 1
    for (int i = c.thread; i < a.rows * lines; i += CONSUMER_WARPS * 32)
        if (int n = i / lines; rows.kind[n]) prefetch_l2(conv_window(rows.state[n], layer) + 4 * (first + 8 * (i % lines)));
}

struct FullProjection : NormedFinish {
    template <class Sum>
    __device__ __forceinline__ void operator()(int, int pass, int first, int count, Sum sum) {
        each_element<NormedPlace>(*consumer, [&](int i, int local, int column) {
            int n = pass * PASS_COLUMNS + column, row = first + local;
            if (local < count && row < PROJECTED_FULL && n < arguments->rows)
                arguments->projected[(long long)n * PROJECTED_STRIDE + row] = __fmul_rn(sum(i), inverse[n]);
        });
    }
};

constexpr int RESIDUAL_PAIRS = (RESIDUAL_ROWS + 15) / 16;

// Adds a projection's rows to the residual stream, of which a block keeps the same rows in every layer, and leaves the
// input of the next product: residual * norm weight in 16 bits, and the block's sum of squares.
struct ResidualUpdate : Finish {
    const float* weight;  // of the norm that comes next
    float (*residual)[BATCH_COLUMNS];  // shared: [own row][row of the batch]
    float (*squares)[BATCH_COLUMNS];   // shared: [pair of own groups][row of the batch]
    float scale;

    __device__ __forceinline__ void prepare(int, int, int first, int count) {
        int local = ResidualPlace::row(*consumer);
        scale = local < count ? load_constant(weight + first + local) : 0.0f;
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int, int pass, int first, int count, Sum sum) {
        int own = first - 8 * first_group(HIDDEN / 8, consumer->block), local = ResidualPlace::row(*consumer);
        bool valid = local < count;
        each_element<ResidualPlace>(*consumer, [&](int i, int, int column) {
            int n = pass * PASS_COLUMNS + column;
            float x = 0;
            if (valid) {
                x = residual[own + local][n] += sum(i);
                *operand_place<HIDDEN>(arguments->input, n, first + local) = to_16_bit(x * scale);
            }
            x = __fmul_rn(x, x);
#pragma unroll
            for (int offset = 1; offset < 16; offset *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
            if (local) return;
            if (RESIDUAL_PAIRS == 1)
                arguments->squares[n * SQUARES_STRIDE + consumer->block] = x;
            else
                squares[own / 16][n] = x;
        });
    }
    __device__ __forceinline__ void end(int pass) {
        if (RESIDUAL_PAIRS == 1) return;
        consumer_barrier();
        int n = pass * PASS_COLUMNS + consumer->thread, first = first_group(HIDDEN / 8, consumer->block), groups = first_group(HIDDEN / 8, consumer->block + 1) - first;
        if (consumer->thread >= PASS_COLUMNS) return;
        float sum = 0;
#pragma unroll 1
        for (int i = 0; i < (groups + 1) / 2; ++i) sum += squares[i][n];
        arguments->squares[n * SQUARES_STRIDE + consumer->block] = sum;
    }
};

// silu(gate) * up: of each 8 rows, 4 are of gate_proj and 4 the same of up_proj.
struct Activation : NormedFinish {
    template <class Sum>
    __device__ __forceinline__ void operator()(int, int pass, int first, int count, Sum sum) {
        each_element<NormedPlace>(*consumer, [&](int i, int local, int column) {
            int n = pass * PASS_COLUMNS + column, channel = first / 2 + local / 8 * 4 + local % 4;
            float y = __fmul_rn(sum(i), inverse[n]), up = __shfl_down_sync(0xFFFFFFFFu, y, NormedPlace::UP);
            if (local % 8 < 4 && local < count) *operand_place<INTERMEDIATE>(arguments->activated, n, channel) = to_16_bit(y * quick_sigmoid(y) * up);
        });
    }
};

// The LM head: this thread's best token for each of its rows of the batch; the logits of rows that are sampled are kept.
struct TokenScores : NormedFinish {
    Candidate best[NormedPlace::COLUMNS];

    __device__ __forceinline__ void begin(int pass) {
        NormedFinish::begin(pass);
#pragma unroll
        for (int i = 0; i < NormedPlace::COLUMNS; ++i) best[i] = {0, 0xFFFFFu};
    }
    template <class Sum>
    __device__ __forceinline__ void operator()(int, int pass, int first, int count, Sum sum) {
        each_element<NormedPlace>(*consumer, [&](int i, int local, int column) {
            int n = hidden(pass * PASS_COLUMNS + column), row = first + local;
            float logit = __fmul_rn(sum(i), inverse[n]);
            if (local >= count || row >= VOCAB) return;
            if (rows->kind[n] == ROW_SAMPLED) {
                const BatchRow& r = arguments->row_table[n];
                if (r.logits) r.logits[row] = logit;
                r.sampling.scores[row] = logit;
            }
            if (row < VOCABULARY_SIZE) best[i / NormedPlace::ROWS].offer(ordered(logit), row);
        });
    }
    __device__ __forceinline__ void end(int pass) {
#pragma unroll
        for (int i = 0; i < NormedPlace::COLUMNS; ++i) {
            Candidate b = best[i];
#pragma unroll
            for (int offset = NormedPlace::FIRST_ROW_BIT; offset <= NormedPlace::LAST_ROW_BIT; offset *= 2)
                b.offer(__shfl_xor_sync(0xFFFFFFFFu, b.key, offset), __shfl_xor_sync(0xFFFFFFFFu, b.id, offset));
            int n = pass * PASS_COLUMNS + NormedPlace::column(*consumer, i), place = NormedPlace::candidate(*consumer);
            if ((consumer->lane & (2 * NormedPlace::LAST_ROW_BIT - NormedPlace::FIRST_ROW_BIT)) == 0)
                store_relaxed64(arguments->candidates + (n * NormedPlace::CANDIDATES + place) * BLOCKS + consumer->block, (u64)b.key << 32 | (0xFFFFFFFFu - b.id));
        }
    }
};
