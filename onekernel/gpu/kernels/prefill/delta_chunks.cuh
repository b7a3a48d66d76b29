// The delta rule over chunks of 64 tokens, first part: all that does not depend on the state that enters the chunk.
//
// An item is (chunk, value head), done by all workers; warp w of a group has tokens 16 w to 16 w + 15. Each group convolves
// one of k, v and q; the products and the inverse are shared out among them. Formulas and names as in
// reference/delta_rule.py: with total = cumulative decay and fade_ij = exp(total_i - total_j),
//     A = strictly lower(beta_i k_i k_j fade_ij),   R = (I + A)^-1,
//     U = R (beta v),   W = R (beta exp(total) k).
// q and k are l2-normed here; the query's factor 1 / sqrt(128) is left to the next part.
#pragma once

#include "prefill/model.cuh"

constexpr int SOLVE_STRIDE = CHUNK + 4;  // floats; a column of a matrix then touches different banks
constexpr int HEAD_ROW = KEY_HEAD_DIM * 2;  // bytes of a token's row of one head
constexpr int PART_BYTES = CHUNK * HEAD_ROW;
enum Part { KEY_PART, VALUE_PART, QUERY_PART };

struct ChunkScratch {
    u8 rows[CHUNK_BUFFERS][3][PART_BYTES];  // k, v, q: of this item, and of the next
    float solve[CHUNK * SOLVE_STRIDE];      // A, and R (see invert)
    float total[2][CHUNK];                  // of this item, and of the next
    float beta[2][CHUNK];
};

// First channel of a part of a head.
__device__ __forceinline__ int part_channel(int part, int head) {
    int key_head = head / (VALUE_HEADS / KEY_HEADS);
    return part == KEY_PART ? KEY_DIM + key_head * KEY_HEAD_DIM : part == VALUE_PART ? 2 * KEY_DIM + head * VALUE_HEAD_DIM : key_head * KEY_HEAD_DIM;
}

// Asks for this warp's 16 rows of its group's part.
__device__ __forceinline__ void load_rows(const PrefillArguments& a, int item, u32 rows) {
    int warp = thread_index() / 32, part = warp / 4, lane = thread_index() % 32, first_row = warp % 4 * 16 + lane / 16;
    int first_token = item / VALUE_HEADS * CHUNK + first_row, left = a.tokens - first_token;
    const u16* from = a.projected + (long long)first_token * LINEAR_STRIDE + part_channel(part, item % VALUE_HEADS) + lane % 16 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (2 * i < left) copy_async16(rows + part * PART_BYTES + swizzled<HEAD_ROW>(first_row + 2 * i, lane % 16), from + 2 * i * LINEAR_STRIDE);
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
__device__ __forceinline__ void gates_of_chunk(const PrefillArguments& a, const LinearLayer& layer, int first_token, int head, float* totals, float* betas) {
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
        betas[2 * lane + i] = beta;
    }
    float total = decay[0] + decay[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float before = __shfl_up_sync(0xFFFFFFFFu, total, offset);
        if (lane >= offset) total += before;
    }
    totals[2 * lane] = total - decay[1];
    totals[2 * lane + 1] = total;
}

// Convolution, SiLU and (for q and k) l2 norm of this warp's 16 tokens of a part, from raw rows to fp16 rows in place.
// Lane l has dims 4 l to 4 l + 3 of ROWS at once, so that their chains of dependent steps overlap.
__device__ __forceinline__ void convolve(const PrefillArguments& a, const LinearLayer& layer, const Convolution& c, int item, u32 rows) {
    constexpr int ROWS = 4;
    int warp = thread_index() / 32 % 4, part = thread_index() / 128, lane = thread_index() % 32, first_row = 16 * warp;
    int first_token = item / VALUE_HEADS * CHUNK + first_row, rows_left = a.tokens - first_token;
    float4 x[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) x[i] = make_float4(low_half(c.before[i].x), high_half(c.before[i].x), low_half(c.before[i].y), high_half(c.before[i].y));
    if (first_token == 0) {  // before the first token: the state's window
        const float* w = layer.conv_window + 4 * (part_channel(part, item % VALUE_HEADS) + 4 * lane);
#pragma unroll
        for (int i = 0; i < 3; ++i) x[i] = make_float4(w[1 + i], w[5 + i], w[9 + i], w[13 + i]);
    }
    if (rows_left <= 0) {  // padding is zero: it leaves the state alone
#pragma unroll 2
        for (int row = 0; row < 16; ++row) store_shared2(rows + part * PART_BYTES + (first_row + row) * HEAD_ROW + 8 * lane, 0, 0);
        return;
    }
#pragma unroll 1
    for (int first = 0; first < 16; first += ROWS) {
        u32 at = rows + part * PART_BYTES + (first_row + first) * HEAD_ROW + lane % 2 * 8, chunk = (lane / 2 ^ first % 8);
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
        float norm = rsqrt_fast(warp_sum_scatter(sums, lane) + 1e-6f);  // of row lane * ROWS / 32
        if (part == VALUE_PART) norm = 1.0f;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            float scale = __shfl_sync(0xFFFFFFFFu, norm, 32 / ROWS * row);
            bool valid = first + row < rows_left;
            u32 low = valid ? pack_half2(y[row].x * scale, y[row].y * scale) : 0, high = valid ? pack_half2(y[row].z * scale, y[row].w * scale) : 0;
            store_shared2(at + swizzled<HEAD_ROW>(row, chunk), low, high);
        }
    }
}

// R = (I + A)^-1 for a strictly lower triangular A, by blocks of 16 and by a group. R's diagonal blocks take the place of A's;
// the others, of columns j below the diagonal, stand above it, in block (j, i) for (i, j): R_ij = -R_ii sum of A_ik R_kj.
// The diagonal is found in float32; the rest, whose factors multiply_inverse rounds to fp16 anyway, on the tensor cores.
// Where only the first block holds tokens (`used`), all others are the identity already.
__device__ __forceinline__ void invert(float* solve, int used, int barrier) {
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
    const int j = t / 32, lane = t % 32;  // a warp has column j of the blocks
    // A block as rows of fp16, for the left of a product.
    auto left = [&](u32 (&a)[4], int row, int column) {
        const float* at = solve + (16 * row + lane / 4) * SOLVE_STRIDE + 16 * column + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 v = *(const float2*)(at + i % 2 * 8 * SOLVE_STRIDE + i / 2 * 8);
            a[i] = pack_half2(v.x, v.y);
        }
    };
    // Accumulators, for the right of one.
    auto right = [&](u32 (&b)[4], const float (&acc)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = transpose8(pack_half2(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]));
    };
    u32 known[3][4];  // R_kj for k = j, j + 1, j + 2
    float acc[2][4];
    {
        const float* at = solve + (16 * j + lane / 4) * SOLVE_STRIDE + 16 * j + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = at[i % 4 / 2 * 8 * SOLVE_STRIDE + i / 4 * 8 + i % 2];
        right(known[0], acc);
    }
#pragma unroll
    for (int n = 1; n < 4; ++n) {  // block row i = j + n
        if (j + n >= used) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
        u32 a[4], b[4];
#pragma unroll
        for (int k = 0; k < n; ++k) {
            left(a, j + n, j + k);
            multiply_half(acc[0], a, known[k][0], known[k][1]);
            multiply_half(acc[1], a, known[k][2], known[k][3]);
        }
        right(b, acc);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0;
        left(a, j + n, j + n);
        multiply_half(acc[0], a, b[0], b[1]);
        multiply_half(acc[1], a, b[2], b[3]);
        float* at = solve + (16 * j + lane / 4) * SOLVE_STRIDE + 16 * (j + n) + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = -acc[i / 4][i % 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) *(float2*)(at + i % 2 * 8 * SOLVE_STRIDE + i / 2 * 8) = make_float2(acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]);
        if (n < 3) right(known[n], acc);
    }
}

// Two fragments n and n + 1 of a matrix of 64 rows. On sm_90a they are registers of wgmma, and stay as they are.
__device__ __forceinline__ void store_pair(u8* matrix, int row, int n, uint4 v, int row_bytes) {
    if (WGMMA) {
        ((uint4*)matrix)[thread_index() % 128 + 64 * n] = v;
        return;
    }
    u8* at = matrix + row * row_bytes + 16 * n + thread_index() % 4 * 4;
    *(u32*)at = v.x, *(u32*)(at + 8 * row_bytes) = v.y;
    *(u32*)(at + 16) = v.z, *(u32*)(at + 8 * row_bytes + 16) = v.w;
}

// A group's share of the products with R: U = R diag(beta) v for the values, -W = -R diag(beta exp(total)) k for the keys.
__device__ __forceinline__ void multiply_inverse(const ChunkScratch& s, int turn, u32 rows, int part, int used, u8* item) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, row = 16 * warp + lane / 4;
    const bool keys = part == KEY_PART;
    float acc[16][4] = {};
#pragma unroll 1
    for (int k = 0; k <= warp && warp < used; ++k) {
        u32 r[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int column = 16 * k + i / 2 * 8 + 2 * (lane % 4);
            float2 v = *(const float2*)(s.solve + (16 * k + lane / 4 + i % 2 * 8) * SOLVE_STRIDE + 16 * warp + i / 2 * 8 + 2 * (lane % 4));  // see invert
            float2 beta = *(const float2*)(s.beta[turn] + column);
            if (keys) {
                float2 total = *(const float2*)(s.total[turn] + column);
                beta.x *= -quick_exp(total.x), beta.y *= -quick_exp(total.y);
            }
            r[i] = pack_half2(v.x * beta.x, v.y * beta.y);
        }
#pragma unroll
        for (int n = 0; n < 16; n += 2) {
            u32 b[4];
            load_matrix_transposed(b, rows + part * PART_BYTES + swizzled<HEAD_ROW>(16 * k + lane % 16, n + lane / 16));
            multiply_half(acc[n], r, b[0], b[1]);
            multiply_half(acc[n + 1], r, b[2], b[3]);
        }
    }
    u8* to = item + (keys ? ITEM_WEIGHT : ITEM_DELTA);
#pragma unroll
    for (int n = 0; n < 16; n += 2)
        store_pair(to, row, n, make_uint4(pack_half2(acc[n][0], acc[n][1]), pack_half2(acc[n][2], acc[n][3]), pack_half2(acc[n + 1][0], acc[n + 1][1]),
                                          pack_half2(acc[n + 1][2], acc[n + 1][3])), KEY_HEAD_DIM * 2);
}

// This warp's 16 rows of q, faded from the chunk's start, and of k, faded to its end, to device memory.
__device__ __forceinline__ void store_faded(const float* total, u32 rows, u8* item) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32, chunk = lane % 16;
    float end = total[CHUNK - 1];
#pragma unroll 2
    for (int i = 0; i < 16; ++i) {
        bool is_key = i >= 8;
        int row = 16 * warp + 2 * (i % 8) + lane / 16;
        uint4 v = load_shared4(rows + (is_key ? KEY_PART : QUERY_PART) * PART_BYTES + swizzled<HEAD_ROW>(row, chunk));
        float f = quick_exp(is_key ? end - total[row] : total[row]);
        float2 x = unpack_half2(v.x), y = unpack_half2(v.y), z = unpack_half2(v.z), w = unpack_half2(v.w);
        *(uint4*)(item + (is_key ? ITEM_KEY : ITEM_QUERY) + item_place(row, chunk)) =
            make_uint4(pack_half2(x.x * f, x.y * f), pack_half2(y.x * f, y.y * f), pack_half2(z.x * f, z.y * f), pack_half2(w.x * f, w.y * f));
    }
}

// k k^T by one group, for A, and q k^T by another, for the scores; above the diagonal there is nothing to do.
__device__ __forceinline__ void multiply_keys(ChunkScratch& s, int turn, u32 rows, int part, int used, u8* item) {
    int warp = thread_index() / 32 % 4, lane = thread_index() % 32;
    float acc[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < KEY_HEAD_DIM / 16 && warp < used; ++k) {
        u32 own[4];
        load_matrix(own, rows + part * PART_BYTES + swizzled<HEAD_ROW>(16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < 8; n += 2)
            if (n / 2 <= warp) {
                u32 b[4];
                load_matrix(b, rows + KEY_PART * PART_BYTES + swizzled<HEAD_ROW>(8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                multiply_half(acc[n], own, b[0], b[1]);
                multiply_half(acc[n + 1], own, b[2], b[3]);
            }
    }
    const int row = 16 * warp + lane / 4, i = row - 2 * (lane % 4);  // minus the first column of fragment 0
    const bool keys = part == KEY_PART;
    float from[2] = {s.total[turn][row], s.total[turn][row + 8]}, beta[2] = {keys ? s.beta[turn][row] : 1.0f, keys ? s.beta[turn][row + 8] : 1.0f};
    float* solve = s.solve + row * SOLVE_STRIDE + 2 * (lane % 4);
    const int least = keys ? 1 : 0;  // row minus column
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float2 to = *(const float2*)(s.total[turn] + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int below = i + 8 * half - 8 * n;
            acc[n][2 * half] = below >= least ? acc[n][2 * half] * beta[half] * quick_exp(from[half] - to.x) : 0.0f;
            acc[n][2 * half + 1] = below >= least + 1 ? acc[n][2 * half + 1] * beta[half] * quick_exp(from[half] - to.y) : 0.0f;
        }
    }
    if (keys) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) *(float2*)(solve + 8 * n + half * 8 * SOLVE_STRIDE) = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
    } else {
#pragma unroll
        for (int n = 0; n < 8; n += 2)
            store_pair(item + ITEM_SCORES, row, n, make_uint4(pack_half2(acc[n][0], acc[n][1]), pack_half2(acc[n][2], acc[n][3]), pack_half2(acc[n + 1][0], acc[n + 1][1]),
                                                              pack_half2(acc[n + 1][2], acc[n + 1][3])), CHUNK * 2);
    }
}

__device__ __forceinline__ void delta_chunks(const PrefillArguments& a, const LinearLayer& layer, u8* memory) {
    const int group = thread_index() / 128, lane = thread_index() % 32, items = (a.tokens + CHUNK - 1) / CHUNK * VALUE_HEADS;
    ChunkScratch& s = *(ChunkScratch*)memory;
    auto load = [&](int item, u32 rows) {
        if (item < items) load_rows(a, item, rows);
        copy_commit();
    };
    Convolution next;
    int turn = 0;  // of the two places of decay and beta
    // What an item's convolution and gates need, while the products of the item before are made.
    // Behind the last item, of that once more: a register that is loaded under a condition is one that lives through all phases.
    auto prepare = [&](int item, int turn) {
        item = min(item, items - 1);
        if (thread_index() / 32 == 4 * QUERY_PART) gates_of_chunk(a, layer, item / VALUE_HEADS * CHUNK, item % VALUE_HEADS, s.total[turn], s.beta[turn]);
        next.load(a, layer, item / VALUE_HEADS * CHUNK + thread_index() / 32 % 4 * 16, part_channel(group, item % VALUE_HEADS) + 4 * lane);
    };
    load(block_index(), shared_address(s.rows[0]));
    prepare(block_index(), turn);
#pragma unroll 1
    for (int item = block_index(); item < items; item += gridDim.x, turn ^= 1) {
        const u32 rows = shared_address(s.rows[0]) + turn % CHUNK_BUFFERS * (3 * PART_BYTES);
        const int used = (min(a.tokens - item / VALUE_HEADS * CHUNK, CHUNK) + 15) / 16;  // sixteenths of the chunk that hold tokens
        u8* to = a.items + (long long)item * ITEM_BYTES;
        copy_wait<0>();
        __syncwarp();
        convolve(a, layer, next, item, rows);
        worker_sync();  // rows and gates are there
        if (CHUNK_BUFFERS > 1) load(item + gridDim.x, shared_address(s.rows[0]) + (turn ^ 1) * (3 * PART_BYTES));
        if (group == VALUE_PART)
            store_faded(s.total[turn], rows, to);
        else
            multiply_keys(s, turn, rows, group, used, to);
        if (group == KEY_PART) {
            group_barrier(1, 128);
            invert(s.solve, used, 1);
            if (thread_index() == 0) a.fades[item] = quick_exp(s.total[turn][CHUNK - 1]);
        }
        worker_sync();  // R is there
        prepare(item + gridDim.x, turn ^ 1);
        if (group != QUERY_PART) multiply_inverse(s, turn, rows, group, used, to);
        worker_sync();  // rows and R are read
        if (CHUNK_BUFFERS == 1) load(item + gridDim.x, shared_address(s.rows[0]));
    }
}
