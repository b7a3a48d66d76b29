"""Weights: all tensors of a checkpoint by canonical name, checked against the shape before any is used.

Canonical names are the released ones without the prefix `model.language_model.` (or `model.`): "embed_tokens.weight",
"layers.3.self_attn.q_proj.weight", "norm.weight", "lm_head.weight", "mtp.fc.weight".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onekernel.checkpoint.safetensors import Tensor, damaged, read_safetensors
from onekernel.checkpoint.shape import FULL, SUPPORTED, Shape
from onekernel.errors import CheckpointError, UnsupportedModel

INDEX = "model.safetensors.index.json"
PREFIXES = ("model.language_model.", "model.")
IGNORED = ("model.visual.", "visual.")  # the vision tower of the released multimodal wrappers
QUANTISED = (".weight_scale_inv", ".weight_scale", ".qweight", ".qzeros", ".weight_packed", ".scales")
LISTED = 10  # tensors named in an error, of each kind


def _attention(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (2 * shape.query_dim, shape.hidden),
        f"{prefix}.self_attn.k_proj.weight": (shape.kv_dim, shape.hidden),
        f"{prefix}.self_attn.v_proj.weight": (shape.kv_dim, shape.hidden),
        f"{prefix}.self_attn.q_norm.weight": (shape.head_dim,),
        f"{prefix}.self_attn.k_norm.weight": (shape.head_dim,),
        f"{prefix}.self_attn.o_proj.weight": (shape.hidden, shape.query_dim),
    }


def _linear_attention(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.linear_attn.in_proj_qkv.weight": (shape.conv_dim, shape.hidden),
        f"{prefix}.linear_attn.in_proj_z.weight": (shape.value_dim, shape.hidden),
        f"{prefix}.linear_attn.in_proj_b.weight": (shape.value_heads, shape.hidden),
        f"{prefix}.linear_attn.in_proj_a.weight": (shape.value_heads, shape.hidden),
        f"{prefix}.linear_attn.conv1d.weight": (shape.conv_dim, 1, shape.conv_kernel),
        f"{prefix}.linear_attn.A_log": (shape.value_heads,),
        f"{prefix}.linear_attn.dt_bias": (shape.value_heads,),
        f"{prefix}.linear_attn.norm.weight": (shape.value_head_dim,),
        f"{prefix}.linear_attn.out_proj.weight": (shape.hidden, shape.value_dim),
    }


def _layer(prefix: str, shape: Shape, kind: str) -> dict[str, tuple[int, ...]]:
    mixer = _attention if kind == FULL else _linear_attention
    return {
        f"{prefix}.input_layernorm.weight": (shape.hidden,),
        **mixer(prefix, shape),
        f"{prefix}.post_attention_layernorm.weight": (shape.hidden,),
        f"{prefix}.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        f"{prefix}.mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        f"{prefix}.mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of a checkpoint, in the order of the forward pass."""
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i, kind in enumerate(shape.layer_types):
        tensors |= _layer(f"layers.{i}", shape, kind)
    tensors["norm.weight"] = (shape.hidden,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    if shape.mtp_layers:
        tensors |= {
            "mtp.pre_fc_norm_embedding.weight": (shape.hidden,),
            "mtp.pre_fc_norm_hidden.weight": (shape.hidden,),
            "mtp.fc.weight": (shape.hidden, 2 * shape.hidden),
            **_layer("mtp.layers.0", shape, FULL),
            "mtp.norm.weight": (shape.hidden,),
        }
    return tensors


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """The tensors of a model by canonical name, as views of the mapped files."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def has_mtp(self) -> bool:
        return "mtp.fc.weight" in self.tensors

    def float32(self, name: str) -> np.ndarray:
        return self.tensors[name].float32()


def load_weights(folder: Path, shape: Shape) -> Weights:
    """Map all weight files of `folder` and check that they hold exactly the model that `shape` describes.

    A tied checkpoint may carry a copy of the head (it is left aside), and one whose config names an MTP layer may lack
    all of its tensors (`has_mtp` is then false).

    Raises:
        CheckpointError: one message that lists all missing, unexpected and wrongly shaped tensors, or names the
            damaged file.
        UnsupportedModel: a quantised checkpoint.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_safetensors(path).items():
            if name.startswith(IGNORED):
                continue
            if name.endswith(QUANTISED):
                raise UnsupportedModel(f"{path}: {name} belongs to a quantised checkpoint: {SUPPORTED}, unquantised")
            name = canonical(name)
            if name in found:
                raise CheckpointError(f"{folder}: {name} stands in more than one file; download the model again")
            found[name] = tensor
    expected = expected_tensors(shape)
    if shape.tied:
        found.pop("lm_head.weight", None)
    if not any(name.startswith("mtp.") for name in found):
        expected = {name: dims for name, dims in expected.items() if not name.startswith("mtp.")}

    missing = [f"{name} {dims}" for name, dims in expected.items() if name not in found]
    unexpected = [f"{name} {tensor.shape}" for name, tensor in found.items() if name not in expected]
    misshapen = [
        f"{name} is {found[name].shape}, config.json asks for {dims}"
        for name, dims in expected.items()
        if name in found and found[name].shape != dims
    ]
    problems = [
        f"{len(names)} {kind}: {'; '.join(names[:LISTED])}{' ...' if len(names) > LISTED else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the tensors in {folder} are not those of its config.json: {'. '.join(problems)}")
    return Weights({name: found[name] for name in expected})


def canonical(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those that the index names, or the only one there.

    Raises:
        CheckpointError: there is none, the index is damaged, or a file that it names is missing.
    """
    index = folder / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise damaged(index, "is not a valid index") from None
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if strange:
            raise damaged(index, f"names files outside its folder ({strange[0]!r})")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {', '.join(absent)}, which its index names; download the model again"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors file: is this the folder of a model in Hugging Face format?"
        )
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} *.safetensors files but no {INDEX}; download the model again")
    return files
