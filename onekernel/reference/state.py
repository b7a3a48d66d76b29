"""State: everything the model remembers of one token timeline."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onekernel.checkpoint.shape import FULL, LINEAR, Shape

SMALLEST_CACHE = 64  # tokens


@dataclass(frozen=True)
class LinearState:
    """Of one delta-net layer; the arrays are never modified, so copies of a state may share them."""

    conv_window: np.ndarray  # [conv_dim, conv_kernel - 1] the last inputs of the convolution, oldest first
    recurrent: np.ndarray  # [value_heads, key_head_dim, value_head_dim]


class KeyValueCache:
    """Keys (after norm and RoPE) and values of one attention layer: two [kv_heads, capacity, head_dim] buffers.

    Only as many tokens are meant as the state has consumed; what lies behind them is left over.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys = keys
        self.values = values

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int) -> KeyValueCache:
        buffers = np.zeros((2, kv_heads, 0, head_dim), np.float32)
        return cls(buffers[0], buffers[1])

    def extend(self, position: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write `keys` and `values` [T, kv_heads, head_dim] at `position`.

        Returns views of all keys and values up to there, [kv_heads, position + T, head_dim].
        """
        end = position + len(keys)
        if end > self.keys.shape[1]:
            capacity = max(SMALLEST_CACHE, end, 2 * self.keys.shape[1])  # doubling: each token moves O(1) times
            self.keys = _grown(self.keys[:, :position], capacity)
            self.values = _grown(self.values[:, :position], capacity)
        self.keys[:, position:end] = keys.swapaxes(0, 1)
        self.values[:, position:end] = values.swapaxes(0, 1)
        return self.keys[:, :end], self.values[:, :end]

    def copy(self, position: int) -> KeyValueCache:
        """A cache of its own with the first `position` tokens."""
        return KeyValueCache(self.keys[:, :position].copy(), self.values[:, :position].copy())


def _grown(buffer: np.ndarray, capacity: int) -> np.ndarray:
    heads, used, dim = buffer.shape
    result = np.empty((heads, capacity, dim), buffer.dtype)
    result[:, :used] = buffer
    return result


@dataclass
class State:
    """`linear` and `full` are keyed by the index of the layer."""

    position: int = 0  # tokens consumed so far
    linear: dict[int, LinearState] = field(default_factory=dict)
    full: dict[int, KeyValueCache] = field(default_factory=dict)

    @classmethod
    def empty(cls, shape: Shape) -> State:
        linear = LinearState(
            np.zeros((shape.conv_dim, shape.conv_kernel - 1), np.float32),
            np.zeros((shape.value_heads, shape.key_head_dim, shape.value_head_dim), np.float32),
        )
        return cls(
            linear={i: linear for i, kind in enumerate(shape.layer_types) if kind == LINEAR},
            full={
                i: KeyValueCache.empty(shape.kv_heads, shape.head_dim)
                for i, kind in enumerate(shape.layer_types)
                if kind == FULL
            },
        )

    def copy(self) -> State:
        """An equal state; the two go on independently."""
        return State(self.position, dict(self.linear), {i: c.copy(self.position) for i, c in self.full.items()})
