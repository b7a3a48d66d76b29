// Stands in for primitive/memory.cuh.
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long;
static inline u32 load_relaxed(const u32* p) { return *(volatile const u32*)p; }
static inline uint4 load_relaxed4(const u32* p) { return *(const uint4*)p; }
static inline u64 load_relaxed64(const u64* p) { return *p; }
static inline void store_relaxed(u32* p, u32 v) { *p = v; }
static inline void store_relaxed2(u32* p, u32 a, u32 b) { p[0] = a; p[1] = b; }
static inline void store_relaxed64(u64* p, u64 v) { *p = v; }
static inline void store_relaxed64x2(u64* p, u64 a, u64 b) { p[0] = a; p[1] = b; }
static inline u32 load_host(const u32* p) { return *p; }
static inline void store_host64(u64* p, u64 v) { *p = v; }
static inline uint4 load_l2(const void* p) { if ((uintptr_t)p % 16) { fprintf(stderr, "misaligned\n"); abort(); } return *(const uint4*)p; }
static inline float4 load_constant4(const float* p) { if ((uintptr_t)p % 16) { fprintf(stderr, "misaligned\n"); abort(); } return *(const float4*)p; }
static inline float load_constant(const float* p) { return *p; }
static inline void fence_gpu() {}
static inline void fence_system() {}
static inline void pause(u32) {}
static inline void doze(u32) {}
static inline u64 nanoseconds() { static u64 t; return ++t; }
static inline u32 shared_address(const void*) { return 0; }
static inline void load_l2_if(float4& v, const float* p, bool wanted) { if (wanted) v = *(const float4*)p; }
static inline void store4_if(float* p, float4 v, bool wanted) { if (wanted) *(float4*)p = v; }
static inline void prefetch_l2(const void* p) { *(volatile const char*)p; }
