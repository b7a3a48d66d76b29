"""Bytes and FLOPs against numbers that were counted by hand from the released checkpoints."""

from __future__ import annotations

import pytest

from onekernel.bench.ceiling import (
    decode_bytes,
    decode_ceiling,
    decode_flops,
    matrix_parameters,
    prefill_ceiling,
    prefill_flops,
)
from onekernel.checkpoint.random_weights import config
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES
from onekernel.checkpoint.weights import expected_tensors

SMALL = Shape.from_config(config(SIZES["0.8b"]))


def test_the_bytes_of_the_08b_model() -> None:
    counted = decode_bytes(SMALL, 32_768)
    assert counted.weights == 1_504_786_048  # all text weights in bf16
    assert counted.state == 2 * 18_874_368 + 2 * 663_552  # 18 MiB of states and the conv windows, read and written
    assert counted.cache == 12_288 * 32_769  # 12,288 bytes a token


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.8b", 752_393_024),
        ("2b", 1_881_825_088),
        ("4b", 4_205_751_296),
        ("9b", 8_953_803_264),
        ("27b", 26_895_998_464),
    ],
)
def test_random_shapes_have_the_released_parameter_counts(size: str, parameters: int) -> None:
    shape = Shape.from_config(config(SIZES[size]))
    total = 0
    for dims in expected_tensors(shape).values():
        count = 1
        for dim in dims:
            count *= dim
        total += count
    assert total == parameters
    unread = 0 if shape.tied else shape.vocab * shape.hidden  # of an untied embedding one row is read
    assert decode_bytes(shape, 0).weights == 2 * (parameters - unread)


def test_matrices_are_counted_as_the_checkpoint_lists_them() -> None:
    for size in SIZES.values():
        shape = Shape.from_config(config(size))
        listed = sum(
            dims[0] * dims[1]
            for name, dims in expected_tensors(shape).items()
            if len(dims) == 2 and name.startswith("layers.")
        )
        assert matrix_parameters(shape) == listed


def test_flops_of_a_token() -> None:
    assert decode_flops(SMALL, 0) == pytest.approx(2 * 751_894_528 + 33.0e6, rel=1e-3)
    assert decode_flops(SMALL, 1000) - decode_flops(SMALL, 0) == 49_152 * 1000


def test_flops_of_a_prompt() -> None:
    per_token = 0.995e9 + 47.2e6 + 24_576 * 520
    assert prefill_flops(SMALL, 520) == pytest.approx(520 * per_token + 2 * 254_279_680, rel=2e-3)


def test_the_slower_of_reading_and_computing_decides() -> None:
    assert decode_ceiling(SMALL, 0, 4.596e12) == pytest.approx(2977, abs=1)
    assert decode_ceiling(SMALL, 0, 4.596e12, 1e12) == pytest.approx(1e12 / decode_flops(SMALL, 0))
    assert prefill_ceiling(SMALL, 520, 4.596e12, 788e12) == pytest.approx(520 / (prefill_flops(SMALL, 520) / 788e12))
    assert prefill_ceiling(SMALL, 1, 4.596e12, 788e12) == pytest.approx(4.596e12 / 1_504_786_048)


def test_narrow_weights_raise_the_ceiling() -> None:
    assert decode_ceiling(SMALL, 0, 4.596e12, weight_bytes=1) > 1.9 * decode_ceiling(SMALL, 0, 4.596e12)
