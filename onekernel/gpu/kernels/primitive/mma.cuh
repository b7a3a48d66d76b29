// One weight tile (8 rows x 32 columns, 512 bytes) times a slice of the activation vector, on the tensor cores.
//
// Lane l of a warp reads 16 bytes: row l / 4, columns 8 (l % 4) to 8 (l % 4) + 7. The instruction wants 16 rows x 16
// columns; we give it the same 8 rows twice with different columns: rows 0-7 take the lane's words 0 and 2, rows 8-15
// its words 1 and 3. The activations that belong to each half stand in two columns of B: even columns hold words 0 and
// 2, odd columns words 1 and 3. A row's sum is then c0 + c3 in the lanes with l % 4 == 0: no shuffle, no conversion.
#pragma once

#include "primitive/number.cuh"

struct Accumulator {
    float c0, c1, c2, c3;
    __device__ __forceinline__ float row_sum() const { return c0 + c3; }
};

// x: the two words for this lane's column of B (see store_activations in gemv.cuh).
__device__ __forceinline__ void tile_mma(Accumulator& acc, uint4 w, uint2 x) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc.c0), "+f"(acc.c1), "+f"(acc.c2), "+f"(acc.c3)
        : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x.x), "r"(x.y));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(acc.c0), "+f"(acc.c1), "+f"(acc.c2), "+f"(acc.c3)
        : "r"(w.x), "r"(w.y), "r"(x.x));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(acc.c0), "+f"(acc.c1), "+f"(acc.c2), "+f"(acc.c3)
        : "r"(w.z), "r"(w.w), "r"(x.y));
#endif
}
