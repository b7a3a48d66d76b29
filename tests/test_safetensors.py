"""One file: exact values, no copies, and a clear word for every kind of damage."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onekernel.checkpoint import safetensors
from onekernel.checkpoint.safetensors import read_safetensors
from onekernel.errors import CheckpointError, OnekernelError, UnsupportedModel

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_every_value_of_every_dtype_is_exact(path: Path) -> None:
    """Written by the reference implementation; all 65,536 numbers of 16 bits, and float32 of every exponent."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensors = {
        "bf16": bits.view(torch.bfloat16).reshape(256, 256),
        "f16": bits.clone().view(torch.float16).reshape(4, 128, 128),
        "f32": (torch.arange(2**16, dtype=torch.int32) * 65521).view(torch.float32),
        "one": torch.tensor([1.5], dtype=torch.bfloat16),
        "none": torch.empty(0, 7),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        ours = found[name].float32()
        assert ours.dtype == np.float32
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, expected.float().numpy(), err_msg=name)
        assert found[name].shape == tuple(expected.shape)
        assert found[name].nbytes == expected.nbytes
    assert found["bf16"].data.dtype == np.uint16
    assert found["bf16"].dtype == "BF16"


def test_values_are_widened_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000, 3).to(torch.bfloat16)
    save_file({"a": values}, path)
    monkeypatch.setattr(safetensors, "WIDENED_AT_ONCE", 64)
    np.testing.assert_array_equal(read_safetensors(path)["a"].float32(), values.float().numpy())


def test_reading_copies_nothing(path: Path) -> None:
    size = 2**26
    write(path, {"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}, b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    tracemalloc.start()
    try:
        tensor = read_safetensors(path)["a"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.reset_peak()
        wide = tensor.float32()
        # The result and bounded scratch: no second copy of the tensor.
        assert tracemalloc.get_traced_memory()[1] < wide.nbytes + 3 * 4 * safetensors.WIDENED_AT_ONCE
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0] = 1


def test_a_header_of_any_length_is_read(path: Path) -> None:
    """The data need not begin at a multiple of their size."""
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    for spaces in range(9):
        text = json.dumps(GOOD).encode() + b" " * spaces
        found = read_safetensors(write(path, text, values.tobytes()))
        np.testing.assert_array_equal(found["a"].float32(), values)


def entry(**fields: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **fields}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"garbage", "has a header that is not JSON"),
        (b"\xff" * 30, "has a header that is not JSON"),
        (b"", "has a header that is not JSON"),
        (b"[" * 100_000, "has a header that is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has a header that is not JSON"),
        (b'{"a": {}, "a": {}}', "has a header that is not JSON.*'a' stands in it twice"),
        ([1], "has a header that is not a JSON object"),
        ({"a": 3}, "has a header entry for a that is not an object"),
        (entry(shape=None), "gives a the shape None"),
        (entry(shape=[2, -3]), r"gives a the shape \[2, -3\]"),
        (entry(shape=[2, 3.0]), r"gives a the shape \[2, 3.0\]"),
        (entry(shape=[2, True]), r"gives a the shape \[2, True\]"),
        (entry(data_offsets=[0]), r"gives a the data_offsets \[0\]"),
        (entry(data_offsets=[0, "24"]), "gives a the data_offsets"),
        (entry(data_offsets=[24, 0]), r"gives a of shape \[2, 3\] and dtype F32 a range of -24 bytes"),
        (entry(data_offsets=[0, 20]), "gives a .* a range of 20 bytes"),
        (entry(shape=[2**40, 2**40]), "gives a .* a range of 24 bytes"),
        ({**GOOD, "b": GOOD["a"]}, r"has overlapping tensors \(at b\)"),
        (entry(data_offsets=[4, 28]), r"has a hole \(at a\)"),
    ],
)
def test_a_damaged_header_is_described(path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {message}.*delete the file and download it again"):
        read_safetensors(write(path, header))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "U8", None, ["F32"], {}])
def test_another_dtype_is_told_what_is_read(path: Path, dtype: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"a is stored as .*; onekernel reads BF16, F16 and F32"):
        read_safetensors(write(path, entry(dtype=dtype)))


def test_a_file_of_the_wrong_length_says_how_many_bytes_are_missing(path: Path) -> None:
    whole = write(path, GOOD).read_bytes()
    for missing in range(1, 25):
        path.write_bytes(whole[:-missing])
        with pytest.raises(CheckpointError, match=f"truncated: {len(whole)} bytes expected, {len(whole) - missing}"):
            read_safetensors(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match=f"is too long: {len(whole)} bytes expected, {len(whole) + 4} found"):
        read_safetensors(path)
    for length in range(8):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"has only {length} bytes"):
            read_safetensors(path)


@pytest.mark.parametrize("length", [100, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_described(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=f"says that its header has {length} bytes, but only 2 bytes follow"):
        read_safetensors(path)


def test_a_header_beyond_all_reason_is_not_read(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40))
    with path.open("r+b") as file:
        file.truncate(2**41)  # sparse
    with pytest.raises(CheckpointError, match=f"its header has {2**40} bytes, more than any real one"):
        read_safetensors(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read \(No such file"):
        read_safetensors(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_safetensors(tmp_path)


EDITS = st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 300), st.integers(0, 255)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS)
def test_any_damage_is_an_error_of_ours_or_harmless(path: Path, edits: list[tuple[str, int, int]]) -> None:
    """Never another kind of exception, never a tensor that is not as large as its shape says."""
    header = {**GOOD, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}
    content = bytearray(write(path, header, bytes(32)).read_bytes())
    for edit, at, byte in edits:
        at = min(at, len(content) - 1)
        content[at : at + (edit != "insert")] = b"" if edit == "cut" else bytes([byte])
    path.write_bytes(content)
    try:
        found = read_safetensors(path)
    except OnekernelError:
        return
    for tensor in found.values():
        assert tensor.float32().shape == tensor.data.shape == tensor.shape
