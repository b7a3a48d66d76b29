// down(silu(gate(x)) * up(x)). On the tape, a group of 8 rows holds 4 rows of gate_proj and the same 4 of up_proj.
#pragma once

#include "state.cuh"

struct ActivationFinish {
    const Consumer* consumer;
    u32* activated;
    u32 tag;

    static constexpr bool EXCHANGED = true;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int t = consumer->thread;
        if (t >= groups * 4) return;
        float scale = inverse_rms<HIDDEN>(*consumer);
        float gate = sum(t / 4 * 8 + t % 4) * scale, up = sum(t / 4 * 8 + 4 + t % 4) * scale;
        publish_to_all<INTERMEDIATE>(activated, group * 4 + t, silu(gate) * up, tag);
    }
};

__device__ __forceinline__ void mlp(Consumer& c, const Channels& channels, float squares, u32 tag, ResidualFinish& add_to_residual) {
    ActivationFinish finish{&c, channels.activated, tag};
    gemv<2 * INTERMEDIATE, HIDDEN>(c, squares, finish);
    receive_activations<INTERMEDIATE>(c, channels.activated, tag, nullptr);
    gemv<HIDDEN, INTERMEDIATE>(c, 0, add_to_residual);
}
