// The batch kernel: a step of many sequences at once, many steps in one cooperative launch.
//
// One block an SM. As in the decode kernel, a producer warp streams the block's share of the weights through shared
// memory, in the order in which they are used and across all waits; the other warps compute. Here the phases of a step
// are separated by barriers over all blocks, and every product is one of matrices: its columns are the rows of the batch,
// each a sequence with a state, a position, a sampler of its own. Read `step_layer` for the model.
#include "batch/model.cuh"
#include "batch/gemm.cuh"
#include "batch/finish.cuh"
#include "batch/gemm_split.cuh"
#include "batch/delta_rule.cuh"
#include "batch/attention.cuh"
#include "batch/sampling.cuh"

constexpr int THREADS = (CONSUMER_WARPS + PRODUCER_WARPS) * 32;
constexpr int SUMS_BYTES = IS_WIDE && SPLITS_PRODUCTS ? EXCHANGE_BYTES : 2 * (int)sizeof(Sums);
constexpr int HEAD_CANDIDATES = NormedPlace::CANDIDATES * BLOCKS;  // of a row, from the LM head; then BLOCKS from the draw
static_assert(BATCH_COLUMNS <= CONSUMER_WARPS * 32, "a thread a row");

struct Shared {
    alignas(128) u8 slots[RING_STAGES * STAGE_BYTES];
    u64 arrivals[RING_STAGES];
    u32 released[CONSUMER_WARPS];
    u32 landed, total;
    union {
        u8 sums[SUMS_BYTES];
        alignas(16) WarpAttention attention[CONSUMER_WARPS];
        BatchSampling sampling;
        LogprobScratch logprobs;
    };
    Rows rows;
    Cut cuts[BATCH_COLUMNS];
    Candidate best[BATCH_COLUMNS];
    float residual[RESIDUAL_ROWS][BATCH_COLUMNS];
    float4 taps[LINEAR_ROWS];
    float inverse[BATCH_COLUMNS], squares[RESIDUAL_PAIRS][BATCH_COLUMNS];
    float head_squares[4][CONSUMER_WARPS];
    int first_item[BATCH_COLUMNS + 1];  // of attention, of each row in this step; then how many there are
    volatile u32 finished, quiet;
    volatile int counted;  // in how many steps the items of attention
    u32 pending, passed;
};
static_assert(sizeof(Shared) <= SHARED_MEMORY, "BatchLayout.plan counts less shared memory than the kernel uses");

// The host reads these before the first launch.
extern "C" __device__ int shared_bytes = sizeof(Shared);
extern "C" __device__ int threads = THREADS;

// ---- producer ----

// The ring stands still whenever the consumers do: they know better where, and report first.
__device__ __forceinline__ Watchdog ring_watchdog(const BatchArguments& a) {
    return {a.report, a.spin_limit + a.spin_limit / 4, 0, 0, PHASE_RING_EMPTY, 0};
}

struct Producer {
    Ring ring;
    const u8* source;   // of block `block`: lane i has that of the i-th of the blocks that share rows
    int block;
    RingPosition next;  // the stage to fill
    Shared* shared;
    Watchdog watchdog;
    bool finished;
    const BatchArguments* windows;  // with in_proj's weights, of layer `layer` in a step of that parity; or null
    int layer, parity;

    __device__ __forceinline__ void matrix(int rows, int columns, u32 in_flight) {
        int groups = (rows + 7) / 8;
        if (SPLITS_PRODUCTS && rows == HIDDEN)
            shared_matrix(columns, in_flight);
        else
            own_matrix((const u8*)__shfl_sync(0xFFFFFFFFu, (u64)source, blockIdx.x % SHARING), groups, columns, in_flight);
        source += (long long)(first_group(groups, block + 1) - first_group(groups, block)) * columns * 16;
    }

    // Streams this block's rows of one matrix, once or once a pass, in pairs of groups: stage by stage, those of the two in turn.
    __device__ __forceinline__ void own_matrix(const u8* own_source, int groups, int columns, u32 in_flight) {
        int tiles = columns / CONSUMER_WARPS / 32;
        int own = first_group(groups, blockIdx.x + 1) - first_group(groups, blockIdx.x);
        int passes = is_resident(stages_of(own, tiles)) ? 1 : PASSES;
#pragma unroll 1
        for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
            for (int group = 0; group < own; group += 2)
#pragma unroll 1
                for (int at = 0; at < tiles; at += TILES_PER_STAGE) {
                    u32 bytes = min(TILES_PER_STAGE, tiles - at) * CONSUMER_WARPS * 512;
                    const u8* from = own_source + (long long)group * columns * 16 + at * CONSUMER_WARPS * 512;
                    stage(from, in_flight, bytes, 1);
                    if (group + 1 < own) stage(from + columns * 16, in_flight, bytes, 1);
                    if (finished) return;
                    if (WINDOWS_IN_RING && windows && at + TILES_PER_STAGE >= tiles && (group + 2 >= own || (group + 2) % WINDOW_GROUPS == 0))
                        window_stage(group / WINDOW_GROUPS * WINDOW_GROUPS, own, groups, in_flight);
                }
    }

    // The conv windows of the channels of row groups `first` and up of this block's `own` of `groups`.
    __device__ __forceinline__ void window_stage(int first, int own, int groups, u32 in_flight) {
        const Rows& rows = shared->rows;
        int begin = 8 * (first_group(groups, blockIdx.x) + first), end = min(begin + 8 * min(WINDOW_GROUPS, own - first), CONV_DIM), lane = threadIdx.x % 32;
        if (begin >= end) return;
        await_slot(in_flight);
        if (finished) return;
        u32 bytes = (end - begin) * 16, count = 0;
#pragma unroll 1
        for (int n = lane; n - lane < windows->rows; n += 32) count += __popc(__ballot_sync(0xFFFFFFFFu, n < windows->rows && rows.streamed[parity][n]));
        expect_pieces(ring, next, bytes * count);
#pragma unroll 1
        for (int n = lane; n < windows->rows; n += 32)
            if (rows.streamed[parity][n]) fill_piece(ring, next, n * WINDOW_BYTES, (const u8*)(conv_window(rows.state[n], layer) + 4 * begin), bytes);
        finish_pieces(ring, next);
        next.advance();
    }

    // Streams this block's slices of the rows of the blocks that share, four groups at a time.
    __device__ __forceinline__ void shared_matrix(int columns, u32 in_flight) {
        int tiles = columns / CONSUMER_WARPS / 32, lane = threadIdx.x % 32, slice = blockIdx.x % SHARING * SHARING_WARPS;
        SharedRows shared_rows(blockIdx.x);
        int passes = is_resident(stages_of(shared_rows.quads(), tiles)) ? 1 : PASSES;
#pragma unroll 1
        for (int pass = 0; pass < passes; ++pass)
#pragma unroll 1
            for (int group = shared_rows.first; group < shared_rows.end; group += 4) {
                int own = min(group + lane % 4, shared_rows.end - 1), holder = blockIdx.x / SHARING * SHARING;
                while (first_group(HIDDEN / 8, holder + 1) <= own) ++holder;
                __syncwarp();
                const u8* from = (const u8*)__shfl_sync(0xFFFFFFFFu, (u64)source, holder % SHARING) + (long long)(own - first_group(HIDDEN / 8, holder)) * columns * 16;
#pragma unroll 1
                for (int at = 0; at < tiles; at += TILES_PER_STAGE) {
                    int count = min(TILES_PER_STAGE, tiles - at);
                    stage(from + (at * CONSUMER_WARPS + slice * count) * 512, in_flight, SHARING_WARPS * count * 512, min(4, shared_rows.end - group));
                    if (finished) return;
                }
            }
    }

    // Streams the states of this block's items in one layer.
    __device__ __forceinline__ void states(const BatchArguments& a, int layer, int parity) {
        const Rows& rows = shared->rows;
        int item = blockIdx.x;
#pragma unroll 1
        while ((item = next_item(a, rows, parity, item)) < a.rows * VALUE_HEADS) {
            const u8* from = (const u8*)head_state(rows, layer, item);
#pragma unroll 1
            for (int s = 0; s < STATE_STAGES; ++s, from += STAGE_BYTES) {
                state_stage(from, STAGE_BYTES);
                if (finished) return;
            }
            item += BLOCKS;
        }
    }

    // Streams the keys and values of this block's items in one layer of step `step`.
    __device__ __forceinline__ void cache(const BatchArguments& a, int layer, int step) {
        const Rows& rows = shared->rows;
        while (!finished && shared->counted <= step) pause();
        if (finished) return;
        fence_async();
        int items = shared->first_item[a.rows], i = item_begin(items, blockIdx.x), end_item = item_begin(items, blockIdx.x + 1);
        if (i == end_item) return;
        AttentionItem item(a, rows, shared->first_item, i);
#pragma unroll 1
        for (; i < end_item; ++i, item.advance()) {
            const u16* keys = item.keys(layer);
            long long distance = item.distance();
            int end = item.end();
#pragma unroll 1
            for (int first = item.begin(); first < end; first += CHUNK_POSITIONS) {
                u32 bytes = min(CHUNK_POSITIONS, end - first) * POSITION_BYTES;
                state_stage((const u8*)(keys + (long long)first * HEAD_DIM), bytes);
                state_stage((const u8*)(keys + distance + (long long)first * HEAD_DIM), bytes);
                if (finished) return;
            }
        }
    }

    __device__ __forceinline__ void state_stage(const u8* from, u32 bytes) {
        await_slot(STATE_STAGES_IN_FLIGHT);
        if (finished) return;
        fill_state_stage(ring, next, from, bytes);
        next.advance();
    }

    __device__ __forceinline__ void stage(const u8* from, u32 in_flight, u32 bytes, int pieces) {
        await_slot(in_flight);
        if (finished) return;
        if (SPLITS_PRODUCTS)
            fill_pieces(ring, next, from, bytes, pieces);
        else
            fill_stage(ring, next, from, bytes);
        next.advance();
    }

    __device__ __forceinline__ void await_slot(u32 in_flight) {
        while (!finished && (!slot_is_free(ring, next) || (LIMITS_FLIGHT && next.stage - *ring.landed >= in_flight) || (HUSHES && __any_sync(0xFFFFFFFFu, shared->quiet)))) pause();
        watchdog.spins = 0;
    }
    __device__ __forceinline__ void pause() {
        finished = __any_sync(0xFFFFFFFFu, shared->finished);
        watchdog.check();
    }
};

__device__ __forceinline__ void produce(const BatchArguments& a, Shared& shared, Ring ring) {
    int block = min((int)blockIdx.x / SHARING * SHARING + (int)threadIdx.x % SHARING, BLOCKS - 1);
    Producer p{ring, nullptr, block, {0, 0, 0}, &shared, ring_watchdog(a), false, nullptr, 0, 0};
#pragma unroll 1
    for (int step = 0; step < a.steps && !p.finished; ++step) {
        p.source = a.tape + a.tape_offsets[block];
#pragma unroll 1
        for (int i = 0; i <= 4 * LAYERS && !p.finished; ++i) {
            int layer = i / 4, which = layer == LAYERS ? 4 : i % 4;
            bool full = is_full(layer % LAYERS);
            int rows = which == 0 ? (full ? PROJECTED_FULL : PROJECTED_LINEAR) : which == 2 ? 2 * INTERMEDIATE : which == 4 ? VOCAB : HIDDEN;
            int columns = which == 1 ? (full ? QUERY_DIM : VALUE_DIM) : which == 3 ? INTERMEDIATE : HIDDEN;
            p.windows = which == 0 && !full ? &a : nullptr, p.layer = layer % LAYERS, p.parity = step % 2;
            p.matrix(rows, columns, which == 4 ? HEAD_STAGES_IN_FLIGHT : LAYER_STAGES_IN_FLIGHT);
            if (which == 0 && full) p.cache(a, layer, step);
            if (which == 0 && !full) p.states(a, layer, step % 2);
        }
    }
    finish_filling(ring, p.next);
    *ring.total = p.next.stage + 1;
}

// ---- consumers ----

// Sixteen bytes (8 columns) of a row of the embedding. A tied embedding is read from the LM head's place on the tape.
__device__ __forceinline__ uint4 embedding(const BatchArguments& a, int token, int column) {
    if (!TIED) return __ldg((const uint4*)(a.embedding + (long long)token * HIDDEN + column));
    constexpr int GROUPS = (VOCAB + 7) / 8, TILES = HIDDEN / CONSUMER_WARPS / 32;
    int group = token / 8;
    int block = (int)(((long long)(group + 1) * BLOCKS - 1) / GROUPS);
    int warp = column / (HIDDEN / CONSUMER_WARPS), inside = column % (HIDDEN / CONSUMER_WARPS);
    int tile = inside / 32, stage = tile / TILES_PER_STAGE, count = min(TILES_PER_STAGE, TILES - stage * TILES_PER_STAGE);
    long long at = a.tape_offsets[block] + a.head_offsets[block] + (long long)(group - first_group(GROUPS, block)) * 16 * HIDDEN +
                   stage * STAGE_BYTES + ((warp * count + tile % TILES_PER_STAGE) * 32 + token % 8 * 4 + inside % 32 / 8) * 16;
    return __ldg((const uint4*)(a.tape + at));
}

// This block's part of the residual stream of every row's token, and of the first layer's input.
__device__ __forceinline__ void embed(const Consumer& c, const BatchArguments& a, Shared& shared) {
    int first = first_group(HIDDEN / 8, c.block), end = first_group(HIDDEN / 8, c.block + 1), n = c.thread;
    const float* scale = layer_parameters(a.parameters, 0);
    if (n >= a.rows || !shared.rows.kind[n]) return;
    float squares = 0;
#pragma unroll 1
    for (int group = first; group < end; ++group) {
        float x[8];
        unpack8(x, embedding(a, shared.rows.token[n], 8 * group));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            shared.residual[8 * (group - first) + j][n] = x[j];
            squares = fmaf(x[j], x[j], squares);
            x[j] *= load_constant(scale + 8 * group + j);
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) *(u32*)operand_place<HIDDEN>(a.input, n, 8 * group + j) = pack2(x[j], x[j + 1]);
    }
    a.squares[n * SQUARES_STRIDE + c.block] = squares;
}

constexpr int MOST_WIDTH = INTERMEDIATE > MIXED_COLUMNS ? INTERMEDIATE : MIXED_COLUMNS;

// A product back to the residual stream.
__device__ __forceinline__ void project_back(Consumer& c, const BatchArguments& a, Shared& shared, const u8* input, int width, ResidualUpdate& update, u32& product) {
    if constexpr (SPLITS_PRODUCTS)
        gemm_split<MOST_WIDTH>(c, a, ++product, input, width, update);
    else
        gemm<ResidualPlace, HIDDEN, MOST_WIDTH>(c, (Sums*)shared.sums, input, width, update);
}

__device__ __forceinline__ void step_layer(Consumer& c, const BatchArguments& a, Shared& shared, GridBarrier& barrier, u32& product, int layer, int parity) {
    Finish base{&c, &a, &shared.rows, shared.inverse, &shared.quiet};
    bool full = is_full(layer);
    c.enter(PHASE_INPUT, layer);
    if (full) {
        FullProjection finish{{base}};
        gemm_normed<PROJECTED_FULL>(c, (Sums*)shared.sums, a.input, finish);
        barrier.meet(c);
        c.enter(PHASE_ATTENTION, layer);
        attend_rows(c, a, shared.rows, shared.first_item, shared.attention, layer);
        hush(&shared.quiet);
        barrier.meet(c);
        c.enter(PHASE_MERGE, layer);
        merge_rows(c, a, shared.rows);
        barrier.arrive(c);
    } else {
        LinearProjection finish{{base}, layer, shared.taps};
        gemm_normed<PROJECTED_LINEAR>(c, (Sums*)shared.sums, a.input, finish);
        barrier.meet(c);
        c.enter(PHASE_DELTA_RULE, layer);
        delta_rules(c, a, shared.rows, barrier, layer, parity, shared.head_squares);
    }
    // The mixer's projection, then the MLP's two: one piece of code for what is alike.
    const float* norm = layer_parameters(a.parameters, layer) + HIDDEN;
    const u8* input = a.mixed;
    int width = full ? QUERY_DIM : VALUE_DIM;
#pragma unroll 1
    while (true) {
        barrier.wait(c);
        c.enter(PHASE_INPUT, layer);
        if (input == a.activated) prefetch_windows(c, a, shared.rows, layer + 1);
        ResidualUpdate update{base, norm, shared.residual, shared.squares};
        project_back(c, a, shared, input, width, update, product);
        barrier.arrive(c);
        if (input == a.activated) load_taps(c, a, shared.taps, layer + 1);
        barrier.wait(c);
        if (input == a.activated) break;
        Activation activation{{base}};
        gemm_normed<2 * INTERMEDIATE>(c, (Sums*)shared.sums, a.input, activation);
        barrier.arrive(c);
        norm = layer_parameters(a.parameters, layer + 1);  // or the norm before the LM head
        input = a.activated;
        width = INTERMEDIATE;
    }
}

// Whether row n draws its token now.
__device__ __forceinline__ bool draws(const BatchArguments& a, const Shared& shared, int n) {
    return shared.rows.kind[n] == ROW_SAMPLED && !a.row_table[n].sampling.greedy && !Choice{0, shared.best[n].key, 0}.failure();
}

// True on all threads of the block if it is on any.
__device__ __forceinline__ bool any_thread(const Consumer& c, Shared& shared, bool value) {
    if (c.thread == 0) shared.pending = 0;
    consumer_barrier();
    if (value) shared.pending = 1;
    consumer_barrier();
    return shared.pending;
}

// top_k, top_p, min_p and the draw, of all rows that want them; each warp has the same rows in every block.
__device__ __forceinline__ void draw_rows(Consumer& c, const BatchArguments& a, Shared& shared, GridBarrier& barrier, u32& passes) {
    c.enter(PHASE_SAMPLING, LAYERS);
#pragma unroll 1
    for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
        if (!draws(a, shared, n)) continue;
        const SamplingArguments& s = a.row_table[n].sampling;
        temper_row(c, s, from_ordered(shared.best[n].key));
        Cut cut{0, 0, 0, 0, 0};
        next_stage(s, cut, 0);
        if (c.lane == 0) shared.cuts[n] = cut;
    }
    __syncwarp();
#pragma unroll 1
    while (true) {
        bool pending = false;
#pragma unroll 1
        for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
            if (!draws(a, shared, n)) continue;
            const SamplingArguments& s = a.row_table[n].sampling;
            Histograms* histograms = (Histograms*)s.histograms;
            if (n % BLOCKS == c.block) {  // see Histograms
                Histogram* later = histograms->turns + (passes + 1) % 3;
                for (int i = c.lane; i < BINS; i += 32) later->count[i] = 0, later->mass[i] = 0;
            }
            if (shared.cuts[n].stage == 2) continue;
            pending = true;
            count_row(c, s, shared.sampling.histograms[c.warp], histograms->turns + passes % 3, shared.cuts[n]);
        }
        if (!any_thread(c, shared, pending)) break;
        barrier.meet(c);
#pragma unroll 1
        for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
            if (!draws(a, shared, n) || shared.cuts[n].stage == 2) continue;
            const SamplingArguments& s = a.row_table[n].sampling;
            Cut cut = shared.cuts[n];
            settle_digit(c, s, ((Histograms*)s.histograms)->turns + passes % 3, cut);
            __syncwarp();
            if (c.lane == 0) shared.cuts[n] = cut;
            __syncwarp();
        }
        ++passes;
    }
    u64* candidates = a.candidates + HEAD_CANDIDATES * BATCH_COLUMNS;
#pragma unroll 1
    for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
        if (!draws(a, shared, n)) continue;
        Candidate drawn = draw_row(c, a.row_table[n].sampling, shared.cuts[n].kept, shared.rows.position[n] + 1);
        if (c.lane == 0) store_relaxed64(candidates + n * BLOCKS + c.block, (u64)drawn.key << 32 | (0xFFFFFFFFu - drawn.id));
    }
    barrier.meet(c);
#pragma unroll 1
    for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
        if (!draws(a, shared, n)) continue;
        Candidate best = best_candidate(c, candidates + n * BLOCKS, BLOCKS);
        __syncwarp();
        if (c.lane == 0) shared.best[n] = best;
    }
}

// What the log-probabilities of the rows that want them need of this block.
__device__ __forceinline__ void publish_all_logprobs(Consumer& c, const BatchArguments& a, Shared& shared) {
#pragma unroll 1
    for (int n = 0; n < a.rows; ++n) {
        const BatchRow& r = a.row_table[n];
        if (shared.rows.kind[n] != ROW_SAMPLED || r.sampling.logprobs < 0) continue;
        consumer_barrier();
        publish_logprobs(c, r.logits, shared.logprobs, r.sampling.logprobs, r.sampling.lists + c.block * LIST_WORDS);
    }
}

// The token of every row, told to the host by the row's block. Returns whether any row goes on.
__device__ __forceinline__ bool choose_tokens(Consumer& c, const BatchArguments& a, Shared& shared, GridBarrier& barrier, int step, u32& passes) {
    c.enter(PHASE_TOKEN, LAYERS);
#pragma unroll 1
    for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS) {
        Candidate best = best_candidate(c, a.candidates + n * HEAD_CANDIDATES, HEAD_CANDIDATES);
        if (c.lane == 0) shared.best[n] = best;
    }
    bool stop = load_relaxed(a.stop);
    __syncwarp();
    if (a.draws) draw_rows(c, a, shared, barrier, passes);
    consumer_barrier();
    if (a.logprobs)
#pragma unroll 1
        for (int n = c.block; n < a.rows; n += BLOCKS) {
            const BatchRow& r = a.row_table[n];
            if (shared.rows.kind[n] != ROW_SAMPLED || r.sampling.logprobs < 0 || Choice{0, shared.best[n].key, 0}.failure()) continue;
            report_logprobs(c, r.logits, shared.logprobs, r.sampling.logprobs, r.sampling.lists, shared.best[n].id,
                            r.sampling.records + shared.rows.made[n] * RECORD_WORDS);
            consumer_barrier();
        }
    bool alive = false;
    int n = c.thread;
    if (n < a.rows && shared.rows.kind[n]) {
        const BatchRow& r = a.row_table[n];
        Choice choice{shared.best[n].id, shared.best[n].key, 0};
        int token = (int)choice.token, made = ++shared.rows.made[n];
        u32 failure = choice.failure();
        bool last = made == r.max_tokens || failure;
        for (int i = 0; i < r.stop_count; ++i) last |= token == r.stop_tokens[i];
        if (shared.rows.kind[n] == ROW_SAMPLED && r.sampling.counts && !failure && OwnRows(c.block).own(token))
            r.sampling.counts[token] = (r.sampling.counts[token] + 1) | 1u << 31;
        if (n % BLOCKS == c.block)
            store_host64(a.output + (long long)step * a.rows + n, (u64)made << 32 | (last ? 1u << 31 : 0) | failure << FAILURE_SHIFT | (u32)token);
        shared.rows.token[n] = token;
        ++shared.rows.position[n];
        if (last) shared.rows.kind[n] = ROW_IDLE;
        shared.rows.streamed[step % 2][n] = alive = !last;
    } else if (n < a.rows) {
        shared.rows.streamed[step % 2][n] = false;
    }
    return any_thread(c, shared, alive) && !stop;
}

__device__ __forceinline__ void consume(const BatchArguments& a, Shared& shared, Ring ring) {
    Consumer c{ring, {0, 0, 0}, 0, nullptr, nullptr, nullptr, 0, 0, 0, 0, 0, {a.report, a.spin_limit, 0, 0, 0, 0}};
    c.locate();
    u32 passes = 0, product = a.first_product;
    GridBarrier barrier{a, 0, &shared.passed, &shared.quiet};
#pragma unroll 1
    for (int step = 0; step < a.steps; ++step) {
        if (a.times && c.block == 0 && c.thread == 0) a.times[shared.passed = 0] = nanoseconds();
        embed(c, a, shared);
        prefetch_windows(c, a, shared.rows, 0);
        load_taps(c, a, shared.taps, 0);
        if (c.warp == 0) {
            count_items(c, a, shared.rows, shared.first_item);
            __threadfence_block();
            __syncwarp();
            if (c.lane == 0) shared.counted = step + 1;
        }
        barrier.meet(c);
        u32 cancel = 0;
#pragma unroll 1
        for (int layer = 0; layer < LAYERS; ++layer) {
            if (layer == LAYERS - 1 && c.block == 0 && c.thread == 0) cancel = load_host(a.cancel);  // it takes microseconds
            if (DEAD_BLOCK >= 0 && c.block == DEAD_BLOCK && layer == DEAD_LAYER) {  // a planted failure, see layout.py
                if (c.thread == 0) shared.finished = 1;
                return;
            }
            step_layer(c, a, shared, barrier, product, layer, step % 2);
        }
        fence_async();  // the next step's states are fetched by bulk copies
        c.enter(PHASE_TOKEN, LAYERS);
        if (c.block == 0 && c.thread == 0) store_relaxed(a.stop, cancel);
        TokenScores finish{{{&c, &a, &shared.rows, shared.inverse, &shared.quiet}}};
        gemm_normed<VOCAB>(c, (Sums*)shared.sums, a.input, finish);
        consumer_barrier();
#pragma unroll 1
        for (int n = c.warp; n < a.rows; n += CONSUMER_WARPS)
            if (shared.rows.kind[n] == ROW_SAMPLED) score_logits(c, a, n);
        if (a.logprobs) publish_all_logprobs(c, a, shared);
        barrier.meet(c);
        if (!choose_tokens(c, a, shared, barrier, step, passes)) break;
    }
    consumer_barrier();
    if (c.thread == 0) shared.finished = 1;
}

// By all threads of the block, ahead of its first barrier.
__device__ __forceinline__ void begin_rows(const BatchArguments& a, Rows& rows) {
    int n = threadIdx.x;
    if (n >= BATCH_COLUMNS) return;
    rows.kind[n] = ROW_IDLE;
    rows.streamed[0][n] = rows.streamed[1][n] = n < a.rows;
    if (n >= a.rows) return;
    const BatchRow& r = a.row_table[n];
    rows.state[n] = r.state;
    rows.max_context[n] = r.max_context;
    rows.token[n] = r.token;
    rows.position[n] = r.position;
    rows.made[n] = 0;
    rows.kind[n] = r.sampling.active ? ROW_SAMPLED : ROW_PLAIN;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) batch(const __grid_constant__ BatchArguments a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    Ring ring{shared.slots, shared.arrivals, &shared.landed, shared.released, &shared.total};
    if (threadIdx.x == 0) {
        ring_init(ring);
        for (int i = 0; i < CONSUMER_WARPS; ++i) shared.released[i] = 0;
        shared.landed = shared.total = shared.finished = shared.quiet = 0;
        shared.counted = 0;
    }
    begin_rows(a, shared.rows);
    __syncthreads();
    if (threadIdx.x / 32 >= CONSUMER_WARPS) {
        give_registers();
        if (threadIdx.x / 32 == CONSUMER_WARPS) produce(a, shared, ring);
        if (threadIdx.x / 32 == CONSUMER_WARPS + 1) watch_landings(ring, ring_watchdog(a));
    } else {
        take_registers();
        consume(a, shared, ring);
    }
}
