"""Read one safetensors file: an 8-byte length, a JSON header, raw bytes. Tensors are views of the mapped file.

The format is small and NumPy has no bf16, so we read it ourselves: bf16 stays as its bits (uint16), nothing is copied
before it is used, and everything the header says is checked against the file first.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.errors import CheckpointError, UnsupportedModel

LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
ITEM_TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
WIDENED_AT_ONCE = 1 << 22  # elements: bounds the scratch memory of float32()


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: "BF16", "F16" or "F32".
        data: a read-only view of the mapped file; bf16 as uint16 bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def float32(self) -> np.ndarray:
        """A float32 copy with the same values, exactly, in freshly allocated memory."""
        wide = np.empty(self.shape, np.float32)
        source, target = self.data.reshape(-1), wide.reshape(-1)
        for start in range(0, len(source), WIDENED_AT_ONCE):
            part = source[start : start + WIDENED_AT_ONCE]
            if self.dtype == "BF16":  # bf16 is the upper half of a float32
                target[start : start + len(part)] = (part.astype(np.uint32) << 16).view(np.float32)
            else:
                target[start : start + len(part)] = part
        return wide


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map `path` and return its tensors by name, in the order of the header.

    Raises:
        CheckpointError: the file is truncated or its header is not what the format says; names the file and tensor.
        UnsupportedModel: a tensor has a dtype that onekernel does not read (quantised checkpoints).
    """
    size = path.stat().st_size
    if size < 8:
        raise damaged(path, f"has only {size} bytes")
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(size - 8, LONGEST_HEADER):
            raise damaged(path, f"says that its header has {header_size} bytes, but only {size - 8} bytes follow")
        text = file.read(header_size)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(path, f"has a header that is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)

    data_size = size - 8 - header_size
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    end_of_data = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin < end_of_data:
            raise damaged(path, f"has overlapping tensors (at {name})")
        end_of_data = end
    if end_of_data > data_size:
        missing = end_of_data - data_size
        raise damaged(path, f"is truncated: {size + missing} bytes expected, {size} found")
    bytes_of_file = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    tensors = {}
    for name, (begin, end) in spans.items():
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        raw = bytes_of_file[8 + header_size + begin : 8 + header_size + end]
        tensors[name] = Tensor(name, dtype, shape, raw.view(ITEM_TYPES[dtype]).reshape(shape))
    return tensors


def damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} {problem}; delete the file and download it again")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The checked byte range of one header entry, relative to the end of the header."""
    if not isinstance(entry, dict):
        raise damaged(path, f"has a header entry for {name} that is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise damaged(path, f"gives {name} the shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        raise damaged(path, f"gives {name} the data_offsets {offsets!r}")
    if dtype not in ITEM_TYPES:
        raise UnsupportedModel(
            f"{path}: {name} is stored as {dtype}; onekernel reads BF16, F16 and F32: use the unquantised checkpoint"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_TYPES[dtype].itemsize:
        raise damaged(path, f"gives {name} of shape {shape} and dtype {dtype} a range of {end - begin} bytes")
    return begin, end
