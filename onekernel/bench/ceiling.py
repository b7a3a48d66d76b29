"""Limit first: the bytes that a token must read and the FLOPs that a prompt must do, counted from the Shape.

Nothing here is measured. Divided by the read bandwidth and the matrix throughput that probe.py measures in the same
run, it gives the speed that no engine with these weights can pass at batch 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from onekernel.checkpoint.shape import Shape
from onekernel.reference.parameters import parameter_count

KV_BYTES = 2  # of one number in the KV cache: bf16
STATE_BYTES = 4  # of one number in a recurrent state: float32
CHUNK = 64  # tokens that the chunked delta rule takes at once


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that cross the memory bus for one token at one context, at least."""

    weights: int
    state: int  # recurrent states and conv windows, read and written
    cache: int  # keys and values, read once; the new ones written

    @property
    def total(self) -> int:
        return self.weights + self.state + self.cache


def matrix_parameters(shape: Shape) -> int:
    """Numbers in the matrices of all layers, without embedding and LM head."""
    mlp = 3 * shape.hidden * shape.intermediate
    linear = shape.hidden * (shape.conv_dim + 2 * shape.value_dim + 2 * shape.value_heads)
    full = shape.hidden * (3 * shape.query_dim + 2 * shape.kv_dim)
    return shape.layers * mlp + shape.linear_layers * linear + shape.full_layers * full


def decode_bytes(shape: Shape, context: int, weight_bytes: float = 2) -> DecodeBytes:
    """Of one token that sees `context` tokens before it. Every weight is read once; of the embedding one row.

    Args:
        weight_bytes: of one weight: 2 for bf16, 4 for float32, 1.0625 for 8 bits with a 16-bit scale per 32.
    """
    numbers = parameter_count(shape, mtp=False) - (0 if shape.tied else shape.vocab * shape.hidden)
    window = shape.conv_dim * (shape.conv_kernel - 1)
    recurrent = shape.value_heads * shape.key_head_dim * shape.value_head_dim
    state = shape.linear_layers * 2 * (recurrent * STATE_BYTES + window * KV_BYTES)
    cache = shape.full_layers * 2 * shape.kv_dim * KV_BYTES * (context + 1)
    return DecodeBytes(round(numbers * weight_bytes), state, cache)


def decode_flops(shape: Shape, context: int) -> int:
    """Of one token: 2 for each weight it is multiplied with, the recurrence, and attention over the context."""
    head = shape.vocab * shape.hidden
    recurrence = 7 * shape.key_head_dim * shape.value_head_dim * shape.value_heads * shape.linear_layers
    return 2 * (matrix_parameters(shape) + head) + recurrence + 4 * shape.query_dim * shape.full_layers * (context + 1)


def prefill_flops(shape: Shape, tokens: int) -> int:
    """Of a prompt of `tokens` from an empty state, with the LM head for its last token only.

    Matrix products, causal attention (half of the square), and the delta rule in chunks of 64 tokens: 4 C K for the
    two products of queries and keys, C (K + V) for the solve, 6 K V with the state, 2 C V for the output, per token
    and head.
    """
    key, value = shape.key_head_dim, shape.value_head_dim
    delta = 4 * CHUNK * key + CHUNK * (key + value) + 6 * key * value + 2 * CHUNK * value
    per_token = 2 * matrix_parameters(shape) + delta * shape.value_heads * shape.linear_layers
    attention = 4 * shape.query_dim * shape.full_layers * tokens * (tokens + 1) // 2
    return tokens * per_token + attention + 2 * shape.vocab * shape.hidden


def decode_ceiling(
    shape: Shape, context: int, bandwidth: float, throughput: float | None = None, weight_bytes: float = 2
) -> float:
    """Tokens per second that no engine passes: the slower of reading the bytes and doing the FLOPs.

    Args:
        bandwidth: measured read bandwidth, bytes/s.
        throughput: measured matrix throughput, FLOP/s; None leaves it out.
    """
    seconds = decode_bytes(shape, context, weight_bytes).total / bandwidth
    if throughput is not None:
        seconds = max(seconds, decode_flops(shape, context) / throughput)
    return 1 / seconds


def prefill_ceiling(shape: Shape, tokens: int, bandwidth: float, throughput: float, weight_bytes: float = 2) -> float:
    """Prompt tokens per second that no engine passes: the slower of the FLOPs and of reading all weights once."""
    weights = decode_bytes(shape, 0, weight_bytes).weights
    return tokens / max(prefill_flops(shape, tokens) / throughput, weights / bandwidth)
