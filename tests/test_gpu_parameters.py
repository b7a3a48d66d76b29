"""The kernel's float32 parameters (gpu/parameters.py): in the order and form in which decode.cu reads them."""

from __future__ import annotations

import dataclasses

import numpy as np

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.sizes import SIZES
from onekernel.checkpoint.weights import Weights, expected_tensors
from onekernel.gpu import parameters
from onekernel.reference.attention import rope

SHAPE = dataclasses.replace(SIZES["0.8b"], layer_types=SIZES["0.8b"].layer_types[2:4], vocab=8)


def test_parameters_of_each_layer_follow_each_other() -> None:
    random = np.random.default_rng(0)
    vectors = {
        name: random.standard_normal(dims).astype(np.float32)
        for name, dims in expected_tensors(SHAPE).items()
        if len(dims) != 2
    }
    packed = parameters.pack(Weights({n: Tensor(n, "F32", v.shape, v) for n, v in vectors.items()}), SHAPE)
    assert packed.dtype == np.float32
    at = 0

    def take(values: np.ndarray) -> None:
        nonlocal at
        np.testing.assert_allclose(packed[at : at + values.size], values.reshape(-1), rtol=1e-6)
        at += values.size

    linear, full = "layers.0.linear_attn", "layers.1.self_attn"
    take(1 + vectors["layers.0.input_layernorm.weight"])
    take(1 + vectors["layers.0.post_attention_layernorm.weight"])
    take(vectors[f"{linear}.conv1d.weight"])  # [conv_dim, 4]
    take(-np.exp(vectors[f"{linear}.A_log"]))
    take(vectors[f"{linear}.dt_bias"])
    take(vectors[f"{linear}.norm.weight"])
    take(1 + vectors["layers.1.input_layernorm.weight"])
    take(1 + vectors["layers.1.post_attention_layernorm.weight"])
    take(1 + vectors[f"{full}.q_norm.weight"])
    take(1 + vectors[f"{full}.k_norm.weight"])
    take(1 + vectors["norm.weight"])
    assert at == packed.size


def test_rope_table_turns_as_the_reference_does() -> None:
    table = parameters.rope_table(SHAPE, 3000)
    assert table.shape == (3000, 32, 2)
    x = np.random.default_rng(0).standard_normal((3000, 1, SHAPE.head_dim)).astype(np.float32)
    first, second = x[:, 0, :32], x[:, 0, 32:64]
    cosine, sine = table[..., 0], table[..., 1]
    turned = np.concatenate([first * cosine - second * sine, second * cosine + first * sine, x[:, 0, 64:]], 1)
    np.testing.assert_allclose(turned, rope(x, 0, SHAPE)[:, 0], rtol=1e-5, atol=1e-5)
