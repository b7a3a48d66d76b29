// The 16-bit number format of weights, KV cache and matrix operands: bf16 from sm_80 on, fp16 on sm_75.
#pragma once

#include "primitive/memory.cuh"

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
__device__ __forceinline__ float low_half(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
#else
__device__ __forceinline__ u32 pack2(float low, float high) {
    u32 v;
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(v) : "f"(low), "f"(high));
    return v;
}
__device__ __forceinline__ float low_half(u32 v) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
    return f;
}
__device__ __forceinline__ float high_half(u32 v) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
    return f;
}
#endif

// Eight 16-bit numbers to float.
__device__ __forceinline__ void unpack8(float (&out)[8], uint4 v) {
    out[0] = low_half(v.x), out[1] = high_half(v.x), out[2] = low_half(v.y), out[3] = high_half(v.y);
    out[4] = low_half(v.z), out[5] = high_half(v.z), out[6] = low_half(v.w), out[7] = high_half(v.w);
}
__device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
    return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
