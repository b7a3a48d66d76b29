"""The gated delta net: the token mixer of three layers in four."""

from __future__ import annotations

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.reference.delta_rule import chunked_delta_rule, recurrent_delta_rule
from onekernel.reference.norm import gated_rms_norm, l2_norm, sigmoid, silu, softplus
from onekernel.reference.parameters import LinearAttention
from onekernel.reference.state import LinearState


def linear_attention(
    parameters: LinearAttention, shape: Shape, state: LinearState, x: np.ndarray
) -> tuple[np.ndarray, LinearState]:
    """Mix tokens `x` [T, hidden] (normed) into what the state holds: output [T, hidden] and the state after them."""
    qkv, z, a, b = project(parameters, x)
    qkv, conv_window = causal_conv(qkv, parameters.conv1d, state.conv_window)
    query, key, value = split_heads(qkv, shape)
    decay, beta = gates(a, b, parameters.A_log, parameters.dt_bias)
    delta_rule = recurrent_delta_rule if len(x) == 1 else chunked_delta_rule
    mixed, recurrent = delta_rule(query, key, value, decay, beta, state.recurrent)
    gate = z.reshape(mixed.shape)
    mixed = gated_rms_norm(mixed, gate, parameters.norm, shape.norm_eps)
    return mixed.reshape(len(x), shape.value_dim) @ parameters.out_proj.T, LinearState(conv_window, recurrent)


def project(parameters: LinearAttention, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """qkv [T, conv_dim], output gate z [T, value_dim], a (for the decay) and b (for beta), both [T, value_heads]."""
    return (
        x @ parameters.in_proj_qkv.T,
        x @ parameters.in_proj_z.T,
        x @ parameters.in_proj_a.T,
        x @ parameters.in_proj_b.T,
    )


def causal_conv(x: np.ndarray, weight: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every channel on its own: silu(Σ_j weight[:, j] · x[t - 3 + j]), j = 0..3; inputs before t = 0 are in `window`.

    Args:
        x: [T, conv_dim]
        weight: [conv_dim, 4]
        window: [conv_dim, 3] the inputs before x, oldest first (zeros at the start of a timeline)

    Returns:
        output [T, conv_dim] and the window after the last token
    """
    kernel = weight.shape[1]
    inputs = np.concatenate([window.T, x])
    output = sum(inputs[j : j + len(x)] * weight[:, j] for j in range(kernel))
    return silu(np.asarray(output)), np.ascontiguousarray(inputs[len(x) :].T)


def split_heads(qkv: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """qkv [T, conv_dim] -> query and key [T, value_heads, key_head_dim], value [T, value_heads, value_head_dim].

    Query and key are l2-normed, the query is scaled. Value head h uses key head h // value_heads_per_key_head.
    """
    tokens = len(qkv)
    query, key, value = np.split(qkv, [shape.key_dim, 2 * shape.key_dim], axis=1)
    query = l2_norm(query.reshape(tokens, shape.key_heads, shape.key_head_dim)) * shape.key_head_dim**-0.5
    key = l2_norm(key.reshape(tokens, shape.key_heads, shape.key_head_dim))
    value = value.reshape(tokens, shape.value_heads, shape.value_head_dim)
    repeats = shape.value_heads_per_key_head
    return np.repeat(query, repeats, axis=1), np.repeat(key, repeats, axis=1), value


def gates(a: np.ndarray, b: np.ndarray, A_log: np.ndarray, dt_bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """decay = -exp(A_log) · softplus(a + dt_bias), the log of what is kept, and beta = sigmoid(b); [T, value_heads]."""
    return -np.exp(A_log) * softplus(a + dt_bias), sigmoid(b)
