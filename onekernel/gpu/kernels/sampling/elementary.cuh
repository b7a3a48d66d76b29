// exp and log as onekernel/sampling/elementary.py defines them: the same single operations in the same order, hence the
// same bits. The rounding is named in every instruction, so that the compiler never fuses a product with a sum.
// EXP_TERMS, LOG_TERMS, LN2_HIGH, ... are generated from that file.
#pragma once

#include "primitive/memory.cuh"

__device__ __forceinline__ float add_rounded(float a, float b) {
    float r;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ float subtract_rounded(float a, float b) {
    float r;
    asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ float multiply_rounded(float a, float b) {
    float r;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ float divide_rounded(float a, float b) {
    float r;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Horner's scheme, highest power first.
template <int N>
__device__ __forceinline__ float polynomial(const float (&terms)[N], float x) {
    float result = terms[0];
#pragma unroll
    for (int i = 1; i < N; ++i) result = add_rounded(multiply_rounded(result, x), terms[i]);
    return result;
}

// e^x for x in [-inf, 88]; 0 below -87.
__device__ __forceinline__ float elementary_exp(float x) {
    bool small = x < SMALLEST_EXPONENT;
    if (small) x = 0.0f;
    float n = rintf(multiply_rounded(x, LOG2_E));  // halves to even
    x = subtract_rounded(x, multiply_rounded(n, LN2_HIGH));
    x = subtract_rounded(x, multiply_rounded(n, LN2_LOW));
    float result = polynomial(EXP_TERMS, x);
    result = multiply_rounded(result, multiply_rounded(x, x));
    result = add_rounded(result, x);
    result = add_rounded(result, 1.0f);
    float power = __int_as_float(((int)n + 127) << 23);  // 2^n
    return small ? 0.0f : multiply_rounded(result, power);
}

// Natural logarithm of a positive, normal, finite x.
__device__ __forceinline__ float elementary_log(float x) {
    int bits = __float_as_int(x);
    float fraction = __int_as_float((bits & 0x007FFFFF) | 0x3F000000);  // in [0.5, 1)
    int whole = (bits >> 23) - 126;
    bool low = fraction < SQRT_HALF;
    float exponent = (float)(whole - (int)low);
    fraction = subtract_rounded(low ? add_rounded(fraction, fraction) : fraction, 1.0f);
    float square = multiply_rounded(fraction, fraction);
    float result = polynomial(LOG_TERMS, fraction);
    result = multiply_rounded(result, fraction);
    result = multiply_rounded(result, square);
    result = add_rounded(result, multiply_rounded(exponent, LN2_LOW));
    result = subtract_rounded(result, multiply_rounded(square, 0.5f));
    result = add_rounded(fraction, result);
    return add_rounded(result, multiply_rounded(exponent, LN2_HIGH));
}
