"""Random checkpoints of true shapes: `random:0.8b` has every dimension of Qwen3.5-0.8B, and weights drawn by a seed.

Speed depends on shapes and not on what a model has learnt, so a benchmark needs no download. The values are scaled
so that activations and logits are of ordinary size and rounding to 16 bits does what it does to a trained model:
weights that are all small or all equal would make every engine look exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.cache import cache_folder
from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE
from onekernel.checkpoint.weights import expected_tensors
from onekernel.errors import InvalidRequest

PREFIX = "random:"
SEED = 0
VERSION = 1  # of the rule that makes the values; part of the folder's name
FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")  # stored as the released checkpoints do


def is_random(name: str) -> bool:
    return name.startswith(PREFIX)


def random_checkpoint(name: str, report: Callable[[str], None] | None = None) -> Path:
    """The folder of a random checkpoint, written to the cache on first use.

    Args:
        name: "random:0.8b", "random:2b", "random:4b", "random:9b" or "random:27b".
        report: called with one line before it is written.

    Raises:
        InvalidRequest: no such size.
    """
    size = name.removeprefix(PREFIX).lower()
    if size not in SIZES:
        raise InvalidRequest(f"checkpoint = {name!r} is unknown: choose one of {', '.join(PREFIX + s for s in SIZES)}")
    folder = cache_folder("checkpoints") / f"random-{size}-v{VERSION}"
    if not (folder / "config.json").is_file():  # written last
        if report is not None:
            report(f"writing the checkpoint {name} to {folder} (once)")
        write_random(folder, config(SIZES[size]), VOCABULARY_SIZE)
    return folder


def config(shape: Shape) -> dict[str, Any]:
    """The `config.json` of a text-only checkpoint of this shape, one of SIZES or a variation of it."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": shape.eos_token_ids[0],
        "full_attention_interval": 4,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": list(shape.layer_types),
        "linear_conv_kernel_dim": shape.conv_kernel,
        "linear_key_head_dim": shape.key_head_dim,
        "linear_num_key_heads": shape.key_heads,
        "linear_num_value_heads": shape.value_heads,
        "linear_value_head_dim": shape.value_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": shape.max_context,
        "mtp_num_hidden_layers": shape.mtp_layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": shape.rotary_dim / shape.head_dim,
            "rope_theta": shape.rope_theta,
            "rope_type": "default",
        },
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def write_random(folder: Path, document: dict[str, Any], tokens: int, seed: int = SEED) -> None:
    """Write a complete checkpoint: weights, a tokenizer of `tokens` tokens, and config.json last."""
    shape = Shape.from_config(document)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"model.safetensors.{os.getpid()}.part"
    try:
        _write_weights(part, shape, seed)
        os.replace(part, folder / "model.safetensors")
    finally:
        part.unlink(missing_ok=True)
    _write_tokenizer(folder, tokens)
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, shape: Shape, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    spans: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, dims in expected_tensors(shape).items():
        wide = name.endswith(FLOAT32)
        nbytes = int(np.prod(dims)) * (4 if wide else 2)
        released = name if name.startswith(("lm_head.", "mtp.")) else f"model.{name}"
        header[released] = {"dtype": "F32" if wide else "BF16", "shape": dims, "data_offsets": [end, end + nbytes]}
        spans[name] = (end, dims)
        end += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(start + end)
    target = np.memmap(path, np.uint8, "r+")

    def fill(name: str) -> None:
        offset, dims = spans[name]
        values = random_tensor(name, dims, shape, seed)
        stored = values if name.endswith(FLOAT32) else to_bfloat16(values)
        target[start + offset : start + offset + stored.nbytes] = stored.reshape(-1).view(np.uint8)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy draws and converts without the GIL
        list(pool.map(fill, spans))
    target.flush()


def random_tensor(name: str, dims: tuple[int, ...], shape: Shape, seed: int) -> np.ndarray:
    """The float32 values of one tensor. They depend on seed, name and dims only, not on the order of drawing."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("A_log"):  # decay rates from 1 to 16, the range that the architecture starts training with
        return np.log(random.uniform(1, 16, dims)).astype(np.float32)
    if name.endswith("dt_bias"):  # softplus(dt_bias) is a step between 0.001 and 0.1: memories from short to long
        step = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), dims))
        return np.log(np.expm1(step)).astype(np.float32)
    values = random.standard_normal(dims, np.float32)
    if "norm" in name:  # those of the delta net scale by w, all others by 1 + w
        return values * np.float32(0.1) + np.float32(1 if name.endswith("linear_attn.norm.weight") else 0)
    if name in ("embed_tokens.weight", "lm_head.weight"):  # logits with a standard deviation of about 2
        scale = 2 / shape.hidden**0.5
    elif name.endswith("conv1d.weight"):
        scale = 0.5
    else:
        scale = dims[1] ** -0.5
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):  # what enters the residual stream
            scale *= (2 * shape.layers) ** -0.5
    values *= np.float32(scale)
    return values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bf16, ties to even, as uint16. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path, tokens: int) -> None:
    """The demo model's tokenizer, filled up with tokens that no text encodes to, so that every id can be decoded."""
    demo = demo_folder()
    document = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    # In the vocabulary too: the library numbers added tokens that are not in it anew, behind all others.
    vocabulary |= {token["content"]: token["id"] for token in document["added_tokens"]}
    taken = set(vocabulary.values())
    vocabulary |= {f"<{i}>": i for i in range(tokens) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / name, folder / name)


def fingerprint(folder: Path) -> str:
    """A hash of config.json and of the names, sizes and first bytes of the weight files: tells checkpoints apart."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return total.hexdigest()
