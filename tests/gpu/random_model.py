"""Models of every true size with random weights, made in memory: no download, nothing that rounding could favour."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE
from onekernel.checkpoint.weights import Weights, expected_tensors


def shortened(name: str, layers: int = 4, vocab: int = 4096) -> Shape:
    """One of the sizes with few layers and few tokens: true dimensions, and a float32 reference that takes seconds."""
    shape = SIZES[name]
    return dataclasses.replace(shape, layer_types=shape.layer_types[:layers], vocab=vocab, eos_token_ids=())


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """bf16 weights (float32 A_log and gated norm, as released), scaled so that activations and logits stay sane."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, dims in expected_tensors(shape).items():
        if name.endswith("A_log"):
            values = np.log(random.uniform(0.5, 8, dims))
        elif name.endswith("dt_bias"):
            step = np.exp(random.uniform(math.log(1e-3), math.log(1e-1), dims))
            values = step + np.log(-np.expm1(-step))
        elif name.endswith("linear_attn.norm.weight"):
            values = 1 + 0.1 * random.standard_normal(dims)
        elif len(dims) == 1:
            values = 0.1 * random.standard_normal(dims)
        elif name.endswith("conv1d.weight"):
            values = 0.4 * random.standard_normal(dims)
        else:
            tensors[name] = _matrix(random, name, dims)
            continue
        values = values.astype(np.float32)
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            tensors[name] = Tensor(name, "F32", dims, values)
        else:
            tensors[name] = Tensor(name, "BF16", dims, (values.view(np.uint32) >> 16).astype(np.uint16))
    return Weights(tensors)


def _matrix(random: np.random.Generator, name: str, dims: tuple[int, ...]) -> Tensor:
    """Normal values of standard deviation 1 / sqrt(columns) (0.02 for embeddings), truncated to bf16.

    Large matrices repeat a random block of rows with their signs flipped at random, row by row: as good as independent
    for our purposes, and drawn in a fraction of the time.
    """
    rows, columns = dims
    deviation = 0.02 if "embed" in name or "head" in name else columns**-0.5
    drawn = min(rows, max(1, 2**24 // columns))
    block = random.standard_normal((drawn, columns), dtype=np.float32) * np.float32(deviation)
    bits = (block.view(np.uint32) >> 16).astype(np.uint16)
    data = np.empty(dims, np.uint16)
    for start in range(0, rows, drawn):
        count = min(drawn, rows - start)
        signs = random.integers(0, 2, (count, 1), np.uint16) << 15 if start else np.zeros((count, 1), np.uint16)
        chosen = random.permutation(drawn)[:count] if start else np.arange(count)
        data[start : start + count] = bits[chosen] ^ signs
    return Tensor(name, "BF16", dims, data)


__all__ = ["SIZES", "VOCABULARY_SIZE", "random_weights", "shortened"]
