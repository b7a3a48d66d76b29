"""A small random checkpoint with two value heads per key head and an LM head of its own, for the benchmark tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onekernel.checkpoint.random_weights import config, write_random
from onekernel.checkpoint.sizes import SIZES

TOKENS = 8192  # no padding rows: engines that do not know of them choose the same tokens


def write_small(folder: Path) -> Path:
    released = SIZES["9b"]  # its LM head is not tied
    dimensions = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "key_heads": 2, "value_heads": 4}
    vocabulary = {"vocab": 8192, "eos_token_ids": (3000,)}
    shape = dataclasses.replace(released, layer_types=released.layer_types[:4], **dimensions, **vocabulary)
    write_random(folder, config(shape), TOKENS)
    return folder
