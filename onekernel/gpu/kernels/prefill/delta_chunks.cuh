// The delta rule over chunks of 64 tokens, first part: all that does not depend on the state that enters the chunk.
//
// An item is (chunk, value head), done by four warps; warp w has tokens 16 w to 16 w + 15. Formulas and names as in
// reference/delta_rule.py: with total = cumulative decay and fade_ij = exp(total_i - total_j),
//     A = strictly lower(beta_i k_i k_j fade_ij),   R = (I + A)^-1,
//     U = R (beta v),   W = R (beta exp(total) k).
// q and k are l2-normed here; the query's factor 1 / sqrt(128) is left to delta_scan.
#pragma once

#include "prefill/model.cuh"

constexpr int SOLVE_STRIDE = CHUNK + 4;  // floats; a column of a matrix then touches different banks
constexpr int HEAD_ROW = KEY_HEAD_DIM * 2;  // bytes of a token's row of one head

struct ChunkScratch {
    u8 key[CHUNK * HEAD_ROW];
    u8 value[CHUNK * HEAD_ROW];
    union {
        u8 query[CHUNK * HEAD_ROW];
        float solve[CHUNK * SOLVE_STRIDE];  // A, then R in its place; what is above the diagonal blocks is scratch
    };
    float total[CHUNK];
    float beta[CHUNK];
};

// First channel of k, v and q of a head, the parts as they lie in ChunkScratch.
__device__ __forceinline__ int part_channel(int part, int head) {
    int key_head = head / (VALUE_HEADS / KEY_HEADS);
    return part == 0 ? KEY_DIM + key_head * KEY_HEAD_DIM : part == 1 ? 2 * KEY_DIM + head * VALUE_HEAD_DIM : key_head * KEY_HEAD_DIM;
}

// What the convolution of four channels needs beside the chunk's own rows.
struct Convolution {
    float4 taps[4];
    uint2 before[3];  // the three rows before this warp's, 16 bit

    __device__ __forceinline__ void load(const PrefillArguments& a, const LinearLayer& layer, int first_token, int channel) {
#pragma unroll
        for (int i = 0; i < 4; ++i) taps[i] = load_constant4(layer.conv_weight + 4 * (channel + i));
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            int token = first_token + i - 3;
            before[i] = token >= 0 && token < a.tokens ? *(const uint2*)(a.projected + (long long)token * LINEAR_STRIDE + channel) : make_uint2(0, 0);
        }
    }
};

// beta and the cumulative decay; by one warp.
__device__ __forceinline__ void gates_of_chunk(const PrefillArguments& a, const LinearLayer& layer, int first_token, int head, ChunkScratch& s) {
    int lane = thread_index() % 32;
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int token = first_token + 2 * lane + i;
        float beta = 0;
        decay[i] = 0;
        if (token < a.tokens) {
            const float* gates = a.gates + (long long)token * GATE_STRIDE + head;
            beta = quick_sigmoid(gates[0]);
            float x = gates[VALUE_HEADS] + load_constant(layer.dt_bias + head);
            decay[i] = load_constant(layer.negative_decay_rate + head) * (x > 20.0f ? x : log1pf(__expf(x)));
        }
        s.beta[2 * lane + i] = beta;
    }
    float total = decay[0] + decay[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float before = __shfl_up_sync(0xFFFFFFFFu, total, offset);
        if (lane >= offset) total += before;
    }
    s.total[2 * lane] = total - decay[1];
    s.total[2 * lane + 1] = total;
}

// Convolution, SiLU and (for q and k) l2 norm of this warp's 16 tokens of q, k and v, from raw rows to fp16 rows in place.
// Lane l has dims 4 l to 4 l + 3 of ROWS at once, so that their chains of dependent steps overlap.
__device__ __forceinline__ void convolve(const PrefillArguments& a, const LinearLayer& layer, int first_token, int head, ChunkScratch& s) {
    constexpr int ROWS = 4;
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, first_row = 16 * warp;
    int rows_left = a.tokens - first_token - first_row;
    u32 base = shared_address(&s);
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
        const u16* from = a.projected + (long long)(first_token + first_row + lane / 16) * LINEAR_STRIDE + part_channel(part, head) + lane % 16 * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (2 * i + lane / 16 < rows_left)
                copy_async16(base + part * CHUNK * HEAD_ROW + swizzled<HEAD_ROW>(first_row + 2 * i + lane / 16, lane % 16), from + 2 * i * LINEAR_STRIDE);
    }
    copy_commit();
    Convolution next;
    next.load(a, layer, first_token + first_row, part_channel(0, head) + 4 * lane);
    if (warp == 0) gates_of_chunk(a, layer, first_token, head, s);  // while the copies are on their way
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {
        Convolution c = next;
        if (part < 2) next.load(a, layer, first_token + first_row, part_channel(part + 1, head) + 4 * lane);
        float4 x[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) x[i] = make_float4(low_half(c.before[i].x), high_half(c.before[i].x), low_half(c.before[i].y), high_half(c.before[i].y));
        if (first_token + first_row == 0) {  // before the first token: the state's window
            const float* w = layer.conv_window + 4 * (part_channel(part, head) + 4 * lane);
#pragma unroll
            for (int i = 0; i < 3; ++i) x[i] = make_float4(w[1 + i], w[5 + i], w[9 + i], w[13 + i]);
        }
        copy_wait<0>();
        __syncwarp();
#pragma unroll 1
        for (int first = 0; first < 16; first += ROWS) {
            u32 at = base + part * CHUNK * HEAD_ROW + (first_row + first) * HEAD_ROW + lane % 2 * 8, chunk = (lane / 2 ^ first % 8);
            float4 y[ROWS];
            float sums[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                uint2 v = load_shared2(at + swizzled<HEAD_ROW>(row, chunk));
                float4 now = make_float4(low_half(v.x), high_half(v.x), low_half(v.y), high_half(v.y));
                y[row].x = quick_silu(c.taps[0].x * x[0].x + c.taps[0].y * x[1].x + c.taps[0].z * x[2].x + c.taps[0].w * now.x);
                y[row].y = quick_silu(c.taps[1].x * x[0].y + c.taps[1].y * x[1].y + c.taps[1].z * x[2].y + c.taps[1].w * now.y);
                y[row].z = quick_silu(c.taps[2].x * x[0].z + c.taps[2].y * x[1].z + c.taps[2].z * x[2].z + c.taps[2].w * now.z);
                y[row].w = quick_silu(c.taps[3].x * x[0].w + c.taps[3].y * x[1].w + c.taps[3].z * x[2].w + c.taps[3].w * now.w);
                sums[row] = y[row].x * y[row].x + y[row].y * y[row].y + y[row].z * y[row].z + y[row].w * y[row].w;
                x[0] = x[1], x[1] = x[2], x[2] = now;
            }
            float norm = part == 1 ? 1.0f : rsqrt_fast(warp_sum_scatter(sums, lane) + 1e-6f);  // of row lane * ROWS / 32
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                float scale = __shfl_sync(0xFFFFFFFFu, norm, 32 / ROWS * row);
                bool valid = first + row < rows_left;  // padding is zero: it leaves the state alone
                u32 low = valid ? pack_half2(y[row].x * scale, y[row].y * scale) : 0, high = valid ? pack_half2(y[row].z * scale, y[row].w * scale) : 0;
                store_shared2(at + swizzled<HEAD_ROW>(row, chunk), low, high);
            }
        }
    }
}

// solve = (I + solve)^-1 for a strictly lower triangular matrix, in float32: diagonal blocks of 16 by substitution, then
// pairs of blocks of 16 and of 32: [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. By the group's 128 threads.
__device__ __forceinline__ void invert(float* solve, int barrier) {
    int t = thread_index() % 128;
    if (t < 64) {
        float* block = solve + (t / 16 * 16) * (SOLVE_STRIDE + 1);
        int column = t % 16;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float sum[4] = {i == column ? 1.0f : 0.0f, 0, 0, 0};
#pragma unroll
            for (int k = 0; k < i; k += 4) {  // what stands from the diagonal on is zero
                float4 row = *(const float4*)(block + i * SOLVE_STRIDE + k);
                sum[0] -= row.x * x[k];
                if (k + 1 < i) sum[1] -= row.y * x[k + 1];
                if (k + 2 < i) sum[2] -= row.z * x[k + 2];
                if (k + 3 < i) sum[3] -= row.w * x[k + 3];
            }
            x[i] = sum[0] + sum[1] + (sum[2] + sum[3]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * SOLVE_STRIDE + column] = x[i];
    }
    group_barrier(barrier, 128);
    {
        // Two pairs of blocks of 16, 64 threads each; the product waits in the block above the diagonal.
        float* corner = solve + (t / 64 * 32) * (SOLVE_STRIDE + 1);
        int i = t % 64 / 4, j = t % 4 * 4;
        float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
        for (int k = 0; k < 16; ++k) {
            float b = corner[(16 + i) * SOLVE_STRIDE + k];
            float4 p = *(float4*)(corner + k * SOLVE_STRIDE + j);
            sum[0] += b * p.x, sum[1] += b * p.y, sum[2] += b * p.z, sum[3] += b * p.w;
        }
        *(float4*)(corner + i * SOLVE_STRIDE + 16 + j) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        group_barrier(barrier, 128);
        sum[0] = sum[1] = sum[2] = sum[3] = 0;
#pragma unroll 4
        for (int k = 0; k < 16; ++k) {
            float q = corner[(16 + i) * SOLVE_STRIDE + 16 + k];
            float4 p = *(float4*)(corner + k * SOLVE_STRIDE + 16 + j);
            sum[0] -= q * p.x, sum[1] -= q * p.y, sum[2] -= q * p.z, sum[3] -= q * p.w;
        }
        *(float4*)(corner + (16 + i) * SOLVE_STRIDE + j) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    group_barrier(barrier, 128);
    {
        // One pair of blocks of 32. Above the diagonals of P^-1 and Q^-1 stands scratch: those k are left out.
        int i = t / 4, j = t % 4 * 8;
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
        for (int k = j / 16 * 16; k < 32; ++k) {
            float b = solve[(32 + i) * SOLVE_STRIDE + k];
            float4 p = *(float4*)(solve + k * SOLVE_STRIDE + j), q = *(float4*)(solve + k * SOLVE_STRIDE + j + 4);
            sum[0] += b * p.x, sum[1] += b * p.y, sum[2] += b * p.z, sum[3] += b * p.w;
            sum[4] += b * q.x, sum[5] += b * q.y, sum[6] += b * q.z, sum[7] += b * q.w;
        }
        *(float4*)(solve + i * SOLVE_STRIDE + 32 + j) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *(float4*)(solve + i * SOLVE_STRIDE + 36 + j) = make_float4(sum[4], sum[5], sum[6], sum[7]);
        group_barrier(barrier, 128);
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[n] = 0;
#pragma unroll 4
        for (int k = 0; k < (i < 16 ? 16 : 32); ++k) {
            float b = solve[(32 + i) * SOLVE_STRIDE + 32 + k];
            float4 p = *(float4*)(solve + k * SOLVE_STRIDE + 32 + j), q = *(float4*)(solve + k * SOLVE_STRIDE + 36 + j);
            sum[0] -= b * p.x, sum[1] -= b * p.y, sum[2] -= b * p.z, sum[3] -= b * p.w;
            sum[4] -= b * q.x, sum[5] -= b * q.y, sum[6] -= b * q.z, sum[7] -= b * q.w;
        }
        *(float4*)(solve + (32 + i) * SOLVE_STRIDE + j) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *(float4*)(solve + (32 + i) * SOLVE_STRIDE + j + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
    group_barrier(barrier, 128);
}

// U = R diag(beta) v and -W = -R diag(beta exp(total)) k, of this warp's 16 tokens.
__device__ __forceinline__ void multiply_inverse(const ChunkScratch& s, u8* item) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, row = 16 * warp + lane / 4;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        u32 rows = shared_address(part ? s.key : s.value);
        float acc[16][4] = {};
#pragma unroll 1
        for (int k = 0; k <= warp; ++k) {
            u32 r[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int column = 16 * k + i / 2 * 8 + 2 * (lane % 4);
                float2 v = *(const float2*)(s.solve + (row + i % 2 * 8) * SOLVE_STRIDE + column), beta = *(const float2*)(s.beta + column);
                if (part) {
                    float2 total = *(const float2*)(s.total + column);
                    beta.x *= -quick_exp(total.x), beta.y *= -quick_exp(total.y);
                }
                r[i] = pack_half2(v.x * beta.x, v.y * beta.y);
            }
#pragma unroll
            for (int n = 0; n < 16; n += 2) {
                u32 b[4];
                load_matrix_transposed(b, rows + swizzled<HEAD_ROW>(16 * k + lane % 16, n + lane / 16));
                multiply_half(acc[n], r, b[0], b[1]);
                multiply_half(acc[n + 1], r, b[2], b[3]);
            }
        }
        u8* at = item + (part ? ITEM_WEIGHT : ITEM_DELTA) + lane % 4 * 4;
        // On sm_90a, U is for the accumulators of delta_wgmma.cuh as it is in these.
        uint2* fragments = (uint2*)(item + ITEM_DELTA) + thread_index() % 128;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            u32 first = pack_half2(acc[n][0], acc[n][1]), second = pack_half2(acc[n][2], acc[n][3]);
            if (WGMMA && !part)
                fragments[128 * n] = make_uint2(first, second);
            else
                *(u32*)(at + item_place(row, n)) = first, *(u32*)(at + item_place(row + 8, n)) = second;
        }
    }
}

// This warp's 16 rows of q, faded from the chunk's start, and of k, faded to its end, to device memory.
__device__ __forceinline__ void store_faded(const ChunkScratch& s, u8* item) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, chunk = lane % 16;
    float end = s.total[CHUNK - 1];
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
        bool is_key = i >= 8;
        int row = 16 * warp + 2 * (i % 8) + lane / 16;
        uint4 v = load_shared4(shared_address(is_key ? s.key : s.query) + swizzled<HEAD_ROW>(row, chunk));
        float f = quick_exp(is_key ? end - s.total[row] : s.total[row]);
        float2 x = unpack_half2(v.x), y = unpack_half2(v.y), z = unpack_half2(v.z), w = unpack_half2(v.w);
        *(uint4*)(item + (is_key ? ITEM_KEY : ITEM_QUERY) + item_place(row, chunk)) =
            make_uint4(pack_half2(x.x * f, x.y * f), pack_half2(y.x * f, y.y * f), pack_half2(z.x * f, z.y * f), pack_half2(w.x * f, w.y * f));
    }
}

__device__ __forceinline__ void delta_chunk(const PrefillArguments& a, const LinearLayer& layer, int chunk, int head, ChunkScratch& s, int barrier) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, first_token = chunk * CHUNK;
    u8* item = a.items + (long long)(chunk * VALUE_HEADS + head) * ITEM_BYTES;
    u32 query = shared_address(s.query), key = shared_address(s.key);
    convolve(a, layer, first_token, head, s);
    group_barrier(barrier, 128);

    // k k^T and q k^T; above the diagonal there is nothing to do.
    float kk[8][4] = {}, qk[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < KEY_HEAD_DIM / 16; ++k) {
        u32 q_rows[4], k_rows[4];
        load_matrix(q_rows, query + swizzled<HEAD_ROW>(16 * warp + lane % 16, 2 * k + lane / 16));
        load_matrix(k_rows, key + swizzled<HEAD_ROW>(16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < 8; n += 2)
            if (n / 2 <= warp) {
                u32 b[4];
                load_matrix(b, key + swizzled<HEAD_ROW>(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                multiply_half(kk[n], k_rows, b[0], b[1]);
                multiply_half(kk[n + 1], k_rows, b[2], b[3]);
                multiply_half(qk[n], q_rows, b[0], b[1]);
                multiply_half(qk[n + 1], q_rows, b[2], b[3]);
            }
    }
    store_faded(s, item);
    if (warp == 0 && lane == 0) a.fades[chunk * VALUE_HEADS + head] = quick_exp(s.total[CHUNK - 1]);
    group_barrier(barrier, 128);  // the queries are read: the matrix takes their place
    int i = 16 * warp + lane / 4;
    float from[2] = {s.total[i], s.total[i + 8]}, beta[2] = {s.beta[i], s.beta[i + 8]};
    u8* scores = item + ITEM_SCORES + lane % 4 * 4;
    const int first_row = i;
    float* solve = s.solve + i * SOLVE_STRIDE + 2 * (lane % 4);
    i -= 2 * (lane % 4);  // minus the first column of fragment 0
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float2 to = *(const float2*)(s.total + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int below = i + 8 * half - 8 * n;  // row minus column
            float fade = below >= 0 ? quick_exp(from[half] - to.x) : 0.0f, next = below >= 1 ? quick_exp(from[half] - to.y) : 0.0f;
            *(u32*)(scores + score_place(first_row + 8 * half, n)) = pack_half2(qk[n][2 * half] * fade, qk[n][2 * half + 1] * next);
            *(float2*)(solve + 8 * n + half * 8 * SOLVE_STRIDE) = make_float2(below >= 1 ? beta[half] * kk[n][2 * half] * fade : 0.0f,
                                                                              below >= 2 ? beta[half] * kk[n][2 * half + 1] * next : 0.0f);
        }
    }
    group_barrier(barrier, 128);
    invert(s.solve, barrier);

    multiply_inverse(s, item);
    group_barrier(barrier, 128);  // before the next item overwrites the rows
}

__device__ __forceinline__ void delta_chunks(const PrefillArguments& a, const LinearLayer& layer, u8* memory) {
    int group = thread_index() / 128, items = (a.tokens + CHUNK - 1) / CHUNK * VALUE_HEADS;
    if (group >= CHUNK_GROUPS) return;
    ChunkScratch& scratch = ((ChunkScratch*)memory)[group];
    for (int item = group * gridDim.x + block_index(); item < items; item += CHUNK_GROUPS * gridDim.x)
        delta_chunk(a, layer, item / VALUE_HEADS, item % VALUE_HEADS, scratch, 1 + group);
}
