// Weights times the rows of the batch: y[row of weights, row of the batch], the weights streamed once a pass.
//
// 16 rows of the batch are the rows of a tensor-core product, a group of 8 rows of weights its columns. Each of the 8 slices
// of the matrix's columns is multiplied on its own, in the order of the tape, by a warp for each or by warps that take
// several; the eight sums are added in one order (sum_of_slices). It is the same for every number of rows, so that no
// sequence's bits depend on its company.
#pragma once

#include "batch/model.cuh"

constexpr int MOST_OPERANDS = 32;  // tiles of the input that a warp keeps in registers

// The sum of the slices, in the one order in which all forms of a product add them: pairs, their pairs, and those two.
template <class Slice>
__device__ __forceinline__ float sum_of_slices(Slice slice) {
    float pairs[CONSUMER_WARPS / 2];
#pragma unroll
    for (int i = 0; i < CONSUMER_WARPS / 2; ++i) pairs[i] = slice(2 * i) + slice(2 * i + 1);
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

// 16 rows of the batch (or 8 and nothing) as the 16 rows of tensor-core products with a tile of 32 columns of weights, the
// two halves of its columns apart (see operand_place). What is loaded stands in registers as the instruction wants it.
using SixteenColumns = u32[2][4];
// A pass of eight rows takes the first or the second (`high`) of the 16, and nothing.
__device__ __forceinline__ void load_columns(SixteenColumns& x, const u8* tile, bool high = false) {
    if constexpr (EIGHT_ROWS) {
        uint4 v = load_l2(tile);
        x[0][0] = v.x, x[0][2] = v.y, x[1][0] = v.z, x[1][2] = v.w;
        x[0][1] = x[0][3] = x[1][1] = x[1][3] = 0;
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 v = load_l2(tile + half * (OPERAND_TILE / 2));
            x[half][0] = high ? v.y : v.x, x[half][1] = COLUMN_GROUPS > 1 ? v.y : 0;
            x[half][2] = high ? v.w : v.z, x[half][3] = COLUMN_GROUPS > 1 ? v.w : 0;
        }
    }
}
constexpr int SIXTEENS = (COLUMN_GROUPS + 1) / 2;  // of columns, in a pass

// This warp's slice of the input, for the rows of one pass: `tiles` tiles of 32 columns, MOST at most.
template <int MOST>
struct Operand {
    static constexpr bool IN_REGISTERS = MOST * 2 * SIXTEENS <= MOST_OPERANDS;
    static constexpr int HELD = IN_REGISTERS ? MOST : TILES_PER_STAGE;
    const u8* source;
    long long group_bytes;  // from 16 rows of the batch to the next
    bool high;              // a pass of 8 rows of the batch: the second of the 16
    SixteenColumns words[HELD][SIXTEENS];

    __device__ __forceinline__ Operand(const Consumer& c, const u8* input, int pass, int tiles)
        : source(input + ((long long)(pass * COLUMN_GROUPS / 2) * CONSUMER_WARPS + c.warp) * tiles * OPERAND_TILE + c.lane * 16),
          group_bytes(CONSUMER_WARPS * tiles * OPERAND_TILE), high(COLUMN_GROUPS == 1 && pass % 2) {
        if (IN_REGISTERS) load(0, tiles);
    }
    __device__ __forceinline__ void load(int first, int count) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int g = 0; g < SIXTEENS; ++g)
                if (COLUMN_GROUPS > 1 || i < count)  // many: a branch costs registers, so the last tile is loaded again
                    load_columns(words[i][g], source + g * group_bytes + (first + min(i, count - 1)) * OPERAND_TILE, PASSES > 1 && high);
    }
};

// Whether a block's part of a matrix stays in the ring for all passes, or streams once a pass. `stages` of the part.
__device__ __forceinline__ bool is_resident(int stages) { return PASSES > 1 && stages <= RING_STAGES; }
__device__ __forceinline__ int stages_of(int groups, int tiles) { return groups * ((tiles + TILES_PER_STAGE - 1) / TILES_PER_STAGE); }

// Where the consumers begin with a matrix, and whether they give its stages back.
struct Residence {
    RingPosition start;
    bool resident, last;

    __device__ __forceinline__ Residence(const Consumer& c, int stages) : start(c.next), resident(is_resident(stages)), last(true) {}
    __device__ __forceinline__ void begin(Consumer& c, int pass) {
        if (PASSES == 1) return;
        if (resident) c.next = start;
        last = !resident || pass == PASSES - 1;
    }
    __device__ __forceinline__ void release(Consumer& c) const {
        if (last) release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
    }
};

// A stage of each of up to N row groups, `count` tiles of this warp, times tiles `first` and up of the operand. The groups'
// products take turns: one waits for the one before it of the same group, and for no other.
template <int N, int MOST>
__device__ __forceinline__ void multiply_stages(Consumer& c, float (&acc)[N][SIXTEENS][4], const Operand<MOST>& x, int first, int count, int groups, const Residence& residence) {
    const uint4* source[N];
#pragma unroll
    for (int g = 0; g < N; ++g) {
        source[g] = source[0];  // what is not there is multiplied for nothing
        if (g && g >= groups) continue;
        if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
        source[g] = (const uint4*)(c.ring.slots + c.next.slot * STAGE_BYTES) + c.warp * count * 32 + c.lane;
        c.next.advance();
    }
#pragma unroll
    for (int i = 0; i < TILES_PER_STAGE; ++i) {
        if (i >= count) break;
        uint4 w[N];
#pragma unroll
        for (int g = 0; g < N; ++g) w[g] = source[g][i * 32];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int g = 0; g < N; ++g)
#pragma unroll
                for (int k = 0; k < SIXTEENS; ++k) {
                    const SixteenColumns& columns = x.words[Operand<MOST>::IN_REGISTERS ? min(first + i, MOST - 1) : i][k];
                    multiply16(acc[g][k], columns[half], half ? w[g].z : w[g].x, half ? w[g].w : w[g].y);
                }
    }
    residence.release(c);
}

// Who finishes which results of a pair of row groups, `unit` of UNITS being pairs that are finished together. A thread has
// ELEMENTS results: ROWS rows of each of COLUMNS columns of the pass, the rows first.
//
// Deep: all 8 warps have sums of all results, which meet in shared memory; 16 threads take the rows of one column.
// Wide: results are in the registers of the warps that made them, in the order of the fragments of mma.sync.
template <int UNITS_AT_ONCE>
struct DeepPlace {
    static constexpr int THREADS_A_PAIR = 16 * PASS_COLUMNS < 256 ? 16 * PASS_COLUMNS : 256;
    static constexpr int UNITS = UNITS_AT_ONCE;
    static constexpr int PAIRS_AT_ONCE = UNITS * 256 / THREADS_A_PAIR;  // behind one barrier
    static constexpr int ROWS = 1, COLUMNS = 16 * PASS_COLUMNS / THREADS_A_PAIR, ELEMENTS = ROWS * COLUMNS;
    static constexpr int CANDIDATES = 256 / THREADS_A_PAIR;  // that a block has for a row of the batch, of different pairs
    __device__ __forceinline__ static int pair(const Consumer& c, int unit) { return unit * (256 / THREADS_A_PAIR) + c.thread / THREADS_A_PAIR; }
    __device__ __forceinline__ static int row(const Consumer& c, int = 0) { return c.thread % 16; }
    __device__ __forceinline__ static int column(const Consumer& c, int i) { return c.thread % THREADS_A_PAIR / 16 + 16 * i; }
    __device__ __forceinline__ static int candidate(const Consumer& c) { return c.thread / THREADS_A_PAIR; }
    static constexpr int UP = 4;                               // lanes from a row of gate_proj to the same of up_proj
    static constexpr int FIRST_ROW_BIT = 1, LAST_ROW_BIT = 8;  // of the lane
    static_assert(CONSUMER_WARPS * 32 == 256, "256 threads");
};
// A warp has half of the pass's columns (a multiple of 16), both row groups, and a quarter of the matrix's columns. Of the
// four warps that exchange their parts of a sum, each finishes half of the columns of a row group.
struct WidePlace {
    static constexpr int PARTS = 4, COLUMN_WARPS = CONSUMER_WARPS / PARTS, SLICES = CONSUMER_WARPS / PARTS, SIXTEENS_A_WARP = (SIXTEENS + 1) / COLUMN_WARPS;
    static constexpr int UNITS = 1, PAIRS_AT_ONCE = 1, ROWS = 2, COLUMNS = SIXTEENS_A_WARP, ELEMENTS = ROWS * COLUMNS, CANDIDATES = 2;
    static constexpr int EXCHANGED = 8 * SIXTEENS_A_WARP;  // sums a lane
    __device__ __forceinline__ static int part(const Consumer& c) { return c.warp / COLUMN_WARPS; }
    __device__ __forceinline__ static int column_warp(const Consumer& c) { return c.warp % COLUMN_WARPS; }
    __device__ __forceinline__ static int pair(const Consumer&, int) { return 0; }
    __device__ __forceinline__ static int group(const Consumer& c) { return part(c) / 2; }
    __device__ __forceinline__ static int row(const Consumer& c, int i) { return 8 * group(c) + c.lane % 4 * 2 + i % 2; }
    __device__ __forceinline__ static int column(const Consumer& c, int j) { return 16 * SIXTEENS_A_WARP * column_warp(c) + c.lane / 4 + part(c) % 2 * 8 * SIXTEENS_A_WARP + 8 * j; }
    __device__ __forceinline__ static int candidate(const Consumer& c) { return group(c); }
    // Element i of sixteen columns k of row group g: whether this warp finishes it, and its place among those exchanged.
    __device__ __forceinline__ static bool is_own(const Consumer& c, int g, int k, int i) { return g == group(c) && (2 * k + i / 2) / SIXTEENS_A_WARP == part(c) % 2; }
    __device__ __forceinline__ static constexpr int exchanged(int g, int k, int i) { return (g * SIXTEENS_A_WARP + k) * 4 + i; }
    __device__ __forceinline__ static int own_exchanged(const Consumer& c, int i) { return (group(c) * 2 + part(c) % 2) * 2 * SIXTEENS_A_WARP + i; }
    static constexpr int UP = 2;
    static constexpr int FIRST_ROW_BIT = 1, LAST_ROW_BIT = 2;
};
// Of the products whose input is the residual stream: the wide form where there are columns enough.
constexpr bool IS_WIDE = COLUMN_GROUPS >= 4;
template <bool WIDE>
struct PlaceOf {
    using type = DeepPlace<COLUMN_GROUPS <= 2 ? 2 : 1>;
};
template <>
struct PlaceOf<true> {
    using type = WidePlace;
};
using NormedPlace = PlaceOf<IS_WIDE>::type;
using ResidualPlace = DeepPlace<1>;  // of those that lead back to the residual stream: few rows

// Partial sums: of the deep form, [buffer][warp][pair][row][column]; of the wide form, what two warps exchange.
constexpr int PAIR_SUMS = 16 * SUM_STRIDE;
constexpr int MOST_PAIRS_AT_ONCE = PlaceOf<false>::type::PAIRS_AT_ONCE;
using Sums = float[CONSUMER_WARPS][MOST_PAIRS_AT_ONCE * PAIR_SUMS];

// The conv windows of the rows that a batch of pairs (those behind one barrier) makes come through the ring, as a stage
// behind the batch's weights: [row of the sequences' batch][channel] of four floats.
constexpr bool WINDOWS_IN_RING = PASSES == 1 && LIMITS_FLIGHT;
constexpr int WINDOW_GROUPS = 2 * NormedPlace::PAIRS_AT_ONCE, WINDOW_BYTES = WINDOW_GROUPS * 8 * 16;  // of a sequence
static_assert(!WINDOWS_IN_RING || BATCH_COLUMNS * WINDOW_BYTES <= STAGE_BYTES, "one stage");

// For each pass and pair of row groups (or some pairs at once): finish.prepare(unit, pass, first row, rows) ahead of the
// weights, then finish(unit, pass, first row, rows, sum), where sum(i) is this thread's i-th result, see Place.
template <class Place, int ROWS, int MOST_WIDTH, class Finish>
__device__ __forceinline__ void gemm(Consumer& c, Sums* sums, const u8* input, int width, Finish& finish) {
    constexpr int MOST = MOST_WIDTH / CONSUMER_WARPS / 32, GROUPS = (ROWS + 7) / 8;
    // Row groups that a warp multiplies at a time: two, or four where each is one stage and the ring is not filled by them.
    constexpr int AT_ONCE = MOST <= TILES_PER_STAGE && Place::PAIRS_AT_ONCE % 2 == 0 && RING_STAGES >= 8 ? 4 : 2;
    int tiles = width / CONSUMER_WARPS / 32;
    c.locate();
    int begin = first_group(GROUPS, c.block), end = first_group(GROUPS, c.block + 1);
    Residence residence(c, stages_of(end - begin, tiles));
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        residence.begin(c, pass);
        Operand<MOST> x(c, input, pass, tiles);
        finish.begin(pass);
#pragma unroll 1
        for (int batch = begin; batch < end; batch += 2 * Place::PAIRS_AT_ONCE) {
            // Row groups of this thread's pair.
            auto first_of = [&](int unit) { return batch + 2 * Place::pair(c, unit); };
            auto rows_of = [&](int unit) { return 8 * max(0, min(2, end - first_of(unit))); };
#pragma unroll
            for (int unit = 0; unit < Place::UNITS; ++unit) finish.prepare(unit, pass, 8 * first_of(unit), rows_of(unit));
            float* own = sums[c.buffer][c.warp] + c.lane % 4 * 2 * SUM_STRIDE + c.lane / 4;
#pragma unroll 1
            for (int pair = batch; pair < min(end, batch + 2 * Place::PAIRS_AT_ONCE); pair += AT_ONCE, own += AT_ONCE / 2 * PAIR_SUMS) {
                int groups = min(AT_ONCE, end - pair);
                float acc[AT_ONCE][SIXTEENS][4] = {};
                if constexpr (Operand<MOST>::IN_REGISTERS) {
#pragma unroll
                    for (int at = 0; at < MOST; at += TILES_PER_STAGE)
                        if (at < tiles) multiply_stages(c, acc, x, at, min(TILES_PER_STAGE, tiles - at), groups, residence);
                } else {
#pragma unroll 1
                    for (int at = 0; at < tiles; at += TILES_PER_STAGE) {
                        int count = min(TILES_PER_STAGE, tiles - at);
                        x.load(at, count);
                        multiply_stages(c, acc, x, 0, count, groups, residence);
                    }
                }
#pragma unroll
                for (int g = 0; g < AT_ONCE; ++g)
#pragma unroll
                    for (int k = 0; k < SIXTEENS; ++k)
#pragma unroll
                        for (int i = 0; i < (COLUMN_GROUPS > 1 ? 4 : 2); ++i) own[g / 2 * PAIR_SUMS + (8 * (g % 2) + i % 2) * SUM_STRIDE + 16 * k + i / 2 * 8] = acc[g][k][i];
            }
            consumer_barrier();
            bool windows = finish.take_windows(c, 8 * batch);
            if (pass == PASSES - 1 && batch + 2 * Place::PAIRS_AT_ONCE >= end) finish.hush_producer();
#pragma unroll
            for (int unit = 0; unit < Place::UNITS; ++unit) {
                const float* row = sums[c.buffer][0] + Place::pair(c, unit) * PAIR_SUMS + Place::row(c) * SUM_STRIDE;
                if (first_of(unit) < end)  // whole warps
                    finish(unit, pass, 8 * first_of(unit), rows_of(unit), [&](int i) {
                        return sum_of_slices([&](int slice) { return row[slice * MOST_PAIRS_AT_ONCE * PAIR_SUMS + Place::column(c, i)]; });
                    });
            }
            if (windows) release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
            c.buffer ^= 1;
        }
        finish.end(pass);
    }
}

using Exchange = float[WidePlace::PARTS][WidePlace::EXCHANGED][32];  // between the warps with the same columns
constexpr int EXCHANGE_BYTES = 2 * WidePlace::COLUMN_WARPS * sizeof(Exchange);

// As gemm, for many columns: a warp has a part of the matrix's columns, and few warps exchange what they have of each
// other's results. No barrier of all warps, and less traffic through shared memory.
template <int ROWS, int WIDTH, class Finish>
__device__ __forceinline__ void gemm_wide(Consumer& c, Sums* sums, const u8* input, Finish& finish) {
    using Place = WidePlace;
    constexpr int TILES = WIDTH / CONSUMER_WARPS / 32, FULL_STAGES = TILES / TILES_PER_STAGE, REST = TILES % TILES_PER_STAGE, GROUPS = (ROWS + 7) / 8;
    constexpr int K = Place::SIXTEENS_A_WARP;
    constexpr bool IN_REGISTERS = Place::SLICES * TILES * 2 * K <= MOST_OPERANDS;
    constexpr int HELD = IN_REGISTERS ? TILES : 1;
    c.locate();
    int begin = first_group(GROUPS, c.block), end = first_group(GROUPS, c.block + 1), part = Place::part(c);
    Residence residence(c, stages_of(end - begin, TILES));
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        residence.begin(c, pass);
        const u8* source = input + ((long long)(pass * COLUMN_GROUPS / 2 + Place::column_warp(c) * K) * (WIDTH / 32) + part * Place::SLICES * TILES) * OPERAND_TILE + c.lane * 16;
        SixteenColumns x[HELD][Place::SLICES][K];
        auto load = [&](int held, int tile) {
#pragma unroll
            for (int slice = 0; slice < Place::SLICES; ++slice)
#pragma unroll
                for (int k = 0; k < K; ++k) load_columns(x[held][slice][k], source + (k * (WIDTH / 32) + slice * TILES + tile) * OPERAND_TILE);
        };
        if (IN_REGISTERS)
#pragma unroll
            for (int i = 0; i < HELD; ++i) load(i, i);
        finish.begin(pass);
        consumer_barrier();  // what begin left for all warps is there
#pragma unroll 1
        for (int group = begin; group < end; group += 2) {
            int rows = min(2, end - group) * 8;
            finish.prepare(0, pass, 8 * group, rows);
            float acc[Place::SLICES][2][K][4] = {};
            auto multiply = [&](int first, int count) {
                auto next_stage = [&]() {
                    if (c.next.stage == c.landed) c.landed = await_landed(c.ring, c.next.stage, c.watchdog);
                    u32 at = c.next.slot * (STAGE_BYTES / 16) + part * Place::SLICES * count * 32 + c.lane;
                    c.next.advance();
                    return at;
                };
                u32 at[2] = {next_stage(), 0};
                at[1] = at[0];  // a single group twice: nobody looks at the other's results
                if (rows == 16) at[1] = next_stage();
                const uint4* weights = (const uint4*)c.ring.slots;
#pragma unroll
                for (int i = 0; i < TILES_PER_STAGE; ++i) {
                    if (i >= count) break;
                    if (!IN_REGISTERS) load(0, first + i);
#pragma unroll
                    for (int slice = 0; slice < Place::SLICES; ++slice)
#pragma unroll
                        for (int g = 0; g < 2; ++g) {
                            uint4 w = weights[at[g] + (slice * count + i) * 32];
#pragma unroll
                            for (int k = 0; k < K; ++k) {
                                const SixteenColumns& columns = x[IN_REGISTERS ? first + i : 0][slice][k];
                                multiply16(acc[slice][g][k], columns[0], w.x, w.y);
                                multiply16(acc[slice][g][k], columns[1], w.z, w.w);
                            }
                        }
                }
                residence.release(c);
            };
            if constexpr (IN_REGISTERS) {
#pragma unroll
                for (int s = 0; s < FULL_STAGES; ++s) multiply(s * TILES_PER_STAGE, TILES_PER_STAGE);
            } else {
#pragma unroll 1
                for (int s = 0; s < FULL_STAGES; ++s) multiply(s * TILES_PER_STAGE, TILES_PER_STAGE);
            }
            if constexpr (REST) multiply(FULL_STAGES * TILES_PER_STAGE, REST);
            Exchange* exchange = (Exchange*)sums + (c.buffer * Place::COLUMN_WARPS + Place::column_warp(c));
            float own[Place::ELEMENTS];
#pragma unroll
            for (int g = 0; g < 2; ++g)
#pragma unroll
                for (int k = 0; k < K; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float sum = acc[0][g][k][i] + acc[1][g][k][i];
                        if (Place::is_own(c, g, k, i))
                            own[(4 * k + i) % Place::ELEMENTS] = sum;
                        else
                            (*exchange)[part][Place::exchanged(g, k, i)][c.lane] = sum;
                    }
            group_barrier(2 + Place::column_warp(c), 32 * Place::PARTS);
            bool windows = finish.take_windows(c, 8 * group);
            if (pass == PASSES - 1 && group + 2 >= end) finish.hush_producer();
            if (Place::group(c) == 0 || rows == 16)
                finish(0, pass, 8 * group, rows, [&](int i) {
                    auto of = [&](int p) { return p == part ? own[i] : (*exchange)[p][Place::own_exchanged(c, i)][c.lane]; };
                    return (of(0) + of(1)) + (of(2) + of(3));
                });
            if (windows) release_stage(c.ring, c.next.stage - 1, c.warp, c.lane);
            c.buffer ^= 1;
        }
        finish.end(pass);
    }
}

// A product whose input is the residual stream.
template <int ROWS, class Finish>
__device__ __forceinline__ void gemm_normed(Consumer& c, Sums* sums, const u8* input, Finish& finish) {
    if constexpr (IS_WIDE)
        gemm_wide<ROWS, HIDDEN>(c, sums, input, finish);
    else
        gemm<NormedPlace, ROWS, HIDDEN>(c, sums, input, HIDDEN, finish);
}

// The results of this thread: work(i, row of the pair, column of the pass).
template <class Place, class Do>
__device__ __forceinline__ void each_element(const Consumer& c, Do work) {
#pragma unroll
    for (int i = 0; i < Place::ELEMENTS; ++i) work(i, Place::row(c, i), Place::column(c, i / Place::ROWS));
}
