// What all phases of prefill share: sizes, the tape, scratch memory.
#pragma once

#include "layer/linear_attention.cuh"
#include "primitive/bulk.cuh"
#include "primitive/matrix.cuh"
#include "primitive/quick.cuh"
#include "state.cuh"

constexpr int CHUNK = 64;                            // tokens of the delta rule that are solved together
constexpr int LINEAR_STRIDE = CONV_DIM + VALUE_DIM;  // numbers of a token's row in `projected`: q, k, v | z
constexpr int FULL_STRIDE = 2 * QUERY_DIM + 2 * KV_DIM;
constexpr long long MOST_PREFETCHED = 24 << 20;         // bytes
constexpr int GATE_STRIDE = (2 * VALUE_HEADS + 15) / 16 * 16;  // numbers of a token's row in `gates`: beta, the decay's input
constexpr int GROUP_QUERIES = HEADS / KV_HEADS;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool WGMMA = true;
#else
constexpr bool WGMMA = false;
#endif
// All phases are the work of three groups of four warps. On sm_90a a fourth, the asker, brings in what products and
// attention read, and does nothing else: registers that it gives away it never needs again.
constexpr int WORKER_WARPS = 12;
constexpr int WORKERS = WORKER_WARPS * 32;
constexpr int PREFILL_THREADS = WORKERS + (WGMMA ? 128 : 0);
// Barrier of the workers alone; those that a part of them meets at have the numbers up to 13, and 15 (gemm.cuh).
__device__ __forceinline__ void worker_sync() { group_barrier(WGMMA ? 14 : 0, WORKERS); }

constexpr int STEP_COLUMNS = 64;             // of a matrix, multiplied at a time
constexpr int STEP_BYTES = STEP_COLUMNS * 2;  // of one row
constexpr int TOKENS_BYTES = TOKEN_TILE * STEP_BYTES;

constexpr bool NARROW = NARROW_TILES && WGMMA;

// The place of an even column, and the next one, of a token in a product's input of COLUMNS: tiles of TOKEN_TILE tokens x
// 64 columns, each as it stands in shared memory, so that one copy brings it there. Of 32 columns, pair w of each 8 stand
// together: the weights of a tape tile are then an operand of the tensor cores as they are (gemm.cuh).
template <int COLUMNS>
__device__ __forceinline__ u16* input_place(u16* input, int token, int column) {
    u32 tile = (u32)token / TOKEN_TILE, row = (u32)token % TOKEN_TILE;
    u8* at = (u8*)input + (long long)(tile * (COLUMNS / STEP_COLUMNS) + column / STEP_COLUMNS) * TOKENS_BYTES;
    return (u16*)(at + swizzled<STEP_BYTES>(row, column % STEP_COLUMNS / 32 * 4 + column % 8 / 2) + column % 32 / 8 * 4);
}
// Columns `column` (a multiple of 4) to column + 3.
template <int COLUMNS>
__device__ __forceinline__ void store_input(u16* input, int token, int column, u32 first, u32 second) {
    *(u32*)input_place<COLUMNS>(input, token, column) = first;
    *(u32*)input_place<COLUMNS>(input, token, column + 2) = second;
}

// The code of a phase runs once a layer, so its length costs more than its arithmetic: no care for denormal numbers.
__device__ __forceinline__ float quick_sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-1.44269504f * x)); }
__device__ __forceinline__ float quick_exp(float x) { return exp2_fast(1.44269504f * x); }
__device__ __forceinline__ float quick_silu(float x) { return x * quick_sigmoid(x); }

// Asks for a whole matrix in L2, ahead of the phase that multiplies it; matrices that would not stay there are left alone.
// By `threads` threads; this is number `thread`.
__device__ __forceinline__ void prefetch_matrix(const PrefillArguments& a, int matrix, int rows, int columns, int thread, int threads) {
    int groups = (rows + 7) / 8;
    if ((long long)rows * columns * 2 > MOST_PREFETCHED) return;
    for (int block = block_index(); block < BLOCKS; block += gridDim.x) {
        const u8* share = a.tape + a.matrix_offsets[matrix * BLOCKS + block];
        int bytes = (first_group(groups, block + 1) - first_group(groups, block)) * columns * 16;
        for (int at = thread * 128; at < bytes; at += threads * 128) prefetch_l2(share + at);
    }
}

// Parts of a (chunk, value head) item that delta_chunks leaves for delta_scan: fp16 matrices with a row a token.
constexpr int ITEM_MATRIX = CHUNK * KEY_HEAD_DIM * 2;
constexpr int ITEM_WEIGHT = 0;                                    // [64, 128] -W
constexpr int ITEM_QUERY = (WGMMA ? 2 : 1) * ITEM_MATRIX;         // [64, 128] q, faded from the chunk's start
constexpr int ITEM_KEY = (WGMMA ? 1 : 2) * ITEM_MATRIX;           // [64, 128] k, faded to the chunk's end
constexpr int ITEM_SCORES = 3 * ITEM_MATRIX;                      // [64, 64] q k^T, faded
constexpr int ITEM_DELTA = ITEM_SCORES + CHUNK * CHUNK * 2;       // [64, 128] U
constexpr int ITEM_STATE = ITEM_DELTA + CHUNK * VALUE_HEAD_DIM * 2;  // on sm_90a, from carry_state: S, [2][128 columns][64 dims]
constexpr int ITEM_BYTES = ITEM_STATE + (WGMMA ? VALUE_HEAD_DIM * KEY_HEAD_DIM * 2 : 0);

// The place in an item of 16 bytes of a row of q or k. On sm_90a blocks of 64 dims, as wgmma reads them; W, the scores and U
// are kept as registers of wgmma there, fragments of 8 columns in pairs: [pairs][128 threads] of 16 bytes.
__device__ __forceinline__ u32 item_place(int row, int chunk) {
    return WGMMA ? chunk / 8 * (CHUNK * 128) + swizzled<128>(row, chunk % 8) : row * (KEY_HEAD_DIM * 2) + 16 * chunk;
}

__device__ __forceinline__ LinearLayer linear_layer(const PrefillArguments& a, int layer) {
    LinearLayer l;
    l.conv_weight = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    l.negative_decay_rate = l.conv_weight + 4 * CONV_DIM;
    l.dt_bias = l.negative_decay_rate + VALUE_HEADS;
    l.gated_norm = l.dt_bias + VALUE_HEADS;
    l.conv_window = (float*)a.state + (layer - full_layers_before(layer)) * LINEAR_STATE;
    l.recurrent_state = l.conv_window + 4 * CONV_DIM;
    return l;
}
__device__ __forceinline__ FullLayer full_layer(const PrefillArguments& a, int layer) {
    FullLayer l;
    l.q_norm = layer_parameters(a.parameters, layer) + 2 * HIDDEN;
    l.k_norm = l.q_norm + HEAD_DIM;
    l.keys = (u16*)(a.state + LINEAR_LAYERS * LINEAR_STATE * 4) + (long long)full_layers_before(layer) * 2 * KV_DIM * a.max_context;
    l.values = l.keys + (long long)KV_DIM * a.max_context;
    return l;
}
