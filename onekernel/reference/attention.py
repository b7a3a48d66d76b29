"""Gated attention: the token mixer of every fourth layer and of the MTP layer."""

from __future__ import annotations

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.reference.norm import rms_norm, sigmoid
from onekernel.reference.parameters import Attention
from onekernel.reference.state import KeyValueCache

MOST_SCORES = 2**23  # attention scores held at a time (32 MiB)


def attention(parameters: Attention, shape: Shape, cache: KeyValueCache, position: int, x: np.ndarray) -> np.ndarray:
    """Output [T, hidden] for tokens `x` [T, hidden] (normed), the first of them at `position`; extends the cache."""
    query, gate, key, value = project(parameters, shape, x)
    query = rope(rms_norm(query, parameters.q_norm, shape.norm_eps), position, shape)
    key = rope(rms_norm(key, parameters.k_norm, shape.norm_eps), position, shape)
    keys, values = cache.extend(position, key, value)
    mixed = causal_attention(query, keys, values)
    return (mixed * sigmoid(gate)).reshape(len(x), shape.query_dim) @ parameters.o_proj.T


def project(
    parameters: Attention, shape: Shape, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query and output gate [T, heads, head_dim], key and value [T, kv_heads, head_dim].

    q_proj holds, head after head, the rows of the query and then those of the gate.
    """
    query_and_gate = (x @ parameters.q_proj.T).reshape(len(x), shape.heads, 2, shape.head_dim)
    key = (x @ parameters.k_proj.T).reshape(len(x), shape.kv_heads, shape.head_dim)
    value = (x @ parameters.v_proj.T).reshape(len(x), shape.kv_heads, shape.head_dim)
    return query_and_gate[:, :, 0], query_and_gate[:, :, 1], key, value


def rope(x: np.ndarray, position: int, shape: Shape) -> np.ndarray:
    """Rotate the first `rotary_dim` dims of each head of `x` [T, heads, head_dim] by their position.

    Dims i and i + rotary_dim / 2 form a pair, turned by the angle position · rope_theta^(-2i / rotary_dim). Angles are
    computed in float32, as the model was trained. (For text, the interleaved multimodal RoPE is exactly this.)
    """
    half = shape.rotary_dim // 2
    frequency = (shape.rope_theta ** (-np.arange(half) / half)).astype(np.float32)
    angle = np.arange(position, position + len(x), dtype=np.float32)[:, None, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def causal_attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """softmax(q kᵀ / sqrt(head_dim)) v, where a query sees the keys up to its own position.

    Args:
        query: [T, heads, head_dim], the last T positions
        keys, values: [kv_heads, S, head_dim], all positions; head h uses kv head h // (heads / kv_heads)

    Returns:
        [T, heads, head_dim]
    """
    tokens, heads, head_dim = query.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    output = np.empty_like(query)
    block = max(1, MOST_SCORES // (heads * length))  # queries at a time
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        count = end - start
        visible = length - tokens + end  # keys that the last query of the block sees
        # [kv_heads, group * count, head_dim]: the heads that share a kv head become rows of one product.
        rows = query[start:end].reshape(count, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        rows = rows.reshape(kv_heads, group * count, head_dim) * head_dim**-0.5
        scores = np.matmul(rows, keys[:, :visible].swapaxes(1, 2)).reshape(kv_heads, group, count, visible)
        scores[..., visible - count :][..., ~np.tri(count, dtype=bool)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.matmul(scores.reshape(kv_heads, group * count, visible), values[:, :visible])
        mixed = mixed.reshape(kv_heads, group, count, head_dim).transpose(2, 0, 1, 3)
        output[start:end] = mixed.reshape(count, heads, head_dim)
    return output
