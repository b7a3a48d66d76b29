// What this chip can do at most: reading its memory, and multiplying matrices on its tensor cores. Used by probe.py.
//
// The constants ITERATIONS (products per warp or warpgroup) and ARCH (750, 800, 900, ...) stand before this text.

typedef unsigned int word;

__device__ __forceinline__ unsigned long long mix(unsigned long long x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
}

// Random bf16 numbers of ordinary size: constant memory would need less power, and show a faster chip than there is.
extern "C" __global__ void fill(word* memory, unsigned long long words) {
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < words;
         i += (unsigned long long)gridDim.x * blockDim.x) {
        word bits = (word)mix(i);
        memory[i] = (bits & 0x807f807fu) | 0x3f003f00u;  // magnitudes from 0.5 to 1, any sign
    }
}

// Read `vectors` 16-byte vectors once. UNROLL loads of a thread are in flight at a time; neighbours read neighbours.
template <int UNROLL>
__device__ __forceinline__ void read_all(const uint4* memory, unsigned long long vectors, word* sink) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    word total = 0;
    for (; i + (UNROLL - 1) * stride < vectors; i += UNROLL * stride) {
        uint4 part[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(part[u].x), "=r"(part[u].y), "=r"(part[u].z), "=r"(part[u].w)
                         : "l"(memory + i + u * stride));
#pragma unroll
        for (int u = 0; u < UNROLL; u++) total ^= part[u].x ^ part[u].y ^ part[u].z ^ part[u].w;
    }
    for (; i < vectors; i += stride) total ^= memory[i].x ^ memory[i].y ^ memory[i].z ^ memory[i].w;
    atomicXor(sink, total);  // the host knows what it must be: nothing was left out, nothing read twice
}

extern "C" __global__ void read_4(const uint4* m, unsigned long long n, word* sink) { read_all<4>(m, n, sink); }
extern "C" __global__ void read_8(const uint4* m, unsigned long long n, word* sink) { read_all<8>(m, n, sink); }
extern "C" __global__ void read_16(const uint4* m, unsigned long long n, word* sink) { read_all<16>(m, n, sink); }

// Matrix products from registers: what mma.sync reaches if nothing has to be loaded. FLOPs: see probe.py.
extern "C" __global__ void multiply(const word* memory, float* sink) {
    const int lane = threadIdx.x + blockIdx.x * blockDim.x;
    word a[4], b[8];
    for (int i = 0; i < 4; i++) a[i] = memory[(lane * 13 + i) & 0xffff];
    for (int i = 0; i < 8; i++) b[i] = memory[(lane * 29 + i) & 0xffff];
    float c[4][4] = {};
    for (int k = 0; k < ITERATIONS; k++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#if ARCH >= 800
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * j]), "r"(b[2 * j + 1]));
#else
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                         "{%0, %1, %2, %3};"
                         : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
                         : "r"(a[0]), "r"(a[1]), "r"(b[2 * j]));
#endif
        }
    }
    float total = 0;
    for (int j = 0; j < 4; j++) total += c[j][0] + c[j][1] + c[j][2] + c[j][3];
    if (total == 0.123f) sink[lane] = total;  // never, but the compiler cannot know
}

#if ARCH == 900
// Hopper's own instruction: a warpgroup multiplies [64, 16] by [16, 256] from shared memory. mma.sync reaches about two
// thirds of it, and a limit that others pass would be none. Layout without swizzle: 8x8 tiles of 128 contiguous bytes.
__device__ __forceinline__ unsigned long long descriptor(const void* shared, word leading, word stride) {
    unsigned long long address = (word)__cvta_generic_to_shared(shared);
    return ((address & 0x3ffff) >> 4) | ((unsigned long long)(leading >> 4) << 16) |
           ((unsigned long long)(stride >> 4) << 32);
}

extern "C" __global__ void __launch_bounds__(256, 1) multiply_group(const word* memory, float* sink) {
    __shared__ alignas(128) word tiles[2][(64 + 256) * 16 / 2];  // one pair of operands for each warpgroup
    for (int i = threadIdx.x; i < (int)(sizeof(tiles) / 4); i += blockDim.x) (&tiles[0][0])[i] = memory[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const word* mine = tiles[threadIdx.x / 128];
    unsigned long long a = descriptor(mine, 128, 256), b = descriptor(mine + 64 * 16 / 2, 128, 256);
    float c[128];
#pragma unroll
    for (int i = 0; i < 128; i++) c[i] = 0;
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < ITERATIONS; k++) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
            "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"
            "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
            "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,"
            "%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,"
            "%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"
            : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)
            : "l"(a), "l"(b));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    float total = 0;
#pragma unroll
    for (int i = 0; i < 128; i++) total += c[i];
    if (total == 0.123f) sink[threadIdx.x] = total;
}
#endif
