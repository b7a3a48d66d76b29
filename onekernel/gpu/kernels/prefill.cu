// Prefill: a chunk of a prompt in one cooperative launch, on the tensor cores.
//
// All blocks go through the same phases, with a grid barrier between any two; in a phase, each takes every
// gridDim.x-th item of work. Read `run_phase` for the model; it is one layer, top to bottom. The state that this leaves
// is the one that the decode kernel goes on from (state.cuh).
#include "prefill/model.cuh"
#include "prefill/gemm.cuh"
#include "prefill/norm.cuh"
#include "prefill/delta_chunks.cuh"
#include "prefill/delta_wgmma.cuh"
#include "prefill/attention_wgmma.cuh"
#include "primitive/grid_barrier.cuh"

static_assert(VOCAB % 16 == 0, "a warp stores 16 rows at a time");

constexpr int PHASES_A_LAYER = 9;
constexpr int PHASES = 1 + PHASES_A_LAYER * LAYERS;  // the embedding first; the LM head may follow as phase PHASES

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int PREFILL_SHARED =  // bytes that all phases use in turn
    larger(larger(GEMM_BYTES, (int)sizeof(ChunkScratch)),
           larger(WGMMA ? DELTA_WGMMA_BYTES : SCAN_BYTES, WGMMA ? WIDE_ATTENTION_BYTES : ATTENTION_BYTES));

constexpr int BARRIER_BYTES = 16 * GEMM_STAGES + 16 + HANDSHAKE_BYTES + PASSAGE_BYTES;

extern "C" __device__ int shared_bytes = PREFILL_SHARED + BARRIER_BYTES + 1024;  // the host reads these before the first launch
extern "C" __device__ int block_threads = PREFILL_THREADS;

// What a phase multiplies, if it is a product.
__device__ __forceinline__ bool is_product(int phase) {
    int step = (phase - 1) % PHASES_A_LAYER;
    return phase == PHASES || phase && (step == 0 || step == 4 || step == 6 || step == 7);
}
__device__ __forceinline__ Product product_of(const PrefillArguments& a, int phase) {
    int layer = (phase - 1) / PHASES_A_LAYER, matrix = 4 * layer, step = (phase - 1) % PHASES_A_LAYER;
    bool full = is_full(layer);
    Product p;
    p.tokens = a.tokens, p.splits = 1, p.finish = ROWS_OF_TOKENS;
    if (phase == PHASES)
        p.matrix = 4 * LAYERS, p.rows = VOCAB, p.columns = HIDDEN, p.input = a.input + (long long)a.logits_first * HIDDEN, p.tokens = a.logits_count,
        p.finish = LOGITS, p.out = (u16*)a.logits;
    else if (step == 0)
        p.matrix = matrix, p.rows = full ? FULL_STRIDE : LINEAR_STRIDE + 2 * VALUE_HEADS, p.columns = HIDDEN, p.input = a.input, p.out = a.projected,
        p.finish = full ? ROWS_OF_TOKENS : PROJECTION_OF_LINEAR;
    else if (step == 4)
        p.matrix = matrix + 1, p.rows = HIDDEN, p.columns = full ? QUERY_DIM : VALUE_DIM, p.input = a.mixed, p.splits = a.mixer_splits, p.out = a.partials;
    else if (step == 6)
        p.matrix = matrix + 2, p.rows = 2 * INTERMEDIATE, p.columns = HIDDEN, p.input = a.input, p.finish = ACTIVATION, p.out = a.activated;
    else
        p.matrix = matrix + 3, p.rows = HIDDEN, p.columns = INTERMEDIATE, p.input = a.activated, p.splits = a.mlp_splits, p.out = a.partials;
    return p;
}

// Asks for the weights of the next product behind `phase` in L2.
__device__ __forceinline__ void prefetch_behind(const PrefillArguments& a, int phase, int thread, int threads) {
    do
        ++phase;
    while (phase < a.end_phase && !is_product(phase));
    if (phase >= a.end_phase || phase == PHASES) return;
    const Product p = product_of(a, phase);
    prefetch_matrix(a, p.matrix, p.rows, p.columns, thread, threads);
}
// Without an asker, the workers do, in a phase that is no product.
__device__ __forceinline__ void prefetch_product(const PrefillArguments& a, int phase) {
    if (!WGMMA) prefetch_behind(a, phase, thread_index(), WORKERS);
}

// Attention that is not split needs no merge.
__device__ __forceinline__ bool is_empty(const PrefillArguments& a, int phase) {
    if (phase == 0 || phase == PHASES || (phase - 1) % PHASES_A_LAYER != 3) return false;
    return is_full((phase - 1) / PHASES_A_LAYER) && (!WGMMA || a.attention_splits == 1);
}

__device__ __forceinline__ void run_phase(const PrefillArguments& a, int phase, u8* memory, const TokenRing& ring, const Handshake& handshake, const Passage& passage) {
    if (phase == 0) return embed(a, memory);
    int layer = (phase - 1) / PHASES_A_LAYER, step = (phase - 1) % PHASES_A_LAYER;
    bool full = is_full(layer);
    if (is_product(phase)) return gemm(a, ring, product_of(a, phase), memory);
    const float* parameters = layer_parameters(a.parameters, layer);
    switch (step) {
        case 1:
            if (full)
                rotate(a, full_layer(a, layer));
            else
                delta_chunks(a, linear_layer(a, layer), memory);
            break;
        case 2:
            prefetch_product(a, phase);
            if (full && WGMMA)
                attend_wide(a, memory, handshake);
            else if (full)
                attend(a, full_layer(a, layer), memory);
            else if (WGMMA)
                carry_state(a, linear_layer(a, layer), memory, passage);
            else
                delta_scan(a, linear_layer(a, layer), memory);
            break;
        case 3:
            if (full)
                merge_attention(a);
            else if (WGMMA)
                gated_output(a, linear_layer(a, layer), memory, passage);
            else
                gated_norm(a, linear_layer(a, layer));
            break;
        default: {
            bool after_mixer = step == 5;
            prefetch_product(a, phase);
            const float* weight = after_mixer ? parameters + HIDDEN : layer_parameters(a.parameters, layer + 1);
            add_and_normalise(a, after_mixer ? a.mixer_splits : a.mlp_splits, weight, memory);
        }
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The asker's way through the phases. The workers wait for it where a phase that it helps in begins, so that it stays
// behind the grid barriers without passing them.
__device__ __forceinline__ void ask(const PrefillArguments& a, const u8* memory, const TokenRing& ring, const Handshake& handshake, const Passage& passage) {
    u32 step = 0, tiles = 0, carried = 0, turns = 0;
#pragma unroll 1
    for (int phase = a.first_phase; phase < a.end_phase; ++phase) {
        const int layer = (phase - 1) / PHASES_A_LAYER, part = (phase - 1) % PHASES_A_LAYER;
        if (is_product(phase)) {
            __syncthreads();
            fence_async();
            if (thread_index() == WORKERS) ask_for_tokens(ring, memory, step);
            __syncwarp();
            // Few tokens: what counts is the weights' way from device memory, which the mixer leaves idle.
            if (NARROW && part == 0 && phase < PHASES)
#pragma unroll 1
                for (int product = 4; product < 8; product += product < 6 ? 2 : 1) prefetch_behind(a, phase + product - 1, thread_index() - WORKERS, 128);
        } else if (phase && part == 2) {
            if (is_full(layer))
                bring(a, layer, memory, handshake, tiles);
            else
                bring_chunks(a, shared_address(memory), passage, carried);
        } else if (phase && part == 3 && !is_full(layer)) {
            bring_outputs(a, shared_address(memory), passage, turns);
        }
    }
}

#endif

extern "C" __global__ void CLUSTER __launch_bounds__(PREFILL_THREADS, 1) prefill(const __grid_constant__ PrefillArguments a) {
    extern __shared__ __align__(1024) u8 memory[];  // the 128-byte swizzle repeats every 1,024
    if (shared_address(memory) % 1024) fault();
    u32 arrivals = 0;
    TokenRing ring{shared_address(memory), shared_address(memory) + PREFILL_SHARED, (volatile u32*)(memory + PREFILL_SHARED + 16 * GEMM_STAGES)};
    Handshake handshake{ring.barriers + 16 * GEMM_STAGES + 16, (volatile u32*)(memory + PREFILL_SHARED + 16 * GEMM_STAGES + 16 + 13 * 8)};
    Passage passage{handshake.barriers + HANDSHAKE_BYTES, (volatile u32*)(memory + PREFILL_SHARED + 16 * GEMM_STAGES + 16 + HANDSHAKE_BYTES + PASSAGE_BYTES - 16)};
    passage.init();
    ring.init();
    handshake.init();
    if (PAIRS) cluster_barrier();
    __syncthreads();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    // Once, for good, before anything that a register would have to keep: see model.cuh.
    if (thread_index() >= WORKERS) {
        fewer_registers<32>();
        ask(a, memory, ring, handshake, passage);
        if (PAIRS) cluster_barrier();
        return;
    }
    more_registers<160>();
#endif
    for (int phase = a.first_phase; phase < a.end_phase; ++phase) {
        if (is_empty(a, phase)) continue;
        run_phase(a, phase, memory, ring, handshake, passage);
        arrivals += gridDim.x;
        if (phase + 1 < a.end_phase) {
            if (PAIRS) fence_async_shared();  // the other block may write to this one's memory as soon as the barrier is passed
            worker_sync();
            if (thread_index() == 0) {
                Watchdog watchdog{a.report, a.spin_limit, 0, 0, PHASE_NONE, (u32)phase};
                meet_grid(a.barrier, arrivals, watchdog);
            }
            worker_sync();
        }
        if (a.times && block_index() == 0 && thread_index() == 0) a.times[phase] = nanoseconds();
    }
    if (PAIRS) cluster_barrier();  // a block's memory lives as long as the other may write to it
}
