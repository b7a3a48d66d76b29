// Prefill: a chunk of a prompt in one cooperative launch, on the tensor cores.
//
// All blocks go through the same phases, with a grid barrier between any two; in a phase, each takes every
// gridDim.x-th item of work. Read `run_phase` for the model; it is one layer, top to bottom. The state that this leaves
// is the one that the decode kernel goes on from (state.cuh).
#include "prefill/model.cuh"
#include "prefill/gemm.cuh"
#include "prefill/norm.cuh"
#include "prefill/delta_chunks.cuh"
#include "prefill/delta_scan.cuh"
#include "prefill/attention.cuh"
#include "primitive/grid_barrier.cuh"

static_assert(VOCAB % 16 == 0, "a warp stores 16 rows at a time");

constexpr int PHASES_A_LAYER = 9;
constexpr int PHASES = 1 + PHASES_A_LAYER * LAYERS;  // the embedding first; the LM head may follow as phase PHASES

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int PREFILL_SHARED =  // bytes that all phases use in turn
    larger(larger(GEMM_BYTES, CHUNK_GROUPS * (int)sizeof(ChunkScratch)), larger(SCAN_BYTES, ATTENTION_BYTES));

constexpr int BARRIER_BYTES = 16 * GEMM_STAGES;

extern "C" __device__ int shared_bytes = PREFILL_SHARED + BARRIER_BYTES + 1024;  // the host reads these before the first launch
extern "C" __device__ int cluster_blocks = CLUSTER;

// Phase 3 of attention layers is empty.
__device__ __forceinline__ bool is_empty(int phase) {
    return phase > 0 && phase < PHASES && (phase - 1) % PHASES_A_LAYER == 3 && is_full((phase - 1) / PHASES_A_LAYER);
}

__device__ __forceinline__ void run_phase(const PrefillArguments& a, int phase, u8* memory, TokenRing& ring) {
    if (phase == 0) return embed(a, memory);
    if (phase == PHASES)
        return gemm<VOCAB, HIDDEN>(a, ring, 4 * LAYERS, a.input + (long long)a.logits_first * HIDDEN, a.logits_count, 1,
                                   FloatRows<VOCAB>{a.logits, a.logits_count});
    int layer = (phase - 1) / PHASES_A_LAYER, matrix = 4 * layer;
    const float* parameters = layer_parameters(a.parameters, layer);
    switch ((phase - 1) % PHASES_A_LAYER) {
        case 0:
            if (is_full(layer))
                gemm<FULL_STRIDE, HIDDEN>(a, ring, matrix, a.input, a.tokens, 1, Rows<FULL_STRIDE>{a.projected, a.tokens});
            else
                gemm<LINEAR_STRIDE + 2 * VALUE_HEADS, HIDDEN>(a, ring, matrix, a.input, a.tokens, 1, LinearProjection{a.projected, a.gates, a.tokens});
            break;
        case 1:
            if (is_full(layer))
                rotate(a, full_layer(a, layer));
            else
                delta_chunks(a, linear_layer(a, layer), memory);
            break;
        case 2:
            if (is_full(layer) && QUERY_DIM != VALUE_DIM)
                prefetch_matrix<HIDDEN, QUERY_DIM>(a, matrix + 1);
            else
                prefetch_matrix<HIDDEN, VALUE_DIM>(a, matrix + 1);
            if (is_full(layer))
                attend(a, full_layer(a, layer), memory);
            else
                delta_scan(a, linear_layer(a, layer), memory);
            break;
        case 3:
            if (!is_full(layer)) gated_norm(a, linear_layer(a, layer));
            break;
        case 4:
            if (is_full(layer) && QUERY_DIM != VALUE_DIM)
                gemm<HIDDEN, QUERY_DIM>(a, ring, matrix + 1, a.mixed, a.tokens, a.mixer_splits, Rows<HIDDEN>{a.partials, a.tokens});
            else
                gemm<HIDDEN, VALUE_DIM>(a, ring, matrix + 1, a.mixed, a.tokens, a.mixer_splits, Rows<HIDDEN>{a.partials, a.tokens});
            break;
        case 5:
        case 8: {
            bool after_mixer = (phase - 1) % PHASES_A_LAYER == 5;
            if (after_mixer) {
                prefetch_matrix<2 * INTERMEDIATE, HIDDEN>(a, matrix + 2);
                prefetch_matrix<HIDDEN, INTERMEDIATE>(a, matrix + 3);
            } else if (layer + 1 < LAYERS) {
                if (is_full(layer + 1))
                    prefetch_matrix<FULL_STRIDE, HIDDEN>(a, matrix + 4);
                else
                    prefetch_matrix<LINEAR_STRIDE + 2 * VALUE_HEADS, HIDDEN>(a, matrix + 4);
            }
            const float* weight = after_mixer ? parameters + HIDDEN : layer_parameters(a.parameters, layer + 1);
            add_and_normalise(a, after_mixer ? a.mixer_splits : a.mlp_splits, weight, memory);
            break;
        }
        case 6: gemm<2 * INTERMEDIATE, HIDDEN>(a, ring, matrix + 2, a.input, a.tokens, 1, Activation{a.activated, a.tokens}); break;
        case 7: gemm<HIDDEN, INTERMEDIATE>(a, ring, matrix + 3, a.activated, a.tokens, a.mlp_splits, Rows<HIDDEN>{a.partials, a.tokens}); break;
    }
}

extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) prefill(const __grid_constant__ PrefillArguments a) {
    extern __shared__ u8 unaligned[];
    u8* memory = unaligned + (1024 - (shared_address(unaligned) & 1023)) % 1024;  // the 128-byte swizzle repeats every 1,024
    Watchdog watchdog{a.report, a.spin_limit, 0, 0, PHASE_NONE, 0};
    u32 arrivals = 0;
    TokenRing ring{shared_address(memory), shared_address(memory) + PREFILL_SHARED, 0, 0};
    ring.init();
    for (int phase = a.first_phase; phase < a.end_phase; ++phase) {
        if (is_empty(phase)) continue;
        run_phase(a, phase, memory, ring);
        watchdog.enter(PHASE_NONE, phase);
        arrivals += gridDim.x;
        if (phase + 1 < a.end_phase) grid_barrier(a.barrier, arrivals, watchdog);
        if (a.times && blockIdx.x == 0 && threadIdx.x == 0) a.times[phase] = nanoseconds();
    }
    ring.close();
}
