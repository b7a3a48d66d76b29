// The kernels' primitives for the host: one fiber a CUDA thread, run in turn; a wait yields until it is over.
//
// Warps are in step at every collective instruction, copies are done at once, memory is coherent: this shows wrong
// indices, wrong counts at barriers and waits that never end, and not races.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
template <class A, class B> inline auto min(A a, B b) { return a < b ? a : (decltype(a + b))b; }
template <class A, class B> inline auto max(A a, B b) { return a > b ? a : (decltype(a + b))b; }

// ---- fibers ----
struct Dim { int x, y, z; };
struct Warp { int arrived = 0; u64 generation = 0; u64 values[2][32][8]; };
struct Named { int arrived = 0; u64 generation = 0; };
struct Mbarrier { int count = 0, pending = 0; long long bytes = 0; u32 phase = 0; };
struct Block { Named named[16]; std::vector<Warp> warps; std::map<u32, Mbarrier> mbarriers; };
struct Fiber { void* stack; Dim thread, block; Block* in; Warp* warp; bool over; const char* waits; };
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks_;
inline std::vector<Named> clusters_;
inline Fiber* fiber_now;
inline u64 progress = 0;
inline void* scheduler_stack;
inline int cluster_size = 1;
constexpr u32 SHARED_STRIDE = 1 << 18;  // bytes of shared memory a block
inline u8* shared_arena;
inline Dim grid_size;
#define threadIdx (fiber_now->thread)
#define blockIdx (fiber_now->block)
#define gridDim grid_size
extern "C" void switch_stack(void** save, void* to);
asm(".text\n.globl switch_stack\nswitch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
inline void yield(const char* why) { fiber_now->waits = why; switch_stack(&fiber_now->stack, scheduler_stack); }
template <class F> inline void wait_until(const char* why, F ready) {
    while (!ready()) yield(why);
    ++progress;
}
inline u8* emulated_shared() { return shared_arena + (size_t)fiber_now->block.x * SHARED_STRIDE; }
inline void (*fiber_entry)();
inline void fiber_main() {
    fiber_entry();
    fiber_now->over = true;
    yield("over");
}
inline bool run_fibers(int blocks, int threads, void (*entry)()) {
    fiber_entry = entry;
    grid_size = {blocks, 1, 1};
    if (!shared_arena) shared_arena = (u8*)aligned_alloc(1024, (size_t)256 * SHARED_STRIDE);
    memset(shared_arena, 0xFF, (size_t)blocks * SHARED_STRIDE);  // NaN
    blocks_.assign(blocks, Block());
    clusters_.assign(blocks / cluster_size + 1, Named());
    for (auto& b : blocks_) b.warps.resize(threads / 32);
    fibers.assign((size_t)blocks * threads, Fiber());
    constexpr size_t STACK = 96 << 10;
    static std::vector<u8*> stacks;
    while (stacks.size() < fibers.size()) stacks.push_back((u8*)aligned_alloc(64, STACK));
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& f = fibers[i];
        f.thread = {(int)(i % threads), 0, 0}, f.block = {(int)(i / threads), 0, 0};
        f.in = &blocks_[i / threads], f.warp = &f.in->warps[i % threads / 32], f.over = false, f.waits = "start";
        void** top = (void**)(stacks[i] + STACK - 64);
        *--top = nullptr;
        *--top = (void*)fiber_main;
        for (int r = 0; r < 6; ++r) *--top = nullptr;
        f.stack = top;
    }
    int idle = 0;
    while (true) {
        bool any = false;
        u64 before = progress;
        for (auto& f : fibers)
            if (!f.over) any = true, fiber_now = &f, switch_stack(&scheduler_stack, f.stack);
        if (!any) return true;
        idle = progress == before ? idle + 1 : 0;
        if (idle > 50) {
            std::map<std::string, int> stuck;
            for (auto& f : fibers) if (!f.over) {
                char text[200]; snprintf(text, 200, "block %d warp %d: %s", f.block.x, f.thread.x / 32, f.waits);
                ++stuck[text];
            }
            int shown = 0;
            for (auto& [text, n] : stuck) if (shown++ < 40) fprintf(stderr, "%s (%d lanes)\n", text.c_str(), n);
            return false;
        }
    }
}

// ---- collectives ----
inline u64 (&collect(const u64* mine, int words))[32][8] {  // every lane's words, once all 32 have come
    Warp& w = *fiber_now->warp;
    u64 g = w.generation;
    memcpy(w.values[g & 1][fiber_now->thread.x % 32], mine, 8 * words);
    if (++w.arrived == 32) w.arrived = 0, ++w.generation;
    else wait_until("collective", [&] { return w.generation != g; });
    ++progress;
    return w.values[g & 1];
}
template <class T> inline u64 as_word(T v) { u64 w = 0; memcpy(&w, &v, sizeof(T)); return w; }
template <class T> inline T from_word(u64 w) { T v; memcpy(&v, &w, sizeof(T)); return v; }
template <class T> inline T lane_value(T v, int lane) { u64 w = as_word(v); return from_word<T>(collect(&w, 1)[lane & 31][0]); }
template <class T> inline T __shfl_xor_sync(u32, T v, int m) { return lane_value(v, (fiber_now->thread.x % 32) ^ m); }
template <class T> inline T __shfl_sync(u32, T v, int lane, int width = 32) { int l = fiber_now->thread.x % 32; return lane_value(v, l / width * width + lane % width); }
template <class T> inline T __shfl_up_sync(u32, T v, int n) { int l = fiber_now->thread.x % 32; return lane_value(v, l >= n ? l - n : l); }
template <class T> inline T __shfl_down_sync(u32, T v, int n) { int l = fiber_now->thread.x % 32; return lane_value(v, l + n < 32 ? l + n : l); }
inline bool __all_sync(u32, bool v) { u64 w = v; auto& all = collect(&w, 1); for (auto& l : all) if (!l[0]) return false; return true; }
inline bool __any_sync(u32, bool v) { u64 w = v; auto& all = collect(&w, 1); for (auto& l : all) if (l[0]) return true; return false; }
inline u32 __ballot_sync(u32, bool v) { u64 w = v; auto& all = collect(&w, 1); u32 r = 0; for (int i = 0; i < 32; ++i) r |= (u32)all[i][0] << i; return r; }
inline u32 __reduce_add_sync(u32, u32 v) { u64 w = v; auto& all = collect(&w, 1); u32 r = 0; for (auto& l : all) r += l[0]; return r; }
inline void __syncwarp(u32 = 0) { u64 w = 0; collect(&w, 1); }
inline void meet(Named& n, int count, const char* why) {
    u64 g = n.generation;
    if (++n.arrived == count) n.arrived = 0, ++n.generation, ++progress;
    else wait_until(why, [&] { return n.generation != g; });
}
inline void __syncthreads() { meet(fiber_now->in->named[0], fiber_now->in->warps.size() * 32, "syncthreads"); }
inline void group_barrier(int id, int threads) { meet(fiber_now->in->named[id], threads, "group_barrier"); }
inline u32 cluster_rank() { return fiber_now->block.x % cluster_size; }
inline void cluster_barrier() { meet(clusters_[fiber_now->block.x / cluster_size], cluster_size * fiber_now->in->warps.size() * 32, "cluster_barrier"); }
inline int __popcll(u64 v) { return __builtin_popcountll(v); }
inline int __popc(u32 v) { return __builtin_popcount(v); }

// ---- numbers ----
inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float v) { u32 f; memcpy(&f, &v, 4); return f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float rsqrt_fast(float x) { return 1 / sqrtf(x); }
inline u32 to_bf16(float f) { u32 v = __float_as_uint(f); if (f != f) return 0x7FFF; return (v + 0x7FFF + (v >> 16 & 1)) >> 16; }
inline u32 pack2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline float low_half(u32 v) { return __uint_as_float(v << 16); }
inline float high_half(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
inline u32 pack_half2(float low, float high) { _Float16 a = low, b = high; u16 x, y; memcpy(&x, &a, 2); memcpy(&y, &b, 2); return x | (u32)y << 16; }
inline float half_value(u16 v) { _Float16 h; memcpy(&h, &v, 2); return h; }
inline float2 unpack_half2(u32 v) { return {half_value((u16)v), half_value((u16)(v >> 16))}; }
inline float bf16_value(u16 v) { return __uint_as_float((u32)v << 16); }

// ---- memory ----
inline u32 shared_address(const void* p) { return (u32)((u8*)p - shared_arena); }
inline u8* at_shared(u32 a) { return shared_arena + a; }
template <class T> inline T __ldg(const T* p) { return *p; }
inline u32 load_relaxed(const u32* p) { return *p; }
inline uint4 load_relaxed4(const u32* p) { return *(const uint4*)p; }
inline u64 load_relaxed64(const u64* p) { return *p; }
inline void store_relaxed(u32* p, u32 v) { *p = v; }
inline void store_relaxed2(u32* p, u32 a, u32 b) { p[0] = a, p[1] = b; }
inline void store_relaxed64(u64* p, u64 v) { *p = v; }
inline u32 load_host(const u32* p) { return *p; }
inline void store_host64(u64* p, u64 v) { *p = v; }
inline uint4 load_l2(const void* p) { return *(const uint4*)p; }
inline float4 load_constant4(const float* p) { return *(const float4*)p; }
inline float load_constant(const float* p) { return *p; }
inline uint4 load_stream(const void* p) { return *(const uint4*)p; }
inline void fence_gpu() {}
inline void fence_system() {}
inline void prefetch_l2(const void*) {}
inline u64 nanoseconds() { static u64 t = 0; return ++t; }
inline void fault() { fprintf(stderr, "fault\n"); abort(); }
inline u32 load_shared(u32 a) { return *(u32*)at_shared(a); }
inline uint2 load_shared2(u32 a) { return *(uint2*)at_shared(a); }
inline uint4 load_shared4(u32 a) { return *(uint4*)at_shared(a); }
inline void store_shared(u32 a, u32 v) { *(u32*)at_shared(a) = v; }
inline void store_shared2(u32 a, u32 v, u32 w) { *(uint2*)at_shared(a) = {v, w}; }
inline void store_shared4(u32 a, uint4 v) { *(uint4*)at_shared(a) = v; }
inline void copy_async16(u32 shared, const void* global) { memcpy(at_shared(shared), global, 16); }
inline void copy_commit() {}
template <int PENDING> inline void copy_wait() {}
inline void arrive_at(u32* p) { ++*p; ++progress; }
inline u32 load_acquire(const u32* p) { u32 v = *p; yield("grid barrier"); return v; }

// ---- mbarriers and bulk copies ----
inline Mbarrier& mbarrier_at(u32 a) { return blocks_[a / SHARED_STRIDE].mbarriers[a]; }
inline void mbarrier_settle(Mbarrier& m) { if (m.pending == 0 && m.bytes == 0) ++m.phase, m.pending = m.count, ++progress; }
inline void barrier_init(u32 b, u32 count) { mbarrier_at(b) = {(int)count, (int)count, 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_expect(u32 b, u32 bytes) { auto& m = mbarrier_at(b); m.bytes += bytes; if (--m.pending < 0) fprintf(stderr, "too many arrivals\n"), abort(); mbarrier_settle(m); }
inline void barrier_arrive(u32 b) { auto& m = mbarrier_at(b); if (--m.pending < 0) fprintf(stderr, "too many arrivals\n"), abort(); mbarrier_settle(m); }
inline u32 of_rank(u32 a, u32 rank) { u32 block = a / SHARED_STRIDE; return a % SHARED_STRIDE + (block / cluster_size * cluster_size + rank) * SHARED_STRIDE; }
inline void barrier_arrive_at(u32 b, u32 rank) { barrier_arrive(of_rank(b, rank)); }
inline bool barrier_passed(u32 b, u32 parity) { return (mbarrier_at(b).phase & 1) != parity; }
inline bool barrier_test(u32 b, u32 parity) { if (!barrier_passed(b, parity)) yield("mbarrier"); else ++progress; return barrier_passed(b, parity); }
inline bool barrier_test_cluster(u32 b, u32 parity) { if (!barrier_passed(b, parity)) yield("mbarrier of the cluster"); else ++progress; return barrier_passed(b, parity); }
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 b) {
    if ((to | bytes | (u32)(u64)from) & 15) fprintf(stderr, "bulk copy is not aligned\n"), abort();
    memcpy(at_shared(to), from, bytes);
    auto& m = mbarrier_at(b);
    m.bytes -= bytes;
    mbarrier_settle(m);
}
inline void bulk_load_pair(u32 to, const void* from, u32 bytes, u32 b) {
    for (int r = 0; r < 2; ++r) bulk_load(of_rank(to, r), from, bytes, of_rank(b, r));
}

// ---- matrices ----
inline void load_matrix_(u32 (&r)[4], u32 shared, bool transposed) {
    u64 w = shared;
    if (shared & 15) fprintf(stderr, "ldmatrix is not aligned\n"), abort();
    auto& all = collect(&w, 1);
    int l = fiber_now->thread.x % 32;
    for (int m = 0; m < 4; ++m) {
        if (!transposed) r[m] = *(u32*)at_shared((u32)all[8 * m + l / 4][0] + 4 * (l % 4));
        else {
            u16 a = *(u16*)at_shared((u32)all[8 * m + 2 * (l % 4)][0] + 2 * (l / 4)), b = *(u16*)at_shared((u32)all[8 * m + 2 * (l % 4) + 1][0] + 2 * (l / 4));
            r[m] = a | (u32)b << 16;
        }
    }
    __syncwarp();
}
inline void load_matrix(u32 (&r)[4], u32 shared) { load_matrix_(r, shared, false); }
inline void load_matrix_transposed(u32 (&r)[4], u32 shared) { load_matrix_(r, shared, true); }
inline void store_matrix_transposed(u32 shared, u32 a, u32 b, u32 c, u32 d) {
    u64 w[3] = {shared, a | (u64)b << 32, c | (u64)d << 32};
    auto& all = collect(w, 3);
    int l = fiber_now->thread.x % 32, m = l / 8, row = l % 8;  // this lane's row of the transposed matrix m: column `row`
    u16 out[8];
    for (int i = 0; i < 8; ++i) {
        u64 pair = all[4 * i + row / 2][1 + m / 2];
        u32 v = (u32)(pair >> (m % 2 * 32));
        out[i] = (u16)(v >> (row % 2 * 16));
    }
    memcpy(at_shared(shared), out, 16);
    __syncwarp();
}
inline u32 transpose8(u32 v) {
    u64 w = v;
    auto& all = collect(&w, 1);
    int l = fiber_now->thread.x % 32;
    auto get = [&](int row, int column) { return (u16)(all[4 * row + column / 2][0] >> (column % 2 * 16)); };
    u32 r = get(2 * (l % 4), l / 4) | (u32)get(2 * (l % 4) + 1, l / 4) << 16;
    __syncwarp();
    return r;
}
template <class F> inline void multiply_(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1, F value) {
    u64 w[3] = {a[0] | (u64)a[1] << 32, a[2] | (u64)a[3] << 32, b0 | (u64)b1 << 32};
    auto& all = collect(w, 3);
    int l = fiber_now->thread.x % 32;
    for (int e = 0; e < 4; ++e) {
        int row = l / 4 + e / 2 * 8, column = 2 * (l % 4) + e % 2;
        float s = 0;
        for (int k = 0; k < 16; ++k) {
            u64 aw = all[row % 8 * 4 + k % 8 / 2][k / 8];
            u16 x = (u16)(aw >> (row / 8 * 32 + k % 2 * 16)), y = (u16)(all[column * 4 + k % 8 / 2][2] >> (k / 8 * 32 + k % 2 * 16));
            s += value(x) * value(y);
        }
        acc[e] += s;
    }
    __syncwarp();
}
inline void multiply_half(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_(acc, a, b0, b1, half_value); }
inline void multiply16(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply_(acc, a, b0, b1, bf16_value); }

// wgmma: 16 rows of this warp from registers; B [n][16] at a descriptor. K-major: rows of 128 bytes, 128-byte swizzle.
// Transposed (MN-major): B [16][64 n] blocks of 128-byte rows, `leading` bytes from one block of 64 columns to the next.
inline u16 swizzled_value(u32 at) { return *(u16*)at_shared(at ^ (at >> 7 & 7) << 4); }
template <int F, class B, class V> inline void wgmma_(float (&acc)[F][4], const u32 (&a)[4], bool clear, B b, V value) {
    u64 w[2] = {a[0] | (u64)a[1] << 32, a[2] | (u64)a[3] << 32};
    auto& all = collect(w, 2);
    int l = fiber_now->thread.x % 32;
    float rows[2][16];
    for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 16; ++k) rows[h][k] = value((u16)(all[l / 4 * 4 + k % 8 / 2][k / 8] >> (h * 32 + k % 2 * 16)));
    for (int j = 0; j < F; ++j)
        for (int e = 0; e < 4; ++e) {
            float s = clear ? 0 : acc[j][e];
            for (int k = 0; k < 16; ++k) s += rows[e / 2][k] * value(b(8 * j + 2 * (l % 4) + e % 2, k));
            acc[j][e] = s;
        }
    __syncwarp();
}

inline u64 wgmma_operand(u32 shared) { return shared >> 4; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int PENDING> inline void wgmma_wait() {}
inline void hold4(float (&)[4]) {}
inline void fence_async() {}
inline void fence_async_shared() {}
template <int F> inline void wgmma_tokens(float (&acc)[F][4], u32 a, u32 b, u32 c, u32 d, u64 tokens) {
    u32 words[4] = {a, b, c, d}, base = (u32)tokens << 4;
    wgmma_(acc, words, false, [&](int n, int k) { return swizzled_value(base + n * 128 + 2 * k); }, bf16_value);
}
inline int thread_index() { return threadIdx.x; }
inline int block_index() { return blockIdx.x; }
inline int hidden(int v) { return v; }
inline void __threadfence_block() {}

inline void wgmma_rows(u32 (&words)[4], u64 a) {  // this lane's words of an operand in shared memory
    int l = threadIdx.x % 32, w = threadIdx.x / 32 % 4;
    u32 rows = (u32)a << 4;
    for (int i = 0; i < 4; ++i) {
        int row = 16 * w + l / 4 + i % 2 * 8, column = 2 * (l % 4) + i / 2 * 8;
        words[i] = swizzled_value(rows + row * 128 + 2 * column) | (u32)swizzled_value(rows + row * 128 + 2 * column + 2) << 16;
    }
}
inline u64 wgmma_transposed(u32 shared, u32 block_bytes) { return shared >> 4 | (u64)block_bytes << 32; }
template <int F> inline void wgmma_values(float (&acc)[F][4], u64 a, u64 values) {
    u32 base = (u32)values << 4, block = values >> 32, words[4];
    wgmma_rows(words, a);
    wgmma_(acc, words, false, [&](int n, int k) { return swizzled_value(base + n / 64 * block + k * 128 + n % 64 * 2); }, bf16_value);
}
template <int F> inline void wgmma_scores(float (&acc)[F][4], u64 a, u64 b, int add) {
    u32 base = (u32)b << 4, words[4];
    wgmma_rows(words, a);
    wgmma_(acc, words, !add, [&](int n, int k) { return swizzled_value(base + n * 128 + 2 * k); }, bf16_value);
}
template <int F> inline void wgmma_half(float (&acc)[F][4], const u32 (&words)[4], u64 b) {
    u32 base = (u32)b << 4;
    wgmma_(acc, words, false, [&](int n, int k) { return swizzled_value(base + n * 128 + 2 * k); }, half_value);
}
template <int F> inline void wgmma_output(float (&acc)[F][4], u64 a, u64 b) {
    u32 words[4];
    wgmma_rows(words, a);
    wgmma_half(acc, words, b);
}
template <int F> inline void wgmma_delta(float (&acc)[F][4], u32 a, u32 b, u32 c, u32 d, u64 operand) {
    u32 words[4] = {a, b, c, d};
    wgmma_half(acc, words, operand);
}
template <int F> inline void wgmma_scored(float (&acc)[F][4], u32 a, u32 b, u32 c, u32 d, u64 operand) { wgmma_delta(acc, a, b, c, d, operand); }
template <int F> inline void wgmma_update(float (&acc)[F][4], u64 a, u64 b) {  // a is transposed: 16 rows in memory are its depth
    int l = threadIdx.x % 32, w = threadIdx.x / 32 % 4;
    u32 base = (u32)a << 4, words[4];
    for (int i = 0; i < 4; ++i) {
        int row = 16 * w + l / 4 + i % 2 * 8, k = 2 * (l % 4) + i / 2 * 8;
        words[i] = swizzled_value(base + k * 128 + 2 * row) | (u32)swizzled_value(base + (k + 1) * 128 + 2 * row) << 16;
    }
    wgmma_half(acc, words, b);
}
inline void warp_arrive(u32 b) { __syncwarp(); if (threadIdx.x % 32 == 0) barrier_arrive(b); }
template <int COUNT> inline void more_registers() {}
template <int COUNT> inline void fewer_registers() {}
inline void take_registers() {}
inline void give_registers() {}
