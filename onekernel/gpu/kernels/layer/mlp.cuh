// down(silu(gate(x)) * up(x)). On the tape, a group of 8 rows holds 4 rows of gate_proj and the same 4 of up_proj.
#pragma once

#include "state.cuh"

struct ActivationFinish {
    const Consumer* consumer;
    u32* activated;
    u32 epoch;

    __device__ __forceinline__ void prepare(int, int) {}
    template <class Sum>
    __device__ __forceinline__ void operator()(int group, int groups, Sum sum) {
        int t = consumer->thread;
        if (t / 32 * 32 >= groups * 4) return;
        bool valid = t < groups * 4;
        float value = 0;
        if (valid) {
            float scale = inverse_rms<HIDDEN>(*consumer);
            float gate = sum(t / 4 * 8 + t % 4) * scale, up = sum(t / 4 * 8 + 4 + t % 4) * scale;
            value = silu(gate) * up;
        }
        publish_packed<INTERMEDIATE>(activated, group * 4 + t, value, valid, epoch);
    }
};

__device__ __forceinline__ void mlp(Consumer& c, const Channels& channels, float squares, ResidualFinish& add_to_residual) {
    ActivationFinish finish{&c, channels.activated, channels.epoch};
    gemv<2 * INTERMEDIATE, HIDDEN>(c, squares, finish);
    receive_activations<INTERMEDIATE>(c, channels.activated, channels.epoch, nullptr);
    gemv<HIDDEN, INTERMEDIATE>(c, 0, add_to_residual);
}
