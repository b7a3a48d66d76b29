"""Write a Qwen3.5 checkpoint as a GGUF file for llama.cpp (architecture `qwen35`), with the `gguf` library.

    python benchmarks/peers/gguf_converter.py FOLDER FILE.gguf [bf16|q8_0|q4_0]

llama.cpp keeps the model somewhat differently, and the converter makes up for it:
- zero-centred norms are stored with the 1 added; the norm inside the delta net is stored as it is;
- A_log is stored as -exp(A_log);
- value heads are ordered so that value head h belongs to key head h modulo the number of key heads, where the
  checkpoint has them grouped (h divided by the value heads per key head);
- vectors, norms and the convolution are float32, matrices bf16 or quantised.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.cache import cache_folder
from onekernel.checkpoint.random_weights import fingerprint
from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import LINEAR, Shape
from onekernel.checkpoint.weights import Weights, load_weights
from onekernel.text.tokenizer import Tokenizer

ARCHITECTURE = "qwen35"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def converted(folder: Path, kind: str) -> Path:
    """The GGUF file of a checkpoint, written to the cache on first use."""
    path = cache_folder("checkpoints") / "gguf" / f"{fingerprint(folder)[:24]}-{kind}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            convert(folder, part, kind)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def convert(folder: Path, path: Path, kind: str = "bf16") -> None:
    """Write `path`. `kind` is the type of the matrices: "bf16", "q8_0" or "q4_0"."""
    import gguf

    shape = Shape.load(folder)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _metadata(writer, shape, folder.name)
    _tokenizer(writer, folder, shape)
    types = gguf.GGMLQuantizationType
    for name, tensor, matrix in tensors(load_weights(folder, shape), shape):
        if not matrix:
            writer.add_tensor(name, np.ascontiguousarray(_wide(tensor)))
        elif kind == "bf16" and isinstance(tensor, Tensor) and tensor.dtype == "BF16":
            rows, columns = tensor.data.shape
            writer.add_tensor(name, tensor.data.view(np.uint8).reshape(rows, 2 * columns), raw_dtype=types.BF16)
        else:
            wanted = types[kind.upper()]
            writer.add_tensor(name, gguf.quants.quantize(_wide(tensor), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: Any, shape: Shape, name: str) -> None:
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.rotary_dim)
    third = shape.rotary_dim // 6  # the interleaved multimodal RoPE: for text any division gives the same angles
    writer.add_rope_dimension_sections([shape.rotary_dim // 2 - 2 * third, third, third, 0])
    writer.add_full_attention_interval(4)
    writer.add_array(f"{ARCHITECTURE}.attention.recurrent_layers", [kind == LINEAR for kind in shape.layer_types])
    writer.add_ssm_conv_kernel(shape.conv_kernel)
    writer.add_ssm_state_size(shape.key_head_dim)
    writer.add_ssm_group_count(shape.key_heads)
    writer.add_ssm_time_step_rank(shape.value_heads)
    writer.add_ssm_inner_size(shape.value_dim)
    writer.add_vocab_size(shape.vocab)


def _tokenizer(writer: Any, folder: Path, shape: Shape) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{i}]" for i in range(shape.vocab)]
    kinds = [UNUSED] * shape.vocab
    for text, i in document["model"]["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for token in document["added_tokens"]:
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ends = sorted(Tokenizer.load(folder).stop_token_ids)
    if ends:
        writer.add_eos_token_id(ends[-1])
    writer.add_add_bos_token(False)


def tensors(weights: Weights, shape: Shape) -> Iterator[tuple[str, Tensor | np.ndarray, bool]]:
    """Name in the file, values, and whether it is a matrix. What needs no change is the stored tensor itself."""
    yield "token_embd.weight", weights["embed_tokens.weight"], True
    yield "output_norm.weight", weights.float32("norm.weight") + 1, False
    if not shape.tied:
        yield "output.weight", weights["lm_head.weight"], True
    for i, kind in enumerate(shape.layer_types):
        source, target = f"layers.{i}.", f"blk.{i}."
        yield f"{target}attn_norm.weight", weights.float32(f"{source}input_layernorm.weight") + 1, False
        norm = f"{source}post_attention_layernorm.weight"
        yield f"{target}post_attention_norm.weight", weights.float32(norm) + 1, False
        for part in ("gate", "up", "down"):
            yield f"{target}ffn_{part}.weight", weights[f"{source}mlp.{part}_proj.weight"], True
        if kind == LINEAR:
            yield from _linear_attention(weights, shape, f"{source}linear_attn.", target)
        else:
            for part, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
                yield f"{target}{name}.weight", weights[f"{source}self_attn.{part}_proj.weight"], True
            for part in ("q", "k"):
                value = weights.float32(f"{source}self_attn.{part}_norm.weight") + 1
                yield f"{target}attn_{part}_norm.weight", value, False


def _linear_attention(
    weights: Weights, shape: Shape, source: str, target: str
) -> Iterator[tuple[str, Tensor | np.ndarray, bool]]:
    heads = head_order(shape)
    dims = (heads[:, None] * shape.value_head_dim + np.arange(shape.value_head_dim)).reshape(-1)
    channels = np.concatenate([np.arange(2 * shape.key_dim), 2 * shape.key_dim + dims])  # only the values move
    yield f"{target}attn_qkv.weight", _take(weights[f"{source}in_proj_qkv.weight"], channels), True
    yield f"{target}attn_gate.weight", _take(weights[f"{source}in_proj_z.weight"], dims), True
    yield f"{target}ssm_beta.weight", _take(weights[f"{source}in_proj_b.weight"], heads), True
    yield f"{target}ssm_alpha.weight", _take(weights[f"{source}in_proj_a.weight"], heads), True
    conv = weights.float32(f"{source}conv1d.weight").reshape(shape.conv_dim, shape.conv_kernel)
    yield f"{target}ssm_conv1d.weight", conv[channels], False
    yield f"{target}ssm_a", -np.exp(weights.float32(f"{source}A_log"))[heads], False
    yield f"{target}ssm_dt.bias", weights.float32(f"{source}dt_bias")[heads], False
    yield f"{target}ssm_norm.weight", weights.float32(f"{source}norm.weight"), False
    yield f"{target}ssm_out.weight", _take(weights[f"{source}out_proj.weight"], dims, columns=True), True


def head_order(shape: Shape) -> np.ndarray:
    """The checkpoint's value head at each place of the file: place j · key_heads + i holds head i · ratio + j."""
    ratio = shape.value_heads_per_key_head
    return np.arange(shape.value_heads).reshape(shape.key_heads, ratio).T.reshape(-1)


def _take(tensor: Tensor, order: np.ndarray, columns: bool = False) -> Tensor:
    """A stored matrix with its rows or columns in another order."""
    if (order == np.arange(len(order))).all():
        return tensor
    data = np.ascontiguousarray(tensor.data[:, order] if columns else tensor.data[order])
    return Tensor(tensor.name, tensor.dtype, tensor.shape, data)


def _wide(tensor: Tensor | np.ndarray) -> np.ndarray:
    return tensor.float32() if isinstance(tensor, Tensor) else tensor.astype(np.float32, copy=False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
