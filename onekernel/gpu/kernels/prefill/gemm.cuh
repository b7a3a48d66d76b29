// Weights times activations: y[token, row] = sum over columns of W[row, column] x[token, column].
//
// A block makes tiles of ROW_TILE rows x TOKEN_TILE tokens. The weights come from the decode kernel's tape, tile by
// tile, the activations from rows in device memory; both go through a ring of GEMM_STAGES stages of 64 columns in
// shared memory. Warp w accumulates rows 16 w to 16 w + 15 for all tokens of the tile, by wgmma on sm_90a (four warps
// together) and by mma.sync elsewhere: same operands in shared memory, same accumulators.
#pragma once

#include "prefill/model.cuh"

constexpr int ROW_TILE = PREFILL_WARPS * 16;
constexpr int STEP_COLUMNS = 64;
constexpr int STEP_BYTES = STEP_COLUMNS * 2;  // of one row
constexpr int GEMM_STAGE = (ROW_TILE + TOKEN_TILE) * STEP_BYTES;
constexpr int TOKEN_FRAGMENTS = TOKEN_TILE / 8;
static_assert(TOKEN_TILE % 16 == 0, "mma.sync takes the tokens' fragments in pairs");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool WGMMA = true;
#else
constexpr bool WGMMA = false;
#endif
// Loads run this many steps ahead. wgmma is still reading the stage before when the next is issued.
constexpr int STEPS_AHEAD = WGMMA ? GEMM_STAGES - 2 : GEMM_STAGES - 1;

using TokenFragments = float[TOKEN_FRAGMENTS][4];

template <int ROWS, int COLUMNS>
struct TileLoader {
    static constexpr int GROUPS_A_WARP = ROW_TILE / 8 / (PREFILL_WARPS / 2);  // a warp copies one of the two column tiles
    static constexpr int TOKENS_AT_ONCE = PREFILL_THREADS / 8;
    static constexpr int TOKEN_ROUNDS = (TOKEN_TILE + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    const u8* groups[GROUPS_A_WARP];
    const u8* tokens[TOKEN_ROUNDS];
    int rounds;  // in which this thread has a token to copy; the places of the others are left as they are
    u32 to_weights, to_tokens;

    __device__ __forceinline__ TileLoader(const PrefillArguments& a, u32 shared, int matrix, const u16* input, int token_count, int row_tile,
                                          int token_tile) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < GROUPS_A_WARP; ++i) groups[i] = group_place<ROWS, COLUMNS>(a, matrix, row_tile * (ROW_TILE / 8) + warp / 2 + 6 * i) + lane * 16;
        to_weights = shared + swizzled<STEP_BYTES>(warp / 2 * 8 + lane / 4, warp % 2 * 4 + lane % 4);
        int row = threadIdx.x / 8;
        rounds = (min(TOKEN_TILE, token_count - token_tile * TOKEN_TILE) - row + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
#pragma unroll
        for (int i = 0; i < TOKEN_ROUNDS; ++i) {
            int token = min(token_tile * TOKEN_TILE + row + i * TOKENS_AT_ONCE, token_count - 1);
            tokens[i] = (const u8*)(input + (long long)token * COLUMNS) + threadIdx.x % 8 * 16;
        }
        to_tokens = shared + ROW_TILE * STEP_BYTES + swizzled<STEP_BYTES>(row, threadIdx.x % 8);
    }

    __device__ __forceinline__ void load(int step, int slot) const {
        int tile = tile_offset<COLUMNS>(2 * step + threadIdx.x / 32 % 2);
        u32 offset = slot * GEMM_STAGE;
#pragma unroll
        for (int i = 0; i < GROUPS_A_WARP; ++i)
            copy_async16(to_weights + offset + i * 6 * 8 * STEP_BYTES, groups[i] + tile);
#pragma unroll
        for (int i = 0; i < TOKEN_ROUNDS; ++i)
            if (i < rounds)
                copy_async16(to_tokens + offset + i * TOKENS_AT_ONCE * STEP_BYTES, tokens[i] + step * STEP_BYTES);
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
    for (int item = blockIdx.x; item < ROW_TILES * token_tiles * splits; item += gridDim.x) {
        int token_tile = item % token_tiles, row_tile = item / token_tiles % ROW_TILES, split = item / token_tiles / ROW_TILES;
        int first = STEPS * split / splits, steps = STEPS * (split + 1) / splits - first;
        TileLoader<ROWS, COLUMNS> loader(a, shared, matrix, input, tokens, row_tile, token_tile);
        TokenFragments acc;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
        __syncthreads();  // the stages of the tile before are read
#pragma unroll
        for (int i = 0; i < STEPS_AHEAD; ++i) {
            if (i < steps) loader.load(first + i, i);
            copy_commit();
        }
        hold(acc);
        int slot = 0;
        for (int step = 0; step < steps; ++step) {
            copy_wait<STEPS_AHEAD - 1>();
            publish_stage();
            if (WGMMA) multiply_wait<1>();  // the stage that is filled next is read
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

// Rows as 16-bit numbers in rows of `stride` numbers a token.
__device__ __forceinline__ void store_rows(u16* out, int stride, int row, int token, int tokens, const float (&f)[4]) {
    int lane = threadIdx.x % 32;
    u32 low = transpose8(pack2(f[0], f[1])), high = transpose8(pack2(f[2], f[3]));
    token += lane / 4;
    u16* at = out + (long long)token * stride + row + 2 * (lane % 4);
    if (token < tokens) *(u32*)at = low, *(u32*)(at + 8) = high;
}

struct LinearProjection {
    u16* projected;  // [tokens, LINEAR_STRIDE]
    float* gates;    // [tokens, GATES]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        int lane = threadIdx.x % 32;
        if (row < LINEAR_STRIDE) {
#pragma unroll
            for (int j = 0; j < TOKEN_FRAGMENTS; ++j) store_rows(projected, LINEAR_STRIDE, row, token + 8 * j, tokens, acc[j]);
        } else {
#pragma unroll
            for (int j = 0; j < TOKEN_FRAGMENTS; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int gate = row - LINEAR_STRIDE + lane / 4 + i / 2 * 8, t = token + 8 * j + 2 * (lane % 4) + i % 2;
                    if (gate < GATES && t < tokens) gates[(long long)t * GATES + gate] = acc[j][i];
                }
        }
    }
};

struct FullProjection {
    u16* projected;  // [tokens, FULL_STRIDE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        if (row < FULL_STRIDE)
#pragma unroll
            for (int j = 0; j < TOKEN_FRAGMENTS; ++j) store_rows(projected, FULL_STRIDE, row, token + 8 * j, tokens, acc[j]);
    }
};

// silu(gate) * up: of each 8 rows, 4 are of gate_proj and 4 the same of up_proj.
struct Activation {
    u16* activated;  // [tokens, INTERMEDIATE]
    int tokens;
    __device__ __forceinline__ void operator()(int row, int token, int, const TokenFragments& acc) const {
        int lane = threadIdx.x % 32;
        bool upper = lane >= 16;  // holds rows of up_proj, and finishes the second group of 8
        if (row >= 2 * INTERMEDIATE) return;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) {
            const float(&f)[4] = acc[j];
            float x = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[0] : f[2], 16), y = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[1] : f[3], 16);
            float first = upper ? quick_silu(x) * f[2] : quick_silu(f[0]) * x, second = upper ? quick_silu(y) * f[3] : quick_silu(f[1]) * y;
            u32 pair = transpose8(pack2(first, second));
            int t = token + 8 * j + lane / 4;
            if (t < tokens) *(u32*)(activated + (long long)t * INTERMEDIATE + row / 2 + 2 * (lane % 4)) = pair;
        }
    }
};

struct FloatRows {
    float* out;  // [splits, tokens, rows]
    int rows, tokens;
    __device__ __forceinline__ void operator()(int row, int token, int split, const TokenFragments& acc) const {
        int lane = threadIdx.x % 32;
        float* at = out + (long long)split * tokens * rows;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int r = row + lane / 4 + i / 2 * 8, t = token + 8 * j + 2 * (lane % 4) + i % 2;
                if (r < rows && t < tokens) at[(long long)t * rows + r] = acc[j][i];
            }
    }
};
