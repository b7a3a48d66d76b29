// The delta rule over chunks, second part: chunk after chunk, the state in registers.
//
// An item is (value head, SCAN_COLUMNS value columns): heads and columns do not depend on each other. With S the state
// that enters a chunk and the matrices of delta_chunks:
//     delta = U - W S,   output = (faded q) S + scores delta,   S <- exp(total) S + (faded k)^T delta.
// Eight warps multiply; S is kept in float32 in their accumulators and handed on as fp16 through shared memory.
#pragma once

#include "prefill/delta_chunks.cuh"

constexpr int SCAN_WARPS = 8;
constexpr int SCAN_PAIR = SCAN_COLUMNS / 16;  // fragments of 8 columns that a warp has of a [64, SCAN_COLUMNS] matrix
constexpr int SCAN_ROW = SCAN_COLUMNS * 2 + 16;  // bytes; padded so that 8 rows touch all banks
constexpr int SCAN_QUERY = CHUNK * HEAD_ROW, SCAN_KEY = 2 * CHUNK * HEAD_ROW, SCAN_SCORES = 3 * CHUNK * HEAD_ROW;
constexpr int SCAN_STAGE = SCAN_SCORES + CHUNK * CHUNK * 2;
constexpr int SCAN_BYTES = SCAN_STAGES * SCAN_STAGE + (KEY_HEAD_DIM + CHUNK) * SCAN_ROW;
static_assert(SCAN_COLUMNS == 16 || SCAN_COLUMNS == 32 || SCAN_COLUMNS == 64, "");
static_assert(KEY_HEAD_DIM == SCAN_WARPS * 16, "each warp has 16 rows of the state");

// The matrices of one chunk into a stage, by the warps that do not multiply.
__device__ __forceinline__ void load_scan_stage(const u8* item, u32 stage) {
    constexpr int LOADERS = WORKERS - 32 * SCAN_WARPS, HEAD_CHUNKS = 3 * CHUNK * HEAD_ROW / 16, SCORE_CHUNKS = CHUNK * CHUNK * 2 / 16;
    static_assert(WGMMA || ITEM_WEIGHT == 0 && ITEM_QUERY == SCAN_QUERY && ITEM_KEY == SCAN_KEY && ITEM_SCORES == SCAN_SCORES, "copied as one range");
    int t = thread_index() - 32 * SCAN_WARPS;
#pragma unroll 4
    for (int i = t; i < HEAD_CHUNKS; i += LOADERS)
        copy_async16(stage + swizzled<HEAD_ROW>(i / (HEAD_ROW / 16), i % (HEAD_ROW / 16)), item + 16 * i);
#pragma unroll 4
    for (int i = t; i < SCORE_CHUNKS; i += LOADERS)
        copy_async16(stage + SCAN_SCORES + swizzled<CHUNK * 2>(i / 8, i % 8), item + ITEM_SCORES + 16 * i);
}

__device__ __forceinline__ void scan_head(const PrefillArguments& a, const LinearLayer& layer, int head, int first_column, u32 shared) {
    constexpr int STATE_FRAGMENTS = SCAN_COLUMNS / 8;
    int warp = thread_index() / 32, lane = thread_index() % 32, chunks = (a.tokens + CHUNK - 1) / CHUNK;
    bool computes = warp < SCAN_WARPS;
    u32 state_rows = shared + SCAN_STAGES * SCAN_STAGE, delta_rows = state_rows + KEY_HEAD_DIM * SCAN_ROW;
    float* column = layer.recurrent_state + ((long long)head * VALUE_HEAD_DIM + first_column) * KEY_HEAD_DIM;
    int dim = 16 * (warp % SCAN_WARPS) + lane / 4;              // row of the state
    int row = 16 * (warp % 4) + lane / 4, part = warp / 4 % 2;  // token in the chunk; which half of the columns
    const u8* items = a.items + (long long)head * ITEM_BYTES;
    constexpr long long NEXT = (long long)VALUE_HEADS * ITEM_BYTES;

    // What a chunk adds to the products, fetched one chunk ahead.
    u32 own_delta[2 * SCAN_PAIR] = {};
    float own_fade = 0;
    auto fetch = [&](int chunk) {
        own_fade = a.fades[chunk * VALUE_HEADS + head];
#pragma unroll
        for (int n = 0; n < SCAN_PAIR; ++n) {
            const u32* u = (const u32*)(items + chunk * NEXT + ITEM_DELTA + row * HEAD_ROW + (first_column + 8 * (part * SCAN_PAIR + n)) * 2) + lane % 4;
            own_delta[2 * n] = u[0], own_delta[2 * n + 1] = u[8 * HEAD_ROW / 4];
        }
    };
    worker_sync();  // shared memory is free
    if (!computes)
#pragma unroll
        for (int i = 0; i < SCAN_STAGES - 1; ++i) {
            if (i < chunks) load_scan_stage(items + i * NEXT, shared + i * SCAN_STAGE);
            copy_commit();
        }
    else
        fetch(0);
    float state[STATE_FRAGMENTS][4] = {};
    if (computes)
#pragma unroll
        for (int n = 0; n < STATE_FRAGMENTS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state[n][i] = column[(8 * n + 2 * (lane % 4) + i % 2) * KEY_HEAD_DIM + dim + i / 2 * 8];
            store_shared(state_rows + dim * SCAN_ROW + 16 * n + 4 * (lane % 4), pack_half2(state[n][0], state[n][1]));
            store_shared(state_rows + (dim + 8) * SCAN_ROW + 16 * n + 4 * (lane % 4), pack_half2(state[n][2], state[n][3]));
        }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        u32 stage = shared + chunk % SCAN_STAGES * SCAN_STAGE;
        float delta[SCAN_PAIR][4], output[SCAN_PAIR][4] = {};
        float fade = own_fade;
#pragma unroll
        for (int n = 0; n < SCAN_PAIR; ++n) {
            float2 first = unpack_half2(own_delta[2 * n]), second = unpack_half2(own_delta[2 * n + 1]);
            delta[n][0] = first.x, delta[n][1] = first.y, delta[n][2] = second.x, delta[n][3] = second.y;
        }
        if (SCAN_STAGES == 1) {
            worker_sync();  // the only stage is read
            if (!computes) load_scan_stage(items + chunk * NEXT, stage);
            copy_commit();
        }
        copy_wait<SCAN_STAGES == 1 ? 0 : SCAN_STAGES - 2>();
        worker_sync();  // this chunk's matrices and the state are there; the chunk before is done
        if (!computes && SCAN_STAGES > 1) {
            int ahead = chunk + SCAN_STAGES - 1;
            if (ahead < chunks) load_scan_stage(items + ahead * NEXT, shared + ahead % SCAN_STAGES * SCAN_STAGE);
            copy_commit();
        }
        if (computes && chunk + 1 < chunks) fetch(chunk + 1);
        if (computes) {
#pragma unroll
            for (int k = 0; k < KEY_HEAD_DIM / 16; k += 2) {
                u32 weight[2][4], query[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    u32 at = swizzled<HEAD_ROW>(16 * (warp % 4) + lane % 16, 2 * (k + i) + lane / 16);
                    load_matrix(weight[i], stage + at);
                    load_matrix(query[i], stage + SCAN_QUERY + at);
                }
#pragma unroll
                for (int n = 0; n < SCAN_PAIR; ++n) {
                    u32 b[4];
                    load_matrix_transposed(b, state_rows + (16 * k + lane) * SCAN_ROW + 16 * (part * SCAN_PAIR + n));
                    multiply_half(delta[n], weight[0], b[0], b[1]);
                    multiply_half(output[n], query[0], b[0], b[1]);
                    multiply_half(delta[n], weight[1], b[2], b[3]);
                    multiply_half(output[n], query[1], b[2], b[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < SCAN_PAIR; ++n) {
                u32 at = delta_rows + row * SCAN_ROW + 16 * (part * SCAN_PAIR + n) + 4 * (lane % 4);
                store_shared(at, pack_half2(delta[n][0], delta[n][1]));
                store_shared(at + 8 * SCAN_ROW, pack_half2(delta[n][2], delta[n][3]));
            }
        }
        worker_sync();  // delta is there; the state's copy is read
        if (computes) {
#pragma unroll
            for (int n = 0; n < STATE_FRAGMENTS; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) state[n][i] *= fade;
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k += 2) {
                u32 scores[2][4], keys[2][4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    load_matrix(scores[i], stage + SCAN_SCORES + swizzled<CHUNK * 2>(16 * (warp % 4) + lane % 16, 2 * (k + i) + lane / 16));
                    load_matrix_transposed(keys[i], stage + SCAN_KEY + swizzled<HEAD_ROW>(16 * (k + i) + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
                }
#pragma unroll
                for (int n = 0; n < STATE_FRAGMENTS; ++n) {
                    u32 b[4];
                    load_matrix_transposed(b, delta_rows + (16 * k + lane) * SCAN_ROW + 16 * n);
                    multiply_half(state[n], keys[0], b[0], b[1]);
                    multiply_half(state[n], keys[1], b[2], b[3]);
                    if (n / SCAN_PAIR == part) {
                        multiply_half(output[n % SCAN_PAIR], scores[0], b[0], b[1]);
                        multiply_half(output[n % SCAN_PAIR], scores[1], b[2], b[3]);
                    }
                }
            }
            constexpr float SCALE = 0.08838834764831845f;  // 1 / sqrt(KEY_HEAD_DIM)
#pragma unroll
            for (int n = 0; n < SCAN_PAIR; ++n) {
                int token = chunk * CHUNK + row, at = head * VALUE_HEAD_DIM + first_column + 8 * (part * SCAN_PAIR + n) + 2 * (lane % 4);
                if (token < a.tokens) *(u32*)(a.output + (long long)token * VALUE_DIM + at) = pack_half2(output[n][0] * SCALE, output[n][1] * SCALE);
                if (token + 8 < a.tokens)
                    *(u32*)(a.output + (long long)(token + 8) * VALUE_DIM + at) = pack_half2(output[n][2] * SCALE, output[n][3] * SCALE);
            }
#pragma unroll
            for (int n = 0; n < STATE_FRAGMENTS; ++n) {
                store_shared(state_rows + dim * SCAN_ROW + 16 * n + 4 * (lane % 4), pack_half2(state[n][0], state[n][1]));
                store_shared(state_rows + (dim + 8) * SCAN_ROW + 16 * n + 4 * (lane % 4), pack_half2(state[n][2], state[n][3]));
            }
        }
    }
    if (computes)
#pragma unroll
        for (int n = 0; n < STATE_FRAGMENTS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) column[(8 * n + 2 * (lane % 4) + i % 2) * KEY_HEAD_DIM + dim + i / 2 * 8] = state[n][i];
}

// The last four inputs of the convolution, for the tokens to come. delta_chunks, which reads the window, is over.
__device__ __forceinline__ void move_window(const PrefillArguments& a, const LinearLayer& layer) {
    for (int channel = block_index() * WORKERS + thread_index(); channel < CONV_DIM; channel += gridDim.x * WORKERS) {
        float* window = layer.conv_window + 4 * channel;
        float next[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int token = a.tokens - 4 + i;
            next[i] = token < 0 ? window[4 + token] : low_half(a.projected[(long long)token * LINEAR_STRIDE + channel]);
        }
        *(float4*)window = make_float4(next[0], next[1], next[2], next[3]);
    }
}

__device__ __forceinline__ void delta_scan(const PrefillArguments& a, const LinearLayer& layer, u8* memory) {
    constexpr int PARTS = VALUE_HEAD_DIM / SCAN_COLUMNS;
    move_window(a, layer);
    for (int item = block_index(); item < VALUE_HEADS * PARTS; item += gridDim.x)
        scan_head(a, layer, item / PARTS, item % PARTS * SCAN_COLUMNS, shared_address(memory));
}
