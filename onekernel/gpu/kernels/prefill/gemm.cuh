// Weights times activations: y[token, row] = sum over columns of W[row, column] x[token, column].
//
// A block makes tiles of ROW_TILE rows x TOKEN_TILE tokens. The weights come from the decode kernel's tape, tile by
// tile, the activations from tiles that stand ready (input_place); both go through a ring of GEMM_STAGES stages of 64
// columns in shared memory. Warp w accumulates rows 16 w to 16 w + 15 for all tokens of the tile, by wgmma on sm_90a
// (four warps together) and by mma.sync elsewhere: same operands in shared memory, same accumulators.
#pragma once

#include "prefill/model.cuh"

constexpr int ROW_TILE = PREFILL_WARPS * 16;
constexpr int GEMM_STAGE = (ROW_TILE + TOKEN_TILE) * STEP_BYTES;
constexpr int TOKEN_FRAGMENTS = TOKEN_TILE / 8;
static_assert(TOKEN_TILE % 16 == 0, "mma.sync takes the tokens' fragments in pairs");

// Loads run this many steps ahead. wgmma is still reading the stage before when the next is issued.
constexpr int STEPS_AHEAD = WGMMA ? GEMM_STAGES - 2 : GEMM_STAGES - 1;

using TokenFragments = float[TOKEN_FRAGMENTS][4];

template <int ROWS, int COLUMNS>
struct TileLoader {
    static constexpr int GROUPS_A_WARP = ROW_TILE / 8 / (PREFILL_WARPS / 2);  // a warp copies one of the two column tiles
    const u8* groups[GROUPS_A_WARP];
    const u8* tokens;
    u32 to_weights, to_tokens;

    __device__ __forceinline__ TileLoader(const PrefillArguments& a, u32 shared, int matrix, const u16* input, int row_tile, int token_tile) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < GROUPS_A_WARP; ++i) groups[i] = group_place<ROWS, COLUMNS>(a, matrix, row_tile * (ROW_TILE / 8) + warp / 2 + 6 * i) + lane * 16;
        to_weights = shared + swizzled<STEP_BYTES>(warp / 2 * 8 + lane / 4, warp % 2 * 4 + lane % 4);
        tokens = (const u8*)input + (long long)token_tile * (COLUMNS / STEP_COLUMNS) * TOKENS_BYTES;
        to_tokens = shared + ROW_TILE * STEP_BYTES;
    }

    __device__ __forceinline__ void load(int step, u32 slot) const {
        int tile = tile_offset<COLUMNS>(2 * step + threadIdx.x / 32 % 2);
#pragma unroll
        for (int i = 0; i < GROUPS_A_WARP; ++i) copy_async16(to_weights + slot * GEMM_STAGE + i * 6 * 8 * STEP_BYTES, groups[i] + tile);
#pragma unroll
        for (int i = 0; i < TOKENS_BYTES; i += PREFILL_THREADS * 16) {
            int at = i + threadIdx.x * 16;
            if (at < TOKENS_BYTES) copy_async16(to_tokens + slot * GEMM_STAGE + at, tokens + (long long)step * TOKENS_BYTES + at);
        }
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// K-major operand with the 128-byte swizzle: 8 rows are 1,024 bytes.
__device__ __forceinline__ u64 operand(u32 shared) { return (u64)(shared >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

__device__ __forceinline__ void multiply_step(TokenFragments& acc, u32 stage) {
    u64 weights = operand(stage + threadIdx.x / 128 * 64 * STEP_BYTES), tokens = operand(stage + ROW_TILE * STEP_BYTES);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < STEP_COLUMNS / 16; ++k) wgmma_tokens(acc, weights + 2 * k, tokens + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of the accumulators across a wait: it does not know that they change meanwhile.
__device__ __forceinline__ void hold(TokenFragments& acc) {
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j)
        asm volatile("" : "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])::"memory");
}
// What threads copied is read by the tensor cores through the asynchronous proxy.
__device__ __forceinline__ void publish_stage() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

__device__ __forceinline__ void multiply_step(TokenFragments& acc, u32 stage) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < STEP_COLUMNS / 16; ++k) {
        u32 weights[4];
        load_matrix(weights, stage + swizzled<STEP_BYTES>(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; j += 2) {
            u32 tokens[4];
            load_matrix(tokens, stage + swizzled<STEP_BYTES>(ROW_TILE + 8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            multiply16(acc[j], weights, tokens[0], tokens[1]);
            multiply16(acc[j + 1], weights, tokens[2], tokens[3]);
        }
    }
}
template <int PENDING>
__device__ __forceinline__ void multiply_wait() {}
__device__ __forceinline__ void hold(TokenFragments&) {}
__device__ __forceinline__ void publish_stage() {}

#endif

// Calls finish(first row of this warp, first token, split, accumulators) for each tile. With `splits` > 1 the columns
// are dealt to that many blocks, and their sums come out apart.
template <int ROWS, int COLUMNS, class Finish>
__device__ __forceinline__ void gemm(const PrefillArguments& a, u32 shared, int matrix, const u16* input, int tokens, int splits, const Finish& finish) {
    constexpr int ROW_TILES = (ROWS + ROW_TILE - 1) / ROW_TILE, STEPS = COLUMNS / STEP_COLUMNS;
    int token_tiles = (tokens + TOKEN_TILE - 1) / TOKEN_TILE;
#pragma unroll 1
    for (int item = blockIdx.x; item < ROW_TILES * token_tiles * splits; item += gridDim.x) {
        int token_tile = item % token_tiles, row_tile = item / token_tiles % ROW_TILES, split = item / token_tiles / ROW_TILES;
        int first = STEPS * split / splits, steps = STEPS * (split + 1) / splits - first;
        TileLoader<ROWS, COLUMNS> loader(a, shared, matrix, input, row_tile, token_tile);
        TokenFragments acc;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
        __syncthreads();  // the stages of the tile before are read
#pragma unroll 1
        for (int i = 0; i < STEPS_AHEAD; ++i) {
            if (i < steps) loader.load(first + i, i);
            copy_commit();
        }
        hold(acc);
        int slot = 0;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            copy_wait<STEPS_AHEAD - 1>();
            publish_stage();
            multiply_wait<1>();  // the stage that is filled next is read
            __syncthreads();
            int ahead = slot + STEPS_AHEAD < GEMM_STAGES ? slot + STEPS_AHEAD : slot + STEPS_AHEAD - GEMM_STAGES;
            if (step + STEPS_AHEAD < steps) loader.load(first + step + STEPS_AHEAD, ahead);
            copy_commit();
            multiply_step(acc, shared + slot * GEMM_STAGE);
            slot = slot + 1 < GEMM_STAGES ? slot + 1 : 0;
        }
        hold(acc);
        multiply_wait<0>();
        hold(acc);
        finish(row_tile * ROW_TILE + threadIdx.x / 32 * 16, token_tile * TOKEN_TILE, split, acc);
    }
}

// ---- finishes: what becomes of the accumulators ----
// Fragment j of a warp: rows l / 4 and l / 4 + 8, tokens 8 j + 2 (l % 4) and the next.

// All addresses of a finish are one pointer and constants: its code is long enough, and runs once a layer.

// Rows as 16-bit numbers in rows of STRIDE numbers a token.
template <int STRIDE>
__device__ __forceinline__ void store_rows(u16* out, int row, int token, int tokens, const TokenFragments& acc) {
    int lane = threadIdx.x % 32, left = tokens - token - lane / 4;
    u16* at = out + (long long)(token + lane / 4) * STRIDE + row + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j) {
        u32 low = transpose8(pack2(acc[j][0], acc[j][1])), high = transpose8(pack2(acc[j][2], acc[j][3]));
        if (8 * j < left) *(u32*)(at + 8 * j * STRIDE) = low, *(u32*)(at + 8 * j * STRIDE + 8) = high;
    }
}

// Rows as float32, in rows of STRIDE numbers a token.
template <int STRIDE>
__device__ __forceinline__ void store_floats(float* out, int row, int token, int tokens, const TokenFragments& acc) {
    int lane = threadIdx.x % 32, left = tokens - token - 2 * (lane % 4);
    float* at = out + (long long)(token + 2 * (lane % 4)) * STRIDE + row + lane / 4;
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j) {
        if (8 * j < left) at[8 * j * STRIDE] = acc[j][0], at[8 * j * STRIDE + 8] = acc[j][2];
        if (8 * j + 1 < left) at[(8 * j + 1) * STRIDE] = acc[j][1], at[(8 * j + 1) * STRIDE + 8] = acc[j][3];
    }
}

struct LinearProjection {
    u16* projected;  // [tokens, LINEAR_STRIDE]
    float* gates;    // [tokens, GATE_STRIDE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        if (row < LINEAR_STRIDE)
            store_rows<LINEAR_STRIDE>(projected, row, token, tokens, acc);
        else if (row < LINEAR_STRIDE + GATE_STRIDE)
            store_floats<GATE_STRIDE>(gates, row - LINEAR_STRIDE, token, tokens, acc);
    }
};

struct FullProjection {
    u16* projected;  // [tokens, FULL_STRIDE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        if (row < FULL_STRIDE) store_rows<FULL_STRIDE>(projected, row, token, tokens, acc);
    }
};

// silu(gate) * up: of each 8 rows, 4 are of gate_proj and 4 the same of up_proj.
struct Activation {
    u16* activated;  // input_place of [tokens, INTERMEDIATE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        int lane = threadIdx.x % 32, left = tokens - token - lane / 4;
        bool upper = lane >= 16;  // holds rows of up_proj, and finishes the second group of 8
        if (row >= 2 * INTERMEDIATE) return;
        u16* at = input_place<INTERMEDIATE>(activated, token + lane / 4, row / 2 + 2 * (lane % 4));
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) {
            const float(&f)[4] = acc[j];
            float x = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[0] : f[2], 16), y = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[1] : f[3], 16);
            float first = quick_silu(upper ? x : f[0]) * (upper ? f[2] : x), second = quick_silu(upper ? y : f[1]) * (upper ? f[3] : y);
            u32 pair = transpose8(pack2(first, second));
            if (8 * j < left) *(u32*)(at + 8 * j * STEP_COLUMNS) = pair;
        }
    }
};

template <int STRIDE>
struct FloatRows {
    float* out;  // [splits, tokens, STRIDE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int split, const TokenFragments& acc) const {
        if (row < STRIDE) store_floats<STRIDE>(out + (long long)split * tokens * STRIDE, row, token, tokens, acc);
    }
};
