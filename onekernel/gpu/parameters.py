"""The float32 parameters of the kernel: what is not a matrix, layer after layer, in the form in which it is used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onekernel.checkpoint.shape import FULL, Shape
from onekernel.checkpoint.weights import Weights


def pack(weights: Weights, shape: Shape) -> np.ndarray:
    """float32: for each layer the two norms and what its mixer needs (order as in decode.cu), then the final norm."""
    return np.concatenate([part.reshape(-1) for part in _parts(weights, shape)])


def rope_table(shape: Shape, positions: int) -> np.ndarray:
    """float32 [positions, rotary_dim / 2, 2]: cosine and sine of each pair's angle.

    The angle is computed in float32, as the reference model does (reference/attention.py).
    """
    half = shape.rotary_dim // 2
    frequency = (shape.rope_theta ** (-np.arange(half) / half)).astype(np.float32)
    angle = np.arange(positions, dtype=np.float32)[:, None] * frequency
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def _parts(weights: Weights, shape: Shape) -> Iterator[np.ndarray]:
    for i, kind in enumerate(shape.layer_types):
        layer = f"layers.{i}"
        yield 1 + weights.float32(f"{layer}.input_layernorm.weight")
        yield 1 + weights.float32(f"{layer}.post_attention_layernorm.weight")
        if kind == FULL:
            yield 1 + weights.float32(f"{layer}.self_attn.q_norm.weight")
            yield 1 + weights.float32(f"{layer}.self_attn.k_norm.weight")
        else:
            yield weights.float32(f"{layer}.linear_attn.conv1d.weight")
            yield -np.exp(weights.float32(f"{layer}.linear_attn.A_log"))
            yield weights.float32(f"{layer}.linear_attn.dt_bias")
            yield weights.float32(f"{layer}.linear_attn.norm.weight")
    yield 1 + weights.float32("norm.weight")
