// Matrix operands in shared memory: asynchronous copies in, fragments out, and the products themselves (mma.sync).
//
// Rows of 16-bit numbers lie in shared memory in chunks of 16 bytes whose place within 128 bytes is xor-ed with the row
// (`swizzled`): a column of chunks then touches all banks, and the layout is what wgmma calls the 128-byte swizzle.
#pragma once

#include "primitive/number.cuh"

// Byte offset of chunk `chunk` of row `row`, in rows of ROW_BYTES (a multiple of 128).
template <int ROW_BYTES>
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// ---- copies from global to shared memory ----

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async16(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
__device__ __forceinline__ void copy_async16(u32 shared, const void* global) {
    uint4 v = load_l2(global);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void copy_commit() {}
template <int PENDING>
__device__ __forceinline__ void copy_wait() {}
#endif

__device__ __forceinline__ u32 load_shared(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_shared2(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_shared4(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ void store_shared2(u32 at, u32 v, u32 w) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v), "r"(w) : "memory"); }
__device__ __forceinline__ void store_shared4(u32 at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Barrier of a part of the block: `id` 1 to 15, `threads` a multiple of 32.
__device__ __forceinline__ void group_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- fragments ----

__device__ __forceinline__ void load_matrix(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
// An 8 x 8 matrix of 16-bit numbers held by the warp, transposed.
__device__ __forceinline__ u32 transpose8(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Four 8 x 8 matrices, transposed, into shared memory: lane 8 m + i gives the place of column i of matrix m.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void store_matrix_transposed(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#else
__device__ __forceinline__ void store_matrix_transposed(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    int lane = threadIdx.x % 32;
    u32 words[4] = {transpose8(a), transpose8(b), transpose8(c), transpose8(d)};
#pragma unroll
    for (int m = 0; m < 4; ++m) store_shared(__shfl_sync(0xFFFFFFFFu, shared, 8 * m + lane / 4) + 4 * (lane % 4), words[m]);
}
#endif

// ---- fp16, whatever the model's own format: the delta rule's operands are bounded and need the longer mantissa ----

__device__ __forceinline__ u32 pack_half2(float low, float high) {
    u32 v;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(v) : "f"(low), "f"(high));
#endif
    return v;
}
__device__ __forceinline__ float2 unpack_half2(u32 v) {
    float2 f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(f.x), "=f"(f.y) : "r"(v));
    return f;
}

// ---- products: acc[16 x 8] += a[16 x 16] b[16 x 8] ----
// acc: rows l / 4 (elements 0, 1) and l / 4 + 8 (2, 3), columns 2 (l % 4) and the next.

__device__ __forceinline__ void multiply_half(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
// In the model's 16-bit format (number.cuh).
__device__ __forceinline__ void multiply16(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    multiply_half(acc, a, b0, b1);
#endif
}
