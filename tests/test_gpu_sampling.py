"""What passes between the host and the sampling of the kernel: arguments down, log-probabilities up."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from onekernel.gpu.sampling import CONSTANTS, RECORD_WORDS, SEEN, SamplingArguments, _bias, _counts, is_plain, reported
from onekernel.gpu.source import assemble
from onekernel.gpu.structure import ctypes_fields, source_of
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler


def record(logits: np.ndarray, token: int, count: int) -> np.ndarray:
    """As report_logprobs in logprobs.cuh writes it."""
    words = np.zeros(RECORD_WORDS, np.uint64)
    total = np.exp(logits - logits.max()).sum()
    words[:1].view(np.float32)[:] = total, logits.max()
    words[1] = logits[token].view(np.uint32)
    bits = logits.view(np.uint32)
    ordered = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = ordered << np.uint64(32) | (0xFFFFFFFF - np.arange(len(logits), dtype=np.uint64))
    largest = np.sort(keys)[::-1][:count]
    words[2 : 2 + len(largest)] = largest
    return words


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_reported_is_what_the_reference_reports(count: int) -> None:
    random = np.random.default_rng(count)
    for size in (3, 50):
        logits = random.integers(-9, 9, size).astype(np.float32) / 2  # ties, zeros, both signs
        expected = Sampler(SamplingParams(temperature=1, seed=1, logprobs=count), size).choose(logits, 7)
        got = reported(record(logits, expected.id, count), count, expected.id)
        assert got.id == expected.id
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-6)
        assert [i for i, _ in got.top_logprobs] == [i for i, _ in expected.top_logprobs]
        assert [p for _, p in got.top_logprobs] == pytest.approx([p for _, p in expected.top_logprobs], abs=1e-6)


def test_counts_hold_what_was_generated_and_seen() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1.1), 10, prompt=[1, 1, 2])
    for token in (2, 2, 5):
        sampler.record(token)
    assert _counts(sampler, 16).tolist() == [0, SEEN, SEEN + 2, 0, 0, SEEN + 1, *[0] * 10]  # type: ignore[union-attr]
    assert _counts(Sampler(SamplingParams(logit_bias={1: 1}), 10), 16) is None


def test_bias_is_a_row_of_floats() -> None:
    bias = _bias(SamplingParams(logit_bias={3: -math.inf, 4: 0.1}), 8)
    assert bias is not None
    assert bias.tolist() == [0, 0, 0, -math.inf, np.float32(0.1), 0, 0, 0]
    assert _bias(SamplingParams(), 8) is None


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1, "seed": 1},
        {"logprobs": 0},
        {"logit_bias": {1: 2}},
        {"presence_penalty": 1},
        {"frequency_penalty": -1},
        {"repetition_penalty": 2},
    ],
)
def test_what_is_not_plain(params: dict[str, object]) -> None:
    """The plain path looks at none of these: each must lead away from it."""
    assert not is_plain(SamplingParams(**params))  # type: ignore[arg-type]
    assert is_plain(SamplingParams(top_k=3, top_p=0.5, min_p=0.1, seed=5))  # without effect on the highest logit


def test_a_structure_is_the_same_on_both_sides() -> None:
    class Inner(ctypes.Structure):
        _FIELDS_IN_C = (("double", "x"), ("int", "n"))
        _fields_ = ctypes_fields(_FIELDS_IN_C)

    class Outer(ctypes.Structure):
        _FIELDS_IN_C = (("const int*", "data"), ("int", "stops[3]"), ("Inner", "inner"), ("float", "y"))
        _fields_ = ctypes_fields(_FIELDS_IN_C, Inner)

    assert ctypes.sizeof(Outer) == 8 + 12 + 4 + 16 + 8
    assert "int stops[3];" in source_of(Outer)
    assert "sizeof(Outer) == 48" in source_of(Outer)
    with pytest.raises(KeyError):
        ctypes_fields([("long", "z")])


def test_constants_reach_the_kernel_bit_for_bit() -> None:
    """A decimal that a compiler reads must give back the float32 of elementary.py."""
    source = assemble("sampling/elementary.cuh", CONSTANTS, source_of(SamplingArguments))
    for name in ("EXP_TERMS", "LOG_TERMS"):
        text = source.split(f"{name}[] = {{")[1].split("}")[0]
        assert [np.float32(part.strip().removesuffix("f")) for part in text.split(",")] == list(CONSTANTS[name])  # type: ignore[arg-type]
