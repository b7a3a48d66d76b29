"""Read one safetensors file: an 8-byte length, a JSON header, raw bytes. Tensors are views of the mapped file.

The format is small and NumPy has no bf16, so we read it ourselves: bf16 stays as its bits (uint16), nothing is copied
before it is used, and everything the header says is checked against the file first.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
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
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise damaged(path, f"has only {size} bytes")
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > size - 8:
                raise damaged(path, f"says that its header has {header_size} bytes, but only {size - 8} bytes follow")
            if header_size > LONGEST_HEADER:
                raise damaged(path, f"says that its header has {header_size} bytes, more than any real one")
            text = file.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # of Unicode, of JSON, of numbers without end, of endless nesting
        raise damaged(path, f"has a header that is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)

    data_size = size - 8 - header_size
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    end_of_data = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end_of_data:  # the format allows neither
            raise damaged(path, f"has {'overlapping tensors' if begin < end_of_data else 'a hole'} (at {name})")
        end_of_data = end
    if end_of_data != data_size:
        what = "is truncated" if end_of_data > data_size else "is too long"
        raise damaged(path, f"{what}: {8 + header_size + end_of_data} bytes expected, {size} found")
    bytes_of_file = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, (begin, end) in spans.items():
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        raw = bytes_of_file[8 + header_size + begin : 8 + header_size + end]
        tensors[name] = Tensor(name, dtype, shape, raw.view(ITEM_TYPES[dtype]).reshape(shape))
    return tensors


def damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} {problem}; delete the file and download it again")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands in it twice, Python would silently take the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} stands in it twice")
    return result


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The checked byte range of one header entry, relative to the end of the header."""
    if not isinstance(entry, dict):
        raise damaged(path, f"has a header entry for {name} that is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise damaged(path, f"gives {name} the shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)):
        raise damaged(path, f"gives {name} the data_offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_TYPES:
        raise UnsupportedModel(
            f"{path}: {name} is stored as {dtype}; onekernel reads BF16, F16 and F32: use the unquantised checkpoint"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_TYPES[dtype].itemsize:
        raise damaged(path, f"gives {name} of shape {shape} and dtype {dtype} a range of {end - begin} bytes")
    return begin, end
