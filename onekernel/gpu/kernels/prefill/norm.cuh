// The residual stream in float32, and the norms that feed the projections. A warp takes one token.
#pragma once

#include "prefill/model.cuh"

// Sixteen bytes (8 columns) of a row of the embedding. A tied embedding is the LM head on the tape.
__device__ __forceinline__ uint4 embedding(const PrefillArguments& a, int token, int column) {
    if (!TIED) return __ldg((const uint4*)(a.embedding + (long long)token * HIDDEN + column));
    const u8* group = group_place<VOCAB, HIDDEN>(a, 4 * LAYERS, token / 8);
    return __ldg((const uint4*)(group + tile_offset<HIDDEN>(column / 32) + (token % 8 * 4 + column % 32 / 8) * 16));
}

// input = x / rms(x) * weight, of one token's row of the residual stream.
__device__ __forceinline__ void normalise(const float* x, float squares, const float* weight, u16* input) {
    int lane = threadIdx.x % 32;
    float scale = rsqrtf(warp_sum(squares) / HIDDEN + NORM_EPS);
#pragma unroll 4
    for (int i = lane; i < HIDDEN / 4; i += 32) {
        float4 v = *(const float4*)(x + 4 * i), w = load_constant4(weight + 4 * i);
        *(uint2*)(input + 4 * i) = make_uint2(pack2(v.x * scale * w.x, v.y * scale * w.y), pack2(v.z * scale * w.z, v.w * scale * w.w));
    }
}

__device__ __forceinline__ void embed(const PrefillArguments& a) {
    int lane = threadIdx.x % 32;
    for (int t = blockIdx.x + threadIdx.x / 32 * gridDim.x; t < a.tokens; t += gridDim.x * PREFILL_WARPS) {
        float* x = a.residual + (long long)t * HIDDEN;
        float squares = 0;
        for (int i = lane; i < HIDDEN / 8; i += 32) {
            float v[8];
            unpack8(v, embedding(a, a.token_ids[t], 8 * i));
#pragma unroll
            for (int j = 0; j < 8; ++j) squares += v[j] * v[j];
            *(float4*)(x + 8 * i) = make_float4(v[0], v[1], v[2], v[3]);
            *(float4*)(x + 8 * i + 4) = make_float4(v[4], v[5], v[6], v[7]);
        }
        __syncwarp();
        normalise(x, squares, layer_parameters(a.parameters, 0), a.input + (long long)t * HIDDEN);
    }
}

// residual += the sum of a projection's splits, in their order; then the norm of what comes next.
__device__ __forceinline__ void add_and_normalise(const PrefillArguments& a, int splits, const float* weight) {
    int lane = threadIdx.x % 32;
    for (int t = blockIdx.x + threadIdx.x / 32 * gridDim.x; t < a.tokens; t += gridDim.x * PREFILL_WARPS) {
        float* x = a.residual + (long long)t * HIDDEN;
        float squares = 0;
#pragma unroll 4
        for (int i = lane; i < HIDDEN / 4; i += 32) {
            float4 v = *(const float4*)(x + 4 * i);
            for (int s = 0; s < splits; ++s) {
                float4 p = *(const float4*)(a.partials + ((long long)s * a.tokens + t) * HIDDEN + 4 * i);
                v.x += p.x, v.y += p.y, v.z += p.z, v.w += p.w;
            }
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            *(float4*)(x + 4 * i) = v;
        }
        __syncwarp();
        normalise(x, squares, weight, a.input + (long long)t * HIDDEN);
    }
}

// mixed = o / rms(o) * weight * silu(z), head by head.
__device__ __forceinline__ void gated_norm(const PrefillArguments& a, const LinearLayer& layer) {
    int lane = threadIdx.x % 32;
    float4 w = load_constant4(layer.gated_norm + 4 * lane);
    for (int i = blockIdx.x * PREFILL_WARPS + threadIdx.x / 32; i < a.tokens * VALUE_HEADS; i += gridDim.x * PREFILL_WARPS) {
        int t = i / VALUE_HEADS, column = i % VALUE_HEADS * VALUE_HEAD_DIM + 4 * lane;
        uint2 packed = *(const uint2*)(a.output + (long long)t * VALUE_DIM + column);
        uint2 z = *(const uint2*)(a.projected + (long long)t * LINEAR_STRIDE + CONV_DIM + column);
        float2 first = unpack_half2(packed.x), second = unpack_half2(packed.y);
        float squares = first.x * first.x + first.y * first.y + second.x * second.x + second.y * second.y;
        float scale = rsqrtf(warp_sum(squares) / VALUE_HEAD_DIM + NORM_EPS);
        *(uint2*)(a.mixed + (long long)t * VALUE_DIM + column) =
            make_uint2(pack2(first.x * scale * w.x * silu(low_half(z.x)), first.y * scale * w.y * silu(high_half(z.x))),
                       pack2(second.x * scale * w.z * silu(low_half(z.y)), second.y * scale * w.w * silu(high_half(z.y))));
    }
}
