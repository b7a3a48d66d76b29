// Stands in for primitive/matrix.cuh: the fragments of mma.sync.m16n8k16, multiplied by the last lane to arrive.
static inline void multiply16(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    uint64_t* e = cur->warp->extra[cur->lane];
    for (int i = 0; i < 4; ++i) e[i] = a[i];
    e[4] = b0, e[5] = b1;
    cur->warp->acc[cur->lane] = acc;
    rendezvous("mma", [](Warp* w) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
            int r = l / 4, c = l % 4;
            for (int i = 0; i < 4; ++i) {
                u32 v = (u32)w->extra[l][i];
                A[r + i % 2 * 8][2 * c + i / 2 * 8] = low_half(v), A[r + i % 2 * 8][2 * c + 1 + i / 2 * 8] = high_half(v);
            }
            for (int i = 0; i < 2; ++i) B[2 * c + 8 * i][r] = low_half((u32)w->extra[l][4 + i]), B[2 * c + 1 + 8 * i][r] = high_half((u32)w->extra[l][4 + i]);
        }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                double s = w->acc[l][i];
                for (int k = 0; k < 16; ++k) s += (double)A[l / 4 + i / 2 * 8][k] * B[k][2 * (l % 4) + i % 2];
                w->acc[l][i] = (float)s;
            }
    });
}
static inline void group_barrier(int id, int threads) { bar(id, threads); }
static inline u32 transpose8(u32 v) {
    cur->warp->in[cur->lane] = v;
    rendezvous("transpose8", [](Warp* w) {
        for (int l = 0; l < 32; ++l) {
            u32 r = 0;
            for (int i = 0; i < 2; ++i) {  // row l / 4 of the result: column l / 4 of the source, of its rows 2 (l % 4) + i
                u32 word = (u32)w->in[4 * (l % 4 * 2 + i) + l / 4 / 2];
                r |= (word >> 16 * (l / 4 % 2) & 0xFFFF) << 16 * i;
            }
            w->out[l] = r;
        }
    });
    return (u32)cur->warp->out[cur->lane];
}
static inline u32 pack_half2(float low, float high) {
    _Float16 h[2] = {(_Float16)low, (_Float16)high};
    u32 v;
    memcpy(&v, h, 4);
    return v;
}
static inline float2 unpack_half2(u32 v) {
    _Float16 h[2];
    memcpy(h, &v, 4);
    return {(float)h[0], (float)h[1]};
}
