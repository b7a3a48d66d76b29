// The residual stream in float32, and the norms that feed the projections.
#pragma once

#include "prefill/gemm.cuh"

// Sixteen bytes (8 columns) of a row of the embedding. A tied embedding is the LM head on the tape.
__device__ __forceinline__ uint4 embedding(const PrefillArguments& a, int token, int column) {
    if (!TIED) return __ldg((const uint4*)(a.embedding + (long long)token * HIDDEN + column));
    return __ldg((const uint4*)(group_place(a, 4 * LAYERS, VOCAB, HIDDEN, token / 8) + tile_offset(HIDDEN, column / 32) + (token % 8 * 4 + column % 32 / 8) * 16));
}

// A token's row is the work of some warps; each lane has ROW_VECTORS times four columns of it.
constexpr int ROW_WARPS = HIDDEN >= 2048 && HIDDEN % 512 == 0 ? 4 : 2;
constexpr int ROW_VECTORS = HIDDEN / 4 / (32 * ROW_WARPS);
constexpr int PARTS_AT_ONCE = ROW_VECTORS <= 4 ? 4 : ROW_VECTORS <= 10 ? 2 : 1;  // splits whose loads are on their way together
static_assert(HIDDEN % (128 * ROW_WARPS) == 0, "the warps share a row evenly");

__device__ __forceinline__ int first_row() { return block_index() + thread_index() / (32 * ROW_WARPS) * gridDim.x; }
__device__ __forceinline__ int row_step() { return gridDim.x * (WORKER_WARPS / ROW_WARPS); }
__device__ __forceinline__ int row_column(int i) { return 4 * (thread_index() % (32 * ROW_WARPS) + 32 * ROW_WARPS * i); }

// residual = x, input = x / rms(x) * weight, of one token.
__device__ __forceinline__ void store_row(const PrefillArguments& a, int token, const float4 (&x)[ROW_VECTORS], const float* weight, u8* memory) {
    int pair = thread_index() / (32 * ROW_WARPS);
    float* sums = (float*)memory + ROW_WARPS * pair;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        squares += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
        *(float4*)(a.residual + (long long)token * HIDDEN + row_column(i)) = x[i];
    }
    squares = warp_sum(squares);
    group_barrier(1 + pair, 32 * ROW_WARPS);  // the sums of the token before are read
    if (thread_index() % 32 == 0) sums[thread_index() / 32 % ROW_WARPS] = squares;
    group_barrier(1 + pair, 32 * ROW_WARPS);
    float total = 0;
#pragma unroll
    for (int i = 0; i < ROW_WARPS; ++i) total += sums[i];
    float scale = rsqrt_fast(total / HIDDEN + NORM_EPS);
#pragma unroll
    for (int i = 0; i < ROW_VECTORS; ++i) {
        float4 w = load_constant4(weight + row_column(i));
        store_input<HIDDEN>(a.input, token, row_column(i), pack2(x[i].x * scale * w.x, x[i].y * scale * w.y), pack2(x[i].z * scale * w.z, x[i].w * scale * w.w));
    }
}

__device__ __forceinline__ void embed(const PrefillArguments& a, u8* memory) {
    for (int t = first_row(); t < a.tokens; t += row_step()) {
        float4 x[ROW_VECTORS];
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) {
            float v[8];
            unpack8(v, embedding(a, a.token_ids[t], row_column(i) & ~7));
            x[i] = row_column(i) & 4 ? make_float4(v[4], v[5], v[6], v[7]) : make_float4(v[0], v[1], v[2], v[3]);
        }
        store_row(a, t, x, layer_parameters(a.parameters, 0), memory);
    }
}

// residual += the sum of a projection's splits, in their order; then the norm of what comes next.
__device__ __forceinline__ void add_and_normalise(const PrefillArguments& a, int splits, const float* weight, u8* memory) {
    for (int t = first_row(); t < a.tokens; t += row_step()) {
        float4 x[ROW_VECTORS];
#pragma unroll
        for (int i = 0; i < ROW_VECTORS; ++i) x[i] = *(const float4*)(a.residual + (long long)t * HIDDEN + row_column(i));
#pragma unroll 1
        for (int first = 0; first < splits; first += PARTS_AT_ONCE) {
            uint2 parts[PARTS_AT_ONCE][ROW_VECTORS];
#pragma unroll
            for (int s = 0; s < PARTS_AT_ONCE; ++s)
#pragma unroll
                for (int i = 0; i < ROW_VECTORS; ++i)
                    parts[s][i] = first + s < splits ? *(const uint2*)(a.partials + ((long long)(first + s) * a.tokens + t) * HIDDEN + row_column(i))
                                                     : make_uint2(0, 0);
#pragma unroll
            for (int s = 0; s < PARTS_AT_ONCE; ++s)
#pragma unroll
                for (int i = 0; i < ROW_VECTORS; ++i)
                    x[i].x += low_half(parts[s][i].x), x[i].y += high_half(parts[s][i].x), x[i].z += low_half(parts[s][i].y), x[i].w += high_half(parts[s][i].y);
        }
        store_row(a, t, x, weight, memory);
    }
}

// mixed = o / rms(o) * weight * silu(z), head by head; a warp takes two of them at a time.
__device__ __forceinline__ void gated_norm(const PrefillArguments& a, const LinearLayer& layer) {
    constexpr int AT_ONCE = 2;
    int lane = thread_index() % 32, warp = block_index() * WORKER_WARPS + thread_index() / 32, warps = gridDim.x * WORKER_WARPS;
    float4 w = load_constant4(layer.gated_norm + 4 * lane);
#pragma unroll 1
    for (int first = warp; first < a.tokens * VALUE_HEADS; first += AT_ONCE * warps) {
        uint2 packed[AT_ONCE] = {}, z[AT_ONCE] = {};
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            int i = first + n * warps, t = i / VALUE_HEADS, column = i % VALUE_HEADS * VALUE_HEAD_DIM + 4 * lane;
            if (t >= a.tokens) continue;
            packed[n] = *(const uint2*)(a.output + (long long)t * VALUE_DIM + column);
            z[n] = *(const uint2*)(a.projected + (long long)t * LINEAR_STRIDE + CONV_DIM + column);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            int i = first + n * warps, t = i / VALUE_HEADS, column = i % VALUE_HEADS * VALUE_HEAD_DIM + 4 * lane;
            float2 x = unpack_half2(packed[n].x), y = unpack_half2(packed[n].y);
            float scale = rsqrt_fast(warp_sum(x.x * x.x + x.y * x.y + y.x * y.x + y.y * y.y) / VALUE_HEAD_DIM + NORM_EPS);
            if (t < a.tokens)
                store_input<VALUE_DIM>(a.mixed, t, column, pack2(x.x * scale * w.x * quick_silu(low_half(z[n].x)), x.y * scale * w.y * quick_silu(high_half(z[n].x))),
                                       pack2(y.x * scale * w.z * quick_silu(low_half(z[n].y)), y.y * scale * w.w * quick_silu(high_half(z[n].y))));
        }
    }
}
