// The decode megakernel: whole tokens in one persistent launch.
//
// One block an SM. In each, one producer warp streams the block's share of all weights through shared memory, in the
// order in which they are used, and CONSUMER_WARPS warps compute. Blocks hand vectors to each other as tagged words;
// there is no grid barrier. Read `consume` for the model; it is one token's way through it, top to bottom.
#include "primitive/gemv.cuh"
#include "state.cuh"
#include "layer/linear_attention.cuh"
#include "layer/attention.cuh"
#include "layer/mlp.cuh"
#include "layer/head.cuh"
#include "sampling/choose.cuh"

constexpr int THREADS = (CONSUMER_WARPS + PRODUCER_WARPS) * 32;

struct Shared {
    alignas(128) u8 slots[RING_STAGES * STAGE_BYTES];
    u64 arrivals[RING_STAGES];
    u32 released[CONSUMER_WARPS];
    u32 landed, total;
    union {  // attention and sampling begin when the last matrix is done, and end before the next input arrives
        alignas(16) u32 activations[ACTIVATION_COLUMNS / 2];
        AttentionScratch attention;
        SamplingScratch sampling;
    };
    HeadInputs head_inputs;
    float sums[2][CONSUMER_WARPS][BATCH_ROWS];
    float squares[2][CONSUMER_WARPS];
    float residual[RESIDUAL_ROWS];
    Candidate best[CONSUMER_WARPS + 1];  // one a warp, then the choice
    volatile u32 finished;
    u32 passes;  // of sampling, in this launch
};
static_assert(sizeof(Shared) <= SHARED_MEMORY, "Layout.plan counts less shared memory than the kernel uses");

// The host reads these before the first launch.
extern "C" __device__ int shared_bytes = sizeof(Shared);
extern "C" __device__ int threads = THREADS;

// ---- producer ----

// The ring stands still whenever the consumers do: they know better where, and report first.
__device__ __forceinline__ Watchdog ring_watchdog(const DecodeArguments& a) {
    return {a.report, a.spin_limit + a.spin_limit / 4, 0, 0, PHASE_RING_EMPTY, 0};
}

struct Producer {
    Ring ring;
    const u8* source;
    RingPosition next;  // the stage to fill
    Shared* shared;
    Watchdog watchdog;
    bool finished;

    // Streams this block's rows of one matrix; at most `in_flight` stages are on their way at a time.
    __device__ __forceinline__ void matrix(int rows, int columns, u32 in_flight) {
        int tiles = columns / CONSUMER_WARPS / 32, groups = (rows + 7) / 8;
        int left = first_group(groups, blockIdx.x + 1) - first_group(groups, blockIdx.x);
        for (int at = 0; left > 0 && !finished;) {
            int count = min(TILES_PER_STAGE, tiles - at);
            stage(in_flight, count * CONSUMER_WARPS * 512);
            at += count;
            if (at == tiles) at = 0, --left;
        }
    }

    __device__ __forceinline__ void stage(u32 in_flight, u32 bytes) {
        while (!slot_is_free(ring, next) || (LIMITS_FLIGHT && next.stage - *ring.landed >= in_flight)) {
            if (shared->finished) {
                finished = true;
                return;
            }
            if (PRODUCER_DOZE) doze(PRODUCER_DOZE);
            watchdog.check();
        }
        watchdog.spins = 0;
        fill_stage(ring, next, source, bytes);
        next.advance();
        source += bytes;
    }
};

__device__ __forceinline__ void produce(const DecodeArguments& a, Shared& shared, Ring ring) {
    Producer p{ring, nullptr, {0, 0, 0}, &shared, ring_watchdog(a), false};
    for (int step = 0; step < a.steps && !p.finished; ++step) {
        p.source = a.tape + a.tape_offsets[blockIdx.x];
        bool head = a.all_logits || step >= a.given - 1 + a.no_head;
#pragma unroll 1
        for (int i = 0; i < 4 * LAYERS + head && !p.finished; ++i) {
            int layer = i / 4, which = layer == LAYERS ? 4 : i % 4;
            bool full = is_full(layer % LAYERS);
            int rows = which == 0 ? (full ? PROJECTED_FULL : PROJECTED_LINEAR) : which == 2 ? 2 * INTERMEDIATE : which == 4 ? VOCAB : HIDDEN;
            int columns = which == 1 ? (full ? QUERY_DIM : VALUE_DIM) : which == 3 ? INTERMEDIATE : HIDDEN;
            p.matrix(rows, columns, which == 4 ? HEAD_STAGES_IN_FLIGHT : LAYER_STAGES_IN_FLIGHT);
        }
    }
    finish_filling(ring, p.next);
    *ring.total = p.next.stage + 1;
}

// ---- consumers ----

// Sixteen bytes (8 columns) of a row of the embedding. A tied embedding is read from the LM head's place on the tape.
__device__ __forceinline__ uint4 embedding(const DecodeArguments& a, int token, int column) {
    if (!TIED) return __ldg((const uint4*)(a.embedding + (long long)token * HIDDEN + column));
    constexpr int GROUPS = (VOCAB + 7) / 8, TILES = HIDDEN / CONSUMER_WARPS / 32;
    int group = token / 8;
    int block = (int)(((long long)group * BLOCKS + BLOCKS - 1) / GROUPS);
    while (first_group(GROUPS, block) > group) --block;
    while (first_group(GROUPS, block + 1) <= group) ++block;
    int warp = column / (HIDDEN / CONSUMER_WARPS), inside = column % (HIDDEN / CONSUMER_WARPS);
    int tile = inside / 32, stage = tile / TILES_PER_STAGE, count = min(TILES_PER_STAGE, TILES - stage * TILES_PER_STAGE);
    long long at = a.tape_offsets[block] + a.head_offsets[block] + (long long)(group - first_group(GROUPS, block)) * 16 * HIDDEN +
                   stage * STAGE_BYTES + ((warp * count + tile % TILES_PER_STAGE) * 32 + token % 8 * 4 + inside % 32 / 8) * 16;
    return __ldg((const uint4*)(a.tape + at));
}

// The first layer's input: this warp's slice of the token's embedding, and this block's rows of the residual stream.
__device__ __forceinline__ float embed(Consumer& c, const DecodeArguments& a, int token, float* residual) {
    constexpr int SLICE = HIDDEN / CONSUMER_WARPS;
    const float* scale = layer_parameters(a.parameters, 0);
    int start = slice_start(HIDDEN, c.warp);
    float squares = 0;
    for (int i = c.lane; i < SLICE / 8; i += 32) {
        float x[8];
        unpack8(x, embedding(a, token, start + 8 * i));
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += x[j] * x[j];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float4 s = load_constant4(scale + start + 8 * i + 4 * j);
            store_activations(c, 2 * i + j, make_float4(x[4 * j] * s.x, x[4 * j + 1] * s.y, x[4 * j + 2] * s.z, x[4 * j + 3] * s.w));
        }
    }
    int first = 8 * first_group(HIDDEN / 8, c.block), rows = 8 * first_group(HIDDEN / 8, c.block + 1) - first;
    for (int i = c.thread; i < rows / 8; i += CONSUMER_WARPS * 32) {
        float x[8];
        unpack8(x, embedding(a, token, first + 8 * i));
#pragma unroll
        for (int j = 0; j < 8; ++j) residual[8 * i + j] = x[j];
    }
    __syncwarp();
    return squares;
}

__device__ __forceinline__ void consume(const DecodeArguments& a, Shared& shared, Ring ring) {
    Consumer c{ring, {0, 0, 0}, 0, nullptr, shared.sums, shared.squares, 0, 0, 0, 0, 0, {a.report, a.spin_limit, 0, 0, 0, 0}};
    c.activations = shared.activations;
    c.locate();
    int token = 0, step = 0;
    for (bool last = false; step < a.steps && !last; ++step) {
        if (step < a.given) token = a.tokens[step];
        int position = a.position + step;
        const float2* rope = a.rope + (long long)position * (ROTARY_DIM / 2);
        u32 cancel = 0;  // asked for here and used at the end: it comes from the host
        if (c.block == 0 && c.thread == 0) cancel = load_host(a.cancel);

        c.enter(PHASE_INPUT, 0);
        c.timeline.start_token(a.timeline, c.block);
        c.mark(MARK_TOKEN);
        float squares = embed(c, a, token, shared.residual);
        for (int layer = 0; layer < LAYERS; ++layer) {
            if (DEAD_BLOCK >= 0 && c.block == DEAD_BLOCK && layer == DEAD_LAYER) {  // a planted failure, see layout.py
                if (c.thread == 0) shared.finished = 1;
                return;
            }
            u32 tag = tag_of(step * LAYERS + layer);
            Channels channels = channels_of(a.exchange, layer);
            const float* parameters = layer_parameters(a.parameters, layer);
            int full = full_layers_before(layer);
            u8* state = a.state;
            c.enter(PHASE_INPUT, layer);
            ResidualFinish after_mixer{&c, shared.residual, channels.after_mixer, tag};
            if (is_full(layer)) {
                FullLayer weights;
                weights.q_norm = parameters + 2 * HIDDEN;
                weights.k_norm = weights.q_norm + HEAD_DIM;
                weights.keys = (u16*)(state + LINEAR_LAYERS * LINEAR_STATE * 4) + (long long)full * 2 * KV_DIM * a.max_context;
                weights.values = weights.keys + (long long)KV_DIM * a.max_context;
                attention(c, weights, channels, shared.attention, rope, position, a.max_context, squares, tag);
                if (QUERY_DIM != VALUE_DIM) gemv<HIDDEN, QUERY_DIM>(c, 0, after_mixer);
            } else {
                LinearLayer weights;
                weights.conv_weight = parameters + 2 * HIDDEN;
                weights.negative_decay_rate = weights.conv_weight + 4 * CONV_DIM;
                weights.dt_bias = weights.negative_decay_rate + VALUE_HEADS;
                weights.gated_norm = weights.dt_bias + VALUE_HEADS;
                weights.conv_window = (float*)state + (layer - full) * LINEAR_STATE;
                weights.recurrent_state = weights.conv_window + 4 * CONV_DIM;
                linear_attention(c, weights, shared.head_inputs, channels, squares, tag);
                if (QUERY_DIM != VALUE_DIM) gemv<HIDDEN, VALUE_DIM>(c, 0, after_mixer);
            }
            // out_proj and o_proj are one piece of code where they are of one size: the fewer instructions a layer has,
            // the more of them stay in the cache.
            if (QUERY_DIM == VALUE_DIM) gemv<HIDDEN, VALUE_DIM>(c, 0, after_mixer);
            c.enter(PHASE_INPUT, layer);
            squares = receive_activations<HIDDEN>(c, channels.after_mixer, tag, parameters + HIDDEN);
            ResidualFinish after_mlp{&c, shared.residual, channels.after_mlp, tag};
            mlp(c, channels, squares, tag, after_mlp);
            // The input of the next layer, or of the LM head.
            const float* next_norm = layer_parameters(a.parameters, layer + 1);
            squares = receive_activations<HIDDEN>(c, channels.after_mlp, tag, next_norm);
        }

        c.enter(PHASE_TOKEN, LAYERS);
        c.mark(MARK_HEAD);
        if (c.thread == 0) fence_gpu();  // what this block wrote for later tokens (KV cache) comes before its candidate
        u32 tag = tag_of(step);
        bool sample = step >= a.given - 1 + a.no_head;
        HeadFinish finish{&c, nullptr, &a.sampling, sample && a.sampling.active, {0, 0xFFFFFu}};
        if (a.logits) finish.logits = a.logits + (a.all_logits ? (long long)step * VOCAB : 0);
        if (a.all_logits || sample) gemv<VOCAB, HIDDEN>(c, squares, finish);
        // Prompt tokens pass here too: what a block wrote for later tokens becomes visible to the others.
        Choice choice = choose(c, a, finish.sampled, finish.best, shared.sampling, shared.best, &shared.passes, step, cancel ? STOP_REQUESTED : 0, tag);
        c.mark(MARK_TOKEN);
        token = (int)choice.token;  // of no meaning after a given token that another follows
        if (sample) {
            int made = step - a.given + 2;
            u32 failure = choice.failure();
            last = made == a.max_tokens || choice.flags || failure;
            for (int i = 0; i < a.stop_count; ++i) last |= token == a.stop_tokens[i];
            if (c.block == 0 && c.thread == 0)
                store_host64(a.output + (made - 1) % OUTPUT_RING, (u64)made << 32 | (last ? 1u << 31 : 0) | failure << FAILURE_SHIFT | (u32)token);
        } else {
            last = choice.flags;
        }
    }
    if (c.block == 0 && c.thread == 0) store_host64(a.consumed, 1ull << 63 | (u32)step);
    consumer_barrier();
    if (c.thread == 0) shared.finished = 1;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ DecodeArguments a) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    Ring ring{shared.slots, shared.arrivals, &shared.landed, shared.released, &shared.total};
    if (threadIdx.x == 0) {
        ring_init(ring);
        for (int i = 0; i < CONSUMER_WARPS; ++i) shared.released[i] = 0;
        shared.landed = shared.total = shared.finished = shared.passes = 0;
    }
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
