// CUDA on the CPU, as far as the batch kernel needs it: each thread of a block is a fiber with its own stack, the
// collectives of a warp and the barriers of a block are meetings of fibers. Slow, in order, and strict: lanes that
// part before a collective are an error here, and so is an access that is not aligned.
#pragma once
#include <cstdint>
#include <cstring>
#include <cstdio>
#include <cstdlib>
#include <cmath>
#include <deque>
#include <vector>
#include <algorithm>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)
#define __CUDA_ARCH__ 800
struct uint2 { unsigned x, y; }; struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; }; struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
struct Dim { unsigned x; };
struct Warp { int arrived = 0; uint64_t in[32]; uint64_t extra[32][16]; float* acc[32]; uint64_t out[32]; std::vector<struct Fiber*> waiting; int size; const char* what = 0; };
struct Block { unsigned char* memory; std::vector<Warp> warps; int count[16] = {0}; std::vector<struct Fiber*> waiting[16]; };
struct Fiber { void* sp; char* stack; Dim tid; Dim bid; Block* block; Warp* warp; int lane; bool done = false; };
extern Fiber* cur; extern std::deque<Fiber*> ready; extern Dim grid_dim;
#define threadIdx (cur->tid)
#define blockIdx (cur->bid)
#define gridDim grid_dim
void schedule();             // switch to next ready fiber
static inline void yield_fiber() { ready.push_back(cur); schedule(); }
static inline void wake(std::vector<Fiber*>& w) { for (auto f : w) ready.push_back(f); w.clear(); }
// rendezvous of a warp; the last to arrive runs f
template <class F> static inline void rendezvous(const char* what, F f) {
    Warp* w = cur->warp;
    if (w->arrived && w->what != what && strcmp(w->what, what)) { fprintf(stderr, "divergent: block %u thread %u at %s, others at %s\n", cur->bid.x, cur->tid.x, what, w->what); abort(); }
    w->what = what;
    if (++w->arrived == 32) { w->arrived = 0; f(w); wake(w->waiting); }
    else { w->waiting.push_back(cur); schedule(); }
}
static inline void bar(int id, int threads) {
    Block* b = cur->block;
    if (++b->count[id] == threads) { b->count[id] = 0; wake(b->waiting[id]); }
    else { b->waiting[id].push_back(cur); schedule(); }
}
template <class T> static inline uint64_t bits(T v) { uint64_t r = 0; memcpy(&r, &v, sizeof v); return r; }
template <class T> static inline T from_bits(uint64_t v) { T r; memcpy(&r, &v, sizeof r); return r; }
template <class T> static inline T shfl_index(const char* what, T v, int src) {
    cur->warp->in[cur->lane] = bits(v); cur->warp->extra[cur->lane][0] = src;
    rendezvous(what, [](Warp* w) { for (int l = 0; l < 32; ++l) w->out[l] = w->in[w->extra[l][0] & 31]; });
    return from_bits<T>(cur->warp->out[cur->lane]);
}
#define __shfl_sync(m, v, s) shfl_index("shfl", v, s)
#define __shfl_xor_sync(m, v, s) shfl_index("xor", v, cur->lane ^ (s))
template <class T> static inline T shfl_up_(T v, int d) { return shfl_index("up", v, cur->lane >= d ? cur->lane - d : cur->lane); }
template <class T> static inline T shfl_down_(T v, int d) { return shfl_index("down", v, cur->lane + d < 32 ? cur->lane + d : cur->lane); }
#define __shfl_up_sync(m, v, d) shfl_up_(v, d)
#define __shfl_down_sync(m, v, d) shfl_down_(v, d)
static inline unsigned ballot(bool p) {
    cur->warp->in[cur->lane] = p;
    rendezvous("ballot", [](Warp* w) { unsigned r = 0; for (int l = 0; l < 32; ++l) r |= (unsigned)w->in[l] << l; for (int l = 0; l < 32; ++l) w->out[l] = r; });
    return (unsigned)cur->warp->out[cur->lane];
}
#define __ballot_sync(m, p) ballot(p)
#define __all_sync(m, p) (ballot(p) == 0xFFFFFFFFu)
#define __any_sync(m, p) (ballot(p) != 0)
static inline void __syncwarp() { rendezvous("syncwarp", [](Warp*) {}); }
#define __syncthreads() bar(0, 288)
static inline void __threadfence_block() {}
template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T atomicAdd(T* p, T v) { T o = *p; *p += v; return o; }
static inline unsigned __float_as_uint(float f) { return (unsigned)bits(f); }
static inline int __float_as_int(float f) { return (int)bits(f); }
static inline float __uint_as_float(unsigned u) { return from_bits<float>(u); }
static inline float __int_as_float(int u) { return from_bits<float>((unsigned)u); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float my_expf(float x) { return expf(x); }
#define __expf my_expf
static inline float my_logf(float x) { return logf(x); }
#define __logf my_logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned long long __double2ull_rz(double d) { return (unsigned long long)d; }
static inline unsigned long long __float2ull_rz(float d) { return (unsigned long long)d; }
static inline double __ull2double_rn(unsigned long long v) { return (double)v; }
static inline double __dmul_rn(double a, double b) { volatile double r = a * b; return r; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __uint2float_rn(unsigned v) { return (float)v; }
using std::min; using std::max;
static inline unsigned min(int a, unsigned b) { return std::min((unsigned)a, b); }
static inline long long min(long long a, int b) { return std::min(a, (long long)b); }
