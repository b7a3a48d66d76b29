"""The arrays inside a state on the GPU, read back to the host; where they lie is said in kernels/state.cuh."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onekernel.checkpoint.shape import FULL
from onekernel.gpu.decoder import Decoder, State
from onekernel.reference.state import LinearState
from onekernel.reference.state import State as ReferenceState


def recurrent_parts(decoder: Decoder, state: State) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each delta-net layer: conv window [conv_dim, 4] and recurrent state [value_heads, key_dim, value_dim]."""
    shape = decoder.shape
    at, dims = 0, (shape.value_heads, shape.value_head_dim, shape.key_head_dim)
    for _ in range(shape.linear_layers):
        window = state.buffer.read(np.float32, 4 * shape.conv_dim, at).reshape(shape.conv_dim, 4)
        at += window.nbytes
        recurrent = state.buffer.read(np.float32, int(np.prod(dims)), at).reshape(dims)
        at += recurrent.nbytes
        yield window, recurrent.transpose(0, 2, 1)


def cache_parts(decoder: Decoder, state: State) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each attention layer: keys and values float32 [kv_heads, position, head_dim]."""
    shape = decoder.shape
    at = 4 * shape.linear_layers * (4 * shape.conv_dim + shape.value_heads * shape.value_head_dim * shape.key_head_dim)
    dims = (2, shape.kv_heads, state.capacity, shape.head_dim)
    for _ in range(shape.full_layers):
        bits = state.buffer.read(np.uint16, int(np.prod(dims)), at).reshape(dims)[:, :, : state.position]
        at += 2 * int(np.prod(dims))
        if decoder.gpu.capability < (8, 0):
            both = bits.view(np.float16).astype(np.float32)
        else:
            both = (bits.astype(np.uint32) << 16).view(np.float32)
        yield both[0], both[1]


def errors(decoder: Decoder, state: State, reference: ReferenceState) -> dict[str, list[float]]:
    """Relative error of each part, layer after layer: conv_window, recurrent, keys, values."""
    kinds = decoder.shape.layer_types
    linear = [reference.linear[i] for i, kind in enumerate(kinds) if kind != FULL]
    full = [reference.full[i] for i, kind in enumerate(kinds) if kind == FULL]
    found: dict[str, list[float]] = {"conv_window": [], "recurrent": [], "keys": [], "values": []}
    for (window, recurrent), theirs in zip(recurrent_parts(decoder, state), linear, strict=True):
        assert isinstance(theirs, LinearState)
        found["conv_window"].append(_error(window[:, 1:], theirs.conv_window))  # theirs: the last three
        found["recurrent"].append(_error(recurrent, theirs.recurrent))
    for (keys, values), cache in zip(cache_parts(decoder, state), full, strict=True):
        found["keys"].append(_error(keys, cache.keys[:, : state.position]))
        found["values"].append(_error(values, cache.values[:, : state.position]))
    return found


def state_bytes(decoder: Decoder, state: State) -> bytes:
    """All that counts of a state, as bytes: for comparing bit by bit."""
    parts = [*recurrent_parts(decoder, state), *cache_parts(decoder, state)]
    return b"".join(array.tobytes() for pair in parts for array in pair)


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    scale = np.linalg.norm(theirs.astype(np.float64))
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / max(scale, 1e-30))
