"""Checkpoints for tests: safetensors files written byte by byte, and the released Qwen3.5-0.8B with made-up values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I64": 8}
SOME = 512  # numbers at either end of a tensor that are not zero

Entry = tuple[str, tuple[int, ...]]  # dtype and shape

# The parts of the released config.json that have to do with the model's dimensions.
SMALLEST_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "image_token_id": 248056,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "model_type": "qwen3_5",
        "depth": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "intermediate_size": 3072,
        "out_hidden_size": 1024,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [],
    },
}

# (hidden, intermediate, layers, heads, kv_heads, value_heads, tied) of the released sizes; the rest is as above.
RELEASED_SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "0.8B": (1024, 3584, 24, 8, 2, 16, True),
    "2B": (2048, 6144, 24, 8, 2, 16, True),
    "4B": (2560, 9216, 32, 16, 4, 32, True),
    "9B": (4096, 12288, 32, 16, 4, 32, False),
    "27B": (5120, 17408, 64, 24, 4, 48, False),
}


def released_config(size: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, value_heads, tied = RELEASED_SIZES[size]
    text = {
        **SMALLEST_CONFIG["text_config"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": value_heads,
        "tie_word_embeddings": tied,
    }
    return {**SMALLEST_CONFIG, "tie_word_embeddings": tied, "text_config": text}


def released_tensors() -> dict[str, Entry]:
    """Name -> dtype and shape of all 488 tensors of Qwen3.5-0.8B, vision and MTP included.

    Names and shapes are those of transformers' own class, but for the MTP head, which it does not have: one more
    attention layer and what stands around it.
    """
    with torch.device("meta"):
        theirs = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**SMALLEST_CONFIG))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    attention_layer = "model.language_model.layers.3."
    shapes |= {
        name.replace(attention_layer, "mtp.layers.0."): shape
        for name, shape in shapes.items()
        if name.startswith(attention_layer)
    }
    shapes |= {f"mtp.{name}.weight": (1024,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    shapes["mtp.fc.weight"] = (1024, 2048)
    return {
        name: ("F32" if name.endswith(("A_log", "linear_attn.norm.weight")) else "BF16", shape)
        for name, shape in shapes.items()
    }


def ends(name: str, dtype: str, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What stands in a tensor: at both ends random numbers, as they are stored, and zeros in between.

    The zeros are holes in the file, so a file of the true size takes next to no room, and a wrong offset would be seen.
    """
    count = min(SOME, math.prod(shape) // 2)
    values = np.random.default_rng(list(name.encode())).standard_normal(2 * count, np.float32) / 64
    stored = (values.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else values.astype("<f4")
    return stored[:count], stored[count:]


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEM_SIZES[dtype]


def header_of(tensors: Mapping[str, Entry]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def write_safetensors(path: Path, tensors: Mapping[str, Entry]) -> None:
    """A sparse file; the values are those of `ends`."""
    header = header_of(tensors)
    offset = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (dtype, shape) in tensors.items():
            first, last = (part.tobytes() for part in ends(name, dtype, shape))
            file.seek(offset)
            file.write(first)
            offset += nbytes_of(dtype, shape)
            file.seek(offset - len(last))
            file.write(last)
        file.truncate(offset)


def write_sharded(folder: Path, tensors: Mapping[str, Entry], shards: int) -> None:
    """Tensors dealt out in order to `shards` files of about the same size, and the index."""
    total = sum(nbytes_of(*entry) for entry in tensors.values())
    parts: list[dict[str, Entry]] = [{} for _ in range(shards)]
    done = 0
    for name, entry in tensors.items():
        parts[done * shards // total][name] = entry
        done += nbytes_of(*entry)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model.safetensors-{number:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
