"""The least shape that the GPU's kernels are written for; tests take it with the dimensions that they are about."""

from __future__ import annotations

from onekernel.checkpoint.shape import FULL, LINEAR, Shape

SMALL = Shape(
    hidden=256,
    intermediate=512,
    layer_types=(LINEAR, FULL),
    vocab=264,
    tied=True,
    heads=4,
    kv_heads=2,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    key_heads=1,
    value_heads=2,
    key_head_dim=128,
    value_head_dim=128,
    conv_kernel=4,
    norm_eps=1e-6,
    max_context=4096,
    mtp_layers=0,
    eos_token_ids=(),
)
