"""What the gate holds engines to: float32 logits of the reference model, and how far rounding to bf16 moves them.

Both are computed in one pass, layer by layer, so that a model needs the memory of one layer in float32 and not of all.
The second run is the same model with every activation that passes from one step to the next rounded to bf16, as a
correct engine of that width rounds them: its distance from the first is noise that no such engine can be blamed for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.reference.attention import attention
from onekernel.reference.linear_attention import linear_attention
from onekernel.reference.norm import rms_norm, silu
from onekernel.reference.parameters import MLP, LinearAttention, Parameters, StoredTensor
from onekernel.reference.state import State

HEAD_ROWS = 16384  # rows of the LM head widened at a time

Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Oracle:
    """Of one token sequence.

    Attributes:
        exact: float32 [tokens, vocab] logits of the reference.
        rounded: the same with activations rounded to bf16.
    """

    tokens: tuple[int, ...]
    exact: np.ndarray
    rounded: np.ndarray


def consult(weights: Weights, shape: Shape, tokens: Sequence[int]) -> Oracle:
    """Run the reference over `tokens` from an empty state, exactly and rounded."""
    ids = np.asarray(tokens, np.int64)
    embedded = _rows(weights, "embed_tokens.weight", ids)
    streams = [(embedded, _keep), (embedded, round_to_bf16)]
    for i, kind in enumerate(shape.layer_types):
        layer = Parameters.load(_OneLayer(weights, i), dataclasses.replace(shape, layer_types=(kind,)), mtp=False)
        streams = [(_through(layer, x, rounding), rounding) for x, rounding in streams]
    norm = weights.float32("norm.weight")
    finals = [rounding(rms_norm(x, norm, shape.norm_eps)) for x, rounding in streams]
    head = "embed_tokens.weight" if shape.tied else "lm_head.weight"
    logits = [np.empty((len(ids), shape.vocab), np.float32) for _ in finals]
    for start in range(0, shape.vocab, HEAD_ROWS):
        rows = _rows(weights, head, slice(start, start + HEAD_ROWS))
        for target, final in zip(logits, finals, strict=True):
            target[:, start : start + len(rows)] = final @ rows.T
    return Oracle(tuple(tokens), logits[0], round_to_bf16(logits[1]))


def _through(parameters: Parameters, x: np.ndarray, rounding: Rounding) -> np.ndarray:
    """One layer on hidden states [T, hidden]."""
    shape, layer = parameters.shape, parameters.layers[0]
    state = State.empty(shape)
    normed = rounding(rms_norm(x, layer.input_layernorm, shape.norm_eps))
    if isinstance(layer.mixer, LinearAttention):
        mixed, _ = linear_attention(layer.mixer, shape, state.linear[0], normed)
    else:
        mixed = attention(layer.mixer, shape, state.full[0], 0, normed)
    x = rounding(x + rounding(mixed))
    normed = rounding(rms_norm(x, layer.post_attention_layernorm, shape.norm_eps))
    return rounding(x + rounding(_mlp(layer.mlp, normed, rounding)))


def _mlp(parameters: MLP, x: np.ndarray, rounding: Rounding) -> np.ndarray:
    gate, up = rounding(x @ parameters.gate_proj.T), rounding(x @ parameters.up_proj.T)
    out: np.ndarray = rounding(silu(gate) * up) @ parameters.down_proj.T
    return out


def _keep(x: np.ndarray) -> np.ndarray:
    return x


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bf16, ties to even; float32 again."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def _rows(weights: Weights, name: str, rows: np.ndarray | slice) -> np.ndarray:
    """Some rows of a stored matrix, float32."""
    tensor = weights[name]
    data = tensor.data[rows]
    wide: np.ndarray = dataclasses.replace(tensor, shape=data.shape, data=data).float32()
    return wide


@dataclass(frozen=True)
class _Nothing:
    """Stands for the tensors outside of the one layer."""

    shape: tuple[int, ...] = (0, 0)

    def float32(self) -> np.ndarray:
        return np.empty(self.shape, np.float32)


@dataclass(frozen=True)
class _OneLayer(Mapping[str, StoredTensor]):
    """The weights of a model in which layer `index` is the first and only one."""

    weights: Weights
    index: int

    def __getitem__(self, name: str) -> StoredTensor:
        if not name.startswith("layers.0."):
            return _Nothing()
        return self.weights[f"layers.{self.index}.{name.removeprefix('layers.0.')}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
