// Stands in for primitive/number.cuh: bf16.
static inline u32 bf16_of(float f) { u32 b = __float_as_uint(f); if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff; return (b + 0x7fff + (b >> 16 & 1)) >> 16; }
static inline u32 pack2(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
static inline float low_half(u32 v) { return __uint_as_float(v << 16); }
static inline float high_half(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
static inline void unpack8(float (&out)[8], uint4 v) {
    out[0] = low_half(v.x), out[1] = high_half(v.x), out[2] = low_half(v.y), out[3] = high_half(v.y);
    out[4] = low_half(v.z), out[5] = high_half(v.z), out[6] = low_half(v.w), out[7] = high_half(v.w);
}
static inline uint4 pack8(const float (&v)[8]) { return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7])); }
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }
