"""A small random checkpoint with two value heads per key head and an LM head of its own, for the benchmark tests."""

from __future__ import annotations

from pathlib import Path

from onekernel.checkpoint.random_weights import Size, config, write_random

TOKENS = 8192  # no padding rows: engines that do not know of them choose the same tokens


def write_small(folder: Path) -> Path:
    size = Size(hidden=256, intermediate=512, layers=4, heads=4, kv_heads=2, value_heads=4, tied=False)
    write_random(folder, {**config(size), "vocab_size": 8192, "linear_num_key_heads": 2, "eos_token_id": 3000}, TOKENS)
    return folder
