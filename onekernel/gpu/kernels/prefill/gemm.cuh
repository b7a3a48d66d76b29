// Weights times activations: y[token, row] = sum over columns of W[row, column] x[token, column].
//
// A block makes tiles of ROW_TILE rows x TOKEN_TILE tokens. Warp w has 16 rows of a tile. What a lane finds of their weights
// on the decode kernel's tape (row l / 4, columns 8 (l % 4) and the next seven) is an operand of the tensor cores, in
// registers, if the tokens' columns stand in the order of `input_place`. The tokens go through a ring in shared memory,
// one copy a step of 64 columns. On sm_90a the asker brings them in, so that none of the workers waits for another.
//
// NARROW, for few tokens: a tile has 64 rows, and three groups of four warps take its steps in turn.
#pragma once

#include "prefill/model.cuh"
#include "primitive/bulk.cuh"
#include "primitive/wgmma.cuh"

constexpr int TOKEN_FRAGMENTS = TOKEN_TILE / 8;
constexpr int BLOCKS_A_TILE = PAIRS ? 2 : 1;  // that make neighbouring tiles of rows from the same tokens, each bringing half of these to both
constexpr int ROW_GROUPS = 3;  // groups of four warps that multiply: each has 64 rows
constexpr int ROW_TILE = NARROW ? 64 : 64 * ROW_GROUPS;
constexpr int GEMM_RING = GEMM_STAGES * TOKENS_BYTES;
constexpr int WEIGHTS_AHEAD = WGMMA ? 3 : GEMM_STAGES - 2;  // steps whose weights are on their way
constexpr int WEIGHT_SLOT = 4 * ROW_GROUPS * 2048;
constexpr int WEIGHT_RING = (WEIGHTS_AHEAD + 1) * WEIGHT_SLOT;  // one more: the last one's weights are just read
constexpr int STORE_TOKENS = WGMMA ? 64 : 32;                           // that a group hands to memory at a time
constexpr int STORE_BYTES = STORE_TOKENS * 128;            // of shared memory for that, for each group
constexpr int SUM_BYTES = NARROW ? (ROW_GROUPS - 1) * TOKEN_FRAGMENTS * 128 * 16 : 0;
constexpr int OFFSET_BYTES = 8 * 512;                       // of the steps of the longest row
constexpr int PRODUCT_BYTES = 128;
constexpr int GEMM_BYTES = GEMM_RING + WEIGHT_RING + ROW_GROUPS * STORE_BYTES + SUM_BYTES + OFFSET_BYTES + PRODUCT_BYTES;
static_assert(TOKEN_TILE % 16 == 0, "fragments of tokens go in pairs");

using TokenFragments = float[TOKEN_FRAGMENTS][4];

// Four times 16 bytes of the lane: rows l / 4 and l / 4 + 8 of this warp, of both column tiles of a step.
struct StepWeights {
    uint4 low[2], high[2];
};

// What is multiplied, and what becomes of it. One loop multiplies all matrices: its code stays in the instruction cache.
// It lies in shared memory and is read where it is needed (volatile): the accumulators need the registers.
enum Finish { PROJECTION_OF_LINEAR, ROWS_OF_TOKENS, ACTIVATION, LOGITS };
struct Product {
    int matrix, rows, columns;
    int tokens, splits;
    int finish;
    const u16* input;  // see input_place
    u16* out;
};

__device__ constexpr int longest(int a, int b) { return a > b ? a : b; }
static_assert(longest(longest(HIDDEN, INTERMEDIATE), longest(VALUE_DIM, QUERY_DIM)) <= 512 * STEP_COLUMNS, "room for the offsets of a row's steps");

__device__ __forceinline__ Product& product_in_shared(u8* memory) { return *(Product*)(memory + GEMM_BYTES - PRODUCT_BYTES); }
__device__ __forceinline__ const Product& product_in_shared(const u8* memory) { return *(const Product*)(memory + GEMM_BYTES - PRODUCT_BYTES); }

// Where in a group the tile (512 bytes: 8 rows x 32 columns) with columns 32 * column_tile and up stands.
__device__ __forceinline__ int tile_offset(int columns, int column_tile) {
    int tiles = columns / (CONSUMER_WARPS * 32);
    int warp = column_tile / tiles, tile = column_tile % tiles, stage = tile / TILES_PER_STAGE;
    int count = min(TILES_PER_STAGE, tiles - stage * TILES_PER_STAGE);
    return (stage * CONSUMER_WARPS * TILES_PER_STAGE + warp * count + tile % TILES_PER_STAGE) * 512;
}

// One group of 8 rows of a matrix on the tape (gpu/tape.py).
__device__ __forceinline__ const u8* group_place(const PrefillArguments& a, int matrix, int rows, int columns, int group) {
    u32 groups = (rows + 7) / 8;
    group = min(group, (int)groups - 1);
    u32 block = ((u32)(group + 1) * BLOCKS - 1) / groups;  // of the decode kernel, which owns the group
    return a.tape + a.matrix_offsets[matrix * BLOCKS + block] + (long long)(group - groups * block / BLOCKS) * columns * 16;
}

// Where this lane's weights of a tile stand. `offsets`: in shared memory, of the two tiles of each step in a group.
struct WeightPlace {
    const u8 *low, *high;
    u32 offsets;

    __device__ __forceinline__ WeightPlace(const PrefillArguments& a, const volatile Product& p, int row_tile, u32 offsets_) {
        int thread = thread_index(), group = row_tile * (ROW_TILE / 8) + (NARROW ? thread / 32 % 4 : thread / 32) * 2;
        int matrix = p.matrix, rows = p.rows, columns = p.columns;
        low = group_place(a, matrix, rows, columns, group) + thread % 32 * 16;
        high = group_place(a, matrix, rows, columns, group + 1) + thread % 32 * 16;
        offsets = offsets_;
    }
    __device__ __forceinline__ void load(StepWeights& w, int step) const {
        uint2 at = load_shared2(offsets + 8 * step);
        w.low[0] = __ldg((const uint4*)(low + at.x)), w.high[0] = __ldg((const uint4*)(high + at.x));
        w.low[1] = __ldg((const uint4*)(low + at.y)), w.high[1] = __ldg((const uint4*)(high + at.y));
    }
    // The same by way of shared memory.
    __device__ __forceinline__ void fetch(u32 to, int step) const {
        uint2 at = load_shared2(offsets + 8 * step);
        copy_async16(to, low + at.x), copy_async16(to + 512, high + at.x);
        copy_async16(to + 1024, low + at.y), copy_async16(to + 1536, high + at.y);
    }
};

// Keeps the compiler from moving uses of the accumulators across a wait: it does not know that they change meanwhile.
__device__ __forceinline__ void hold(TokenFragments& acc) {
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j) hold4(acc[j]);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void multiply_step(TokenFragments& acc, const StepWeights& w, u32 stage) {
    u64 tokens = wgmma_operand(stage);
    hold(acc);
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        wgmma_tokens(acc, w.low[half].x, w.high[half].x, w.low[half].y, w.high[half].y, tokens + 4 * half);
        wgmma_tokens(acc, w.low[half].z, w.high[half].z, w.low[half].w, w.high[half].w, tokens + 4 * half + 2);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(acc);
}

#else

__device__ __forceinline__ void multiply_step(TokenFragments& acc, const StepWeights& w, u32 stage) {
    int lane = thread_index() % 32;
#pragma unroll
    for (int k = 0; k < STEP_COLUMNS / 16; ++k) {
        uint4 low = w.low[k / 2], high = w.high[k / 2];
        u32 weights[4] = {k % 2 ? low.z : low.x, k % 2 ? high.z : high.x, k % 2 ? low.w : low.y, k % 2 ? high.w : high.y};
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; j += 2) {
            u32 tokens[4];
            load_matrix(tokens, stage + swizzled<STEP_BYTES>(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            multiply16(acc[j], weights, tokens[0], tokens[1]);
            multiply16(acc[j + 1], weights, tokens[2], tokens[3]);
        }
    }
}

#endif

// The ring of tokens, through all products of a launch.
struct TokenRing {
    u32 shared;    // address of the stages
    u32 barriers;  // address of GEMM_STAGES barriers "full" and as many "free" (sm_90a)
    volatile u32* used;  // in shared memory: steps so far that were multiplied


    __device__ __forceinline__ u32 stage(u32 step) const { return shared + step % GEMM_STAGES * TOKENS_BYTES; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __device__ __forceinline__ u32 full(u32 step) const { return barriers + step % GEMM_STAGES * 8; }
    __device__ __forceinline__ u32 free(u32 step) const { return full(step) + GEMM_STAGES * 8; }

    // By all threads, before anything else.
    __device__ __forceinline__ void init() {
        if (thread_index() == 0) {
            *used = 0;
            for (int i = 0; i < GEMM_STAGES; ++i) {
                barrier_init(full(i), 1);
                barrier_init(free(i), NARROW ? 1 : ROW_GROUPS * BLOCKS_A_TILE);
            }
            barrier_init_fence();
        }
    }
    // By one thread.
    __device__ __forceinline__ void fill(const u8* from, u32 step) const {
        if (PAIRS) {
            if (step >= GEMM_STAGES) barrier_wait_cluster(free(step), step / GEMM_STAGES - 1 & 1);
            barrier_expect(full(step), TOKENS_BYTES);
            u32 half = cluster_rank() * (TOKENS_BYTES / 2);
            bulk_load_pair(stage(step) + half, from + half, TOKENS_BYTES / 2, full(step));
            return;
        }
        if (step >= GEMM_STAGES) barrier_wait(free(step), step / GEMM_STAGES - 1 & 1);
        barrier_expect(full(step), TOKENS_BYTES);
        bulk_load(stage(step), from, TOKENS_BYTES, full(step));
    }
    __device__ __forceinline__ void await(u32 step) const { barrier_wait(full(step), step / GEMM_STAGES & 1); }
    // By all groups that read the step.
    __device__ __forceinline__ void release(u32 step) const {
        if (PAIRS) {
            if (thread_index() % 128 < 2) barrier_arrive_at(free(step), thread_index() % 128);
        } else if (thread_index() % 128 == 0) {
            barrier_arrive(free(step));
        }
    }
#else
    __device__ __forceinline__ void init() {
        if (thread_index() == 0) *used = 0;
    }
    // By all threads.
    __device__ __forceinline__ void fill(const u8* from, u32 step) const {
#pragma unroll 2
        for (int at = thread_index() * 16; at < TOKENS_BYTES; at += WORKERS * 16) copy_async16(stage(step) + at, from + at);
    }
#endif
};

// The items of a block are first_item() and every item_step()-th from there; those of a pair are the same.
__device__ __forceinline__ int first_item() { return block_index() / BLOCKS_A_TILE; }
__device__ __forceinline__ int item_step() { return gridDim.x / BLOCKS_A_TILE; }

// One tile of a product: the tiles are numbered in the order in which the blocks take them.
struct Tile {
    int row_tile, token_tile, split;
    int first, steps;  // of the columns

    template <class P>  // a Product, or one in shared memory
    __device__ __forceinline__ Tile(const P& p, int item) {
        u32 token_tiles = (u32)(p.tokens + TOKEN_TILE - 1) / TOKEN_TILE, row_tiles = (u32)(p.rows + ROW_TILE * BLOCKS_A_TILE - 1) / (ROW_TILE * BLOCKS_A_TILE);
        u32 all = p.columns / STEP_COLUMNS, splits = p.splits, rest = (u32)item / token_tiles;
        token_tile = item - rest * token_tiles, split = rest / row_tiles;
        row_tile = (rest - split * row_tiles) * BLOCKS_A_TILE + (PAIRS ? cluster_rank() : 0);
        first = all * split / splits, steps = all * (split + 1) / splits - first;
    }
};
template <class P>
__device__ __forceinline__ int tile_count(const P& p) {
    return (p.tokens + TOKEN_TILE - 1) / TOKEN_TILE * ((p.rows + ROW_TILE * BLOCKS_A_TILE - 1) / (ROW_TILE * BLOCKS_A_TILE)) * p.splits;
}
// The tokens of the step that comes `ahead` steps after the first of `item`, or null behind the last.
__device__ __forceinline__ const u8* tokens_ahead(const volatile Product& p, int item, int ahead) {
    for (int count = tile_count(p); item < count; item += item_step()) {
        Tile tile(p, item);
        if (ahead < tile.steps) return (const u8*)p.input + ((long long)tile.token_tile * (p.columns / STEP_COLUMNS) + tile.first + ahead) * TOKENS_BYTES;
        ahead -= tile.steps;
    }
    return nullptr;
}

__device__ __forceinline__ void finish_tile(const PrefillArguments& a, const volatile Product& p, int row, int token, int split, const TokenFragments& acc, u32 buffer);

// A narrow tile's sums, of the groups together, to the first.
__device__ __forceinline__ void add_groups(TokenFragments& acc, int group, u32 shared) {
    u32 sums = shared + thread_index() % 128 * 16;
    group_barrier(15, 128 * ROW_GROUPS);  // the sums of the tile before are read
    if (group) {
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j)
            store_shared4(sums + ((group - 1) * TOKEN_FRAGMENTS + j) * 2048,
                          make_uint4(__float_as_uint(acc[j][0]), __float_as_uint(acc[j][1]), __float_as_uint(acc[j][2]), __float_as_uint(acc[j][3])));
    }
    group_barrier(15, 128 * ROW_GROUPS);
    if (group) return;
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j)
#pragma unroll
        for (int g = 0; g < ROW_GROUPS - 1; ++g) {
            uint4 v = load_shared4(sums + (g * TOKEN_FRAGMENTS + j) * 2048);
            acc[j][0] += __uint_as_float(v.x), acc[j][1] += __uint_as_float(v.y), acc[j][2] += __uint_as_float(v.z), acc[j][3] += __uint_as_float(v.w);
        }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The asker's part, by one thread: the tokens of all tiles, from step `step` of the ring on. It goes by a copy of the product:
// the workers may be in the next phase when the last step is asked for.
__device__ __forceinline__ void ask_for_tokens(const TokenRing& ring, const u8* memory, u32& step) {
    const Product p = product_in_shared(memory);
    {
#pragma unroll 1
        for (int item = first_item(); item < tile_count(p); item += item_step()) {
            Tile tile(p, item);
            const u8* from = (const u8*)p.input + ((long long)tile.token_tile * (p.columns / STEP_COLUMNS) + tile.first) * TOKENS_BYTES;
#pragma unroll 1
            for (int i = 0; i < tile.steps; ++i, ++step, from += TOKENS_BYTES) ring.fill(from, step);
        }
    }
}

__device__ __forceinline__ void multiply_tiles(const PrefillArguments& a, const TokenRing& ring, const volatile Product& p, u32 offsets, u32 used) {
    constexpr int STRIDE = NARROW ? ROW_GROUPS : 1;  // of the steps that a group takes
    const int group = thread_index() / 128, first = NARROW ? group : 0;
    const u32 weights = ring.shared + GEMM_RING + thread_index() / 32 * 2048 + thread_index() % 32 * 16;
    u32 slot = 0;  // of the weights of the next step
    auto load_first = [&](int item) {  // weights of the first steps of `item`
        if (item >= tile_count(p)) return;
        Tile tile(p, item);
        WeightPlace place(a, p, tile.row_tile, offsets + 8 * tile.first);
        u32 to = slot;
#pragma unroll 1
        for (int i = 0; i < WEIGHTS_AHEAD; ++i) {
            if (first + i * STRIDE < tile.steps) place.fetch(weights + to * WEIGHT_SLOT, first + i * STRIDE);
            copy_commit();
            to = to < WEIGHTS_AHEAD ? to + 1 : 0;
        }
    };
    int item = first_item();
    load_first(item);
#pragma unroll 1
    while (item < tile_count(p)) {
        TokenFragments acc;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
        {
            Tile tile(p, item);
            int steps = tile.steps;
            WeightPlace place(a, p, tile.row_tile, offsets + 8 * tile.first);
#pragma unroll 1
            for (int step = first; step < steps; step += STRIDE) {
                u32 before = slot ? slot - 1 : WEIGHTS_AHEAD;
                if (step + WEIGHTS_AHEAD * STRIDE < steps) place.fetch(weights + before * WEIGHT_SLOT, step + WEIGHTS_AHEAD * STRIDE);
                copy_commit();
                copy_wait<WEIGHTS_AHEAD>();
                ring.await(used + step);
                StepWeights w;
                u32 from = weights + slot * WEIGHT_SLOT;
                w.low[0] = load_shared4(from), w.high[0] = load_shared4(from + 512), w.low[1] = load_shared4(from + 1024), w.high[1] = load_shared4(from + 1536);
                slot = slot < WEIGHTS_AHEAD ? slot + 1 : 0;
                multiply_step(acc, w, ring.stage(used + step));
                ring.release(used + step);
            }
            used += steps;
        }
        item += item_step();
        load_first(item);
        if (NARROW) {
            add_groups(acc, group, ring.shared + GEMM_RING + WEIGHT_RING + ROW_GROUPS * STORE_BYTES);
            if (group) continue;
        }
        Tile tile(p, item - item_step());
        finish_tile(a, p, tile.row_tile * ROW_TILE + (NARROW ? 0 : group * 64), tile.token_tile * TOKEN_TILE, tile.split, acc,
                    ring.shared + GEMM_RING + WEIGHT_RING + group * STORE_BYTES);
    }
}

#else

__device__ __forceinline__ void multiply_tiles(const PrefillArguments& a, const TokenRing& ring, const volatile Product& p, u32 offsets, u32 used) {
    const int group = thread_index() / 128;
    auto ask = [&](int item, int ahead) {  // for the tokens of one more step
        if (const u8* from = tokens_ahead(p, item, ahead)) ring.fill(from, used + ahead);
    };
    int item = first_item();
#pragma unroll 1
    for (int i = 0; i < WEIGHTS_AHEAD; ++i) ask(item, i);
    const u32 weights = ring.shared + GEMM_RING + thread_index() / 32 * 2048 + thread_index() % 32 * 16;
    u32 slot = 0;  // of the weights of the next step
    auto fetch_first = [&] {  // weights of the first steps of `item`
        if (item >= tile_count(p)) return;
        Tile tile(p, item);
        WeightPlace place(a, p, tile.row_tile, offsets + 8 * tile.first);
        u32 to = slot;
#pragma unroll 1
        for (int i = 0; i < WEIGHTS_AHEAD; ++i) {
            if (i < tile.steps) place.fetch(weights + to * WEIGHT_SLOT, i);
            copy_commit();
            to = to < WEIGHTS_AHEAD ? to + 1 : 0;
        }
    };
    fetch_first();
#pragma unroll 1
    while (item < tile_count(p)) {
        TokenFragments acc;
#pragma unroll
        for (int j = 0; j < TOKEN_FRAGMENTS; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
        {
            Tile tile(p, item);
            int steps = tile.steps;
            WeightPlace place(a, p, tile.row_tile, offsets + 8 * tile.first);
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                copy_wait<WEIGHTS_AHEAD - 1>();  // tokens and weights
                worker_sync();
                ask(item, step + WEIGHTS_AHEAD);
                StepWeights w;
                u32 from = weights + slot * WEIGHT_SLOT;
                w.low[0] = load_shared4(from), w.high[0] = load_shared4(from + 512), w.low[1] = load_shared4(from + 1024), w.high[1] = load_shared4(from + 1536);
                u32 before = slot ? slot - 1 : WEIGHTS_AHEAD;
                slot = slot < WEIGHTS_AHEAD ? slot + 1 : 0;
                if (step + WEIGHTS_AHEAD < steps) place.fetch(weights + before * WEIGHT_SLOT, step + WEIGHTS_AHEAD);
                copy_commit();
                multiply_step(acc, w, ring.stage(used + step));
            }
            used += steps;
        }
        item += item_step();
        fetch_first();
        Tile tile(p, item - item_step());
        finish_tile(a, p, tile.row_tile * ROW_TILE + group * 64, tile.token_tile * TOKEN_TILE, tile.split, acc,
                    ring.shared + GEMM_RING + WEIGHT_RING + group * STORE_BYTES);
    }
    copy_wait<0>();
}

#endif

// Steps of all tiles of this block.
__device__ __forceinline__ u32 steps_of_block(const volatile Product& p) {
    u32 steps = 0;
    for (int item = first_item(); item < tile_count(p); item += item_step()) steps += Tile(p, item).steps;
    return steps;
}

// With `splits` > 1 the columns are dealt to that many blocks, and their sums come out apart.
__device__ __forceinline__ void gemm(const PrefillArguments& a, const TokenRing& ring, const Product& given, u8* memory) {
    const u32 offsets = ring.shared + GEMM_RING + WEIGHT_RING + ROW_GROUPS * STORE_BYTES + SUM_BYTES;
    const volatile Product& p = product_in_shared(memory);
    u32 used = *ring.used;
    for (int step = thread_index(); step < given.columns / STEP_COLUMNS; step += WORKERS)
        store_shared2(offsets + 8 * step, tile_offset(given.columns, 2 * step), tile_offset(given.columns, 2 * step + 1));
    if (thread_index() == 0) product_in_shared(memory) = given;
    fence_async_shared();  // what the phase before left in shared memory is overwritten by bulk copies
    __syncthreads();       // the asker begins
    multiply_tiles(a, ring, p, offsets, used);
    if (thread_index() == 0) *ring.used = used + steps_of_block(p);  // the barriers between phases show it to all
}

// ---- finishes: what becomes of the accumulators ----
// Fragment j of a warp: rows l / 4 and l / 4 + 8 of its 16, tokens 8 j + 2 (l % 4) and the next.

// A group's 64 rows as 16-bit numbers, in rows of `stride` numbers a token: through shared memory, so that 128 bytes of a
// token leave together.
__device__ __forceinline__ void store_rows(u16* out, int stride, int row, int token, int tokens, const TokenFragments& acc, u32 buffer) {
    int group = thread_index() / 128, thread = thread_index() % 128, warp = thread / 32, lane = thread % 32;
    u32 to = buffer + (lane / 16 * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) << 4);
    u32 from = buffer + thread / 8 * 128 + (((thread ^ thread / 8) % 8) << 4);
    int left = tokens - token - thread / 8;
    u16* at = out + (long long)(token + thread / 8) * stride + row + thread % 8 * 8;
#pragma unroll
    for (int first = 0; first < TOKEN_TILE; first += STORE_TOKENS) {
        group_barrier(1 + group, 128);  // the buffer is read
#pragma unroll
        for (int q = 0; q < STORE_TOKENS / 16; ++q) {
            int j = first / 8 + 2 * q;
            if (j < TOKEN_FRAGMENTS)
                store_matrix_transposed(to + q * 2048, pack2(acc[j][0], acc[j][1]), pack2(acc[j][2], acc[j][3]), pack2(acc[j + 1][0], acc[j + 1][1]),
                                        pack2(acc[j + 1][2], acc[j + 1][3]));
        }
        group_barrier(1 + group, 128);
#pragma unroll
        for (int i = 0; i < STORE_TOKENS; i += 16)
            if (first + i < TOKEN_TILE && first + i < left) *(uint4*)(at + (long long)(first + i) * stride) = load_shared4(from + i * 128);
    }
}

// Rows as float32, in rows of STRIDE numbers a token.
template <int STRIDE>
__device__ __forceinline__ void store_floats(float* out, int row, int token, int tokens, const TokenFragments& acc) {
    int thread = thread_index(), lane = thread % 32, left = tokens - token - 2 * (lane % 4);
    float* at = out + (long long)(token + 2 * (lane % 4)) * STRIDE + row + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < TOKEN_FRAGMENTS; ++j) {
        if (8 * j < left) at[8 * j * STRIDE] = acc[j][0], at[8 * j * STRIDE + 8] = acc[j][2];
        if (8 * j + 1 < left) at[(8 * j + 1) * STRIDE] = acc[j][1], at[(8 * j + 1) * STRIDE + 8] = acc[j][3];
    }
}

// silu(gate) * up: of each 8 rows, 4 are of gate_proj and 4 the same of up_proj. 64 rows make 32 columns of a step: the
// words of their chunks change places as input_place says.
__device__ __forceinline__ void store_activation(u16* activated, int row, int token, int tokens, const TokenFragments& acc, u32 buffer) {
    int group = thread_index() / 128, thread = thread_index() % 128, warp = thread / 32, lane = thread % 32;
    bool upper = lane >= 16;  // holds rows of up_proj, and finishes the second group of 8
    u32 to = buffer + lane * 64 + ((warp ^ lane / 2 % 4) << 4);
    int own = thread / 4, word = thread % 4;  // token, and the word of each chunk
#pragma unroll
    for (int first = 0; first < TOKEN_TILE; first += STORE_TOKENS) {
        u32 pairs[STORE_TOKENS / 8] = {};
#pragma unroll
        for (int q = 0; q < STORE_TOKENS / 8; ++q) {
            if (first / 8 + q >= TOKEN_FRAGMENTS) continue;
            const float(&f)[4] = acc[first / 8 + q];
            float x = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[0] : f[2], 16), y = __shfl_xor_sync(0xFFFFFFFFu, upper ? f[1] : f[3], 16);
            pairs[q] = pack2(quick_silu(upper ? x : f[0]) * (upper ? f[2] : x), quick_silu(upper ? y : f[1]) * (upper ? f[3] : y));
        }
        group_barrier(1 + group, 128);  // the buffer is read
        store_matrix_transposed(to, pairs[0], pairs[1], pairs[2], pairs[3]);
        if constexpr (STORE_TOKENS > 32)
            if (first + 32 < TOKEN_TILE) store_matrix_transposed(to + 32 * 64, pairs[4], pairs[5], pairs[6], pairs[7]);
        group_barrier(1 + group, 128);
#pragma unroll
        for (int i = 0; i < STORE_TOKENS; i += 32) {
            int t = first + i + own;
            if (t >= TOKEN_TILE || token + t >= tokens) continue;
            u32 from = buffer + (i + own) * 64 + 4 * word, turn = own / 2 % 4 << 4;
            *(uint4*)input_place<INTERMEDIATE>(activated, token + t, row / 2 + 2 * word) =
                make_uint4(load_shared(from + (turn ^ 0)), load_shared(from + (turn ^ 16)), load_shared(from + (turn ^ 32)), load_shared(from + (turn ^ 48)));
        }
    }
    }

__device__ __forceinline__ void finish_tile(const PrefillArguments& a, const volatile Product& p, int row, int token, int split, const TokenFragments& acc, u32 buffer) {
    static_assert(LINEAR_STRIDE % 64 == 0 && FULL_STRIDE % 64 == 0 && HIDDEN % 64 == 0 && INTERMEDIATE % 32 == 0, "a group's rows are of one kind");
    int warp_row = row + thread_index() % 128 / 32 * 16;
    if (p.finish == ACTIVATION) {
        if (row < p.rows) store_activation(p.out, row, token, p.tokens, acc, buffer);
    } else if (p.finish == LOGITS) {
        if (warp_row < p.rows) store_floats<VOCAB>((float*)p.out, row, token, p.tokens, acc);
    } else if (p.finish == PROJECTION_OF_LINEAR && row >= LINEAR_STRIDE) {
        if (warp_row < LINEAR_STRIDE + GATE_STRIDE) store_floats<GATE_STRIDE>(a.gates, row - LINEAR_STRIDE, token, p.tokens, acc);
    } else if (row < p.rows) {
        int stride = p.finish == PROJECTION_OF_LINEAR ? LINEAR_STRIDE : p.rows;
        store_rows(p.out + (long long)split * p.tokens * stride, stride, row, token, p.tokens, acc, buffer);
    }
}
