"""Parameters: all weights in float32, under the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onekernel.checkpoint.shape import LINEAR, Shape


class StoredTensor(Protocol):
    """A tensor of a checkpoint, in whatever dtype it is stored."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def float32(self) -> np.ndarray:
        """The values as a contiguous float32 array."""


@dataclass(frozen=True)
class LinearAttention:
    in_proj_qkv: np.ndarray  # [conv_dim, hidden] rows: all q heads, all k heads, all v heads
    in_proj_z: np.ndarray  # [value_dim, hidden]
    in_proj_b: np.ndarray  # [value_heads, hidden]
    in_proj_a: np.ndarray  # [value_heads, hidden]
    conv1d: np.ndarray  # [conv_dim, conv_kernel]
    A_log: np.ndarray  # [value_heads]
    dt_bias: np.ndarray  # [value_heads]
    norm: np.ndarray  # [value_head_dim]
    out_proj: np.ndarray  # [hidden, value_dim]


@dataclass(frozen=True)
class Attention:
    q_proj: np.ndarray  # [heads * 2 * head_dim, hidden] rows: query and gate of head 0, of head 1, ...
    k_proj: np.ndarray  # [kv_dim, hidden]
    v_proj: np.ndarray  # [kv_dim, hidden]
    o_proj: np.ndarray  # [hidden, query_dim]
    q_norm: np.ndarray  # [head_dim]
    k_norm: np.ndarray  # [head_dim]


@dataclass(frozen=True)
class MLP:
    gate_proj: np.ndarray  # [intermediate, hidden]
    up_proj: np.ndarray  # [intermediate, hidden]
    down_proj: np.ndarray  # [hidden, intermediate]


@dataclass(frozen=True)
class Layer:
    input_layernorm: np.ndarray  # [hidden]
    mixer: LinearAttention | Attention
    post_attention_layernorm: np.ndarray  # [hidden]
    mlp: MLP


@dataclass(frozen=True)
class MTP:
    """The multi-token prediction head: one more attention layer that guesses the token after the next."""

    pre_fc_norm_embedding: np.ndarray  # [hidden]
    pre_fc_norm_hidden: np.ndarray  # [hidden]
    fc: np.ndarray  # [hidden, 2 * hidden] columns: embedding, hidden
    layer: Layer
    norm: np.ndarray  # [hidden]


@dataclass(frozen=True)
class Parameters:
    shape: Shape
    embed_tokens: np.ndarray  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: np.ndarray  # [hidden]
    lm_head: np.ndarray  # [vocab, hidden]; the same array as embed_tokens if the head is tied
    mtp: MTP | None

    @classmethod
    def load(cls, weights: Mapping[str, StoredTensor], shape: Shape, mtp: bool = True) -> Parameters:
        """Widen every tensor to float32, once.

        Args:
            weights: checked against `shape` already; names such as `layers.0.mlp.up_proj.weight`, `lm_head.weight`
                (absent if tied), `mtp.fc.weight`.
            mtp: also take the MTP head, if the model has one.
        """

        def get(name: str) -> np.ndarray:
            return weights[name].float32()

        def layer(prefix: str, linear: bool) -> Layer:
            return Layer(
                input_layernorm=get(f"{prefix}.input_layernorm.weight"),
                mixer=linear_attention(f"{prefix}.linear_attn") if linear else attention(f"{prefix}.self_attn"),
                post_attention_layernorm=get(f"{prefix}.post_attention_layernorm.weight"),
                mlp=MLP(*(get(f"{prefix}.mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj"))),
            )

        def linear_attention(prefix: str) -> LinearAttention:
            return LinearAttention(
                in_proj_qkv=get(f"{prefix}.in_proj_qkv.weight"),
                in_proj_z=get(f"{prefix}.in_proj_z.weight"),
                in_proj_b=get(f"{prefix}.in_proj_b.weight"),
                in_proj_a=get(f"{prefix}.in_proj_a.weight"),
                conv1d=get(f"{prefix}.conv1d.weight").reshape(shape.conv_dim, shape.conv_kernel),
                A_log=get(f"{prefix}.A_log"),
                dt_bias=get(f"{prefix}.dt_bias"),
                norm=get(f"{prefix}.norm.weight"),
                out_proj=get(f"{prefix}.out_proj.weight"),
            )

        def attention(prefix: str) -> Attention:
            names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
            return Attention(*(get(f"{prefix}.{name}.weight") for name in names))

        embed_tokens = get("embed_tokens.weight")
        return cls(
            shape=shape,
            embed_tokens=embed_tokens,
            layers=tuple(layer(f"layers.{i}", kind == LINEAR) for i, kind in enumerate(shape.layer_types)),
            norm=get("norm.weight"),
            lm_head=embed_tokens if shape.tied else get("lm_head.weight"),
            mtp=MTP(
                pre_fc_norm_embedding=get("mtp.pre_fc_norm_embedding.weight"),
                pre_fc_norm_hidden=get("mtp.pre_fc_norm_hidden.weight"),
                fc=get("mtp.fc.weight"),
                layer=layer("mtp.layers.0", linear=False),
                norm=get("mtp.norm.weight"),
            )
            if mtp and shape.mtp_layers
            else None,
        )


def parameter_count(shape: Shape, mtp: bool = True) -> int:
    """How many numbers `Parameters.load` makes."""
    mlp = 3 * shape.hidden * shape.intermediate
    norms = 2 * shape.hidden
    linear = (
        shape.hidden * (shape.conv_dim + shape.value_dim + 2 * shape.value_heads)  # in_proj_*
        + shape.conv_dim * shape.conv_kernel
        + 2 * shape.value_heads  # A_log, dt_bias
        + shape.value_head_dim
        + shape.hidden * shape.value_dim  # out_proj
    )
    full = shape.hidden * (2 * shape.query_dim + 2 * shape.kv_dim + shape.query_dim) + 2 * shape.head_dim
    count = shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.hidden
    count += shape.linear_layers * linear + shape.full_layers * full + shape.layers * (mlp + norms)
    if mtp:
        count += shape.mtp_layers * (2 * shape.hidden**2 + 3 * shape.hidden + full + mlp + norms)
    return count
