"""Every sampling parameter is checked by name, value and type, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SamplingParams

REAL = {
    "temperature": (-0.1, 100.1),
    "top_p": (0, 1.001),
    "min_p": (-0.001, 1),
    "presence_penalty": (-100.1, 100.1),
    "frequency_penalty": (-100.1, 100.1),
    "repetition_penalty": (0.009, 100.1),
}
INTEGRAL = {"top_k": (-1,), "seed": (-1, 2**64), "logprobs": (-1, 21)}


@pytest.mark.parametrize("name", [*REAL, *INTEGRAL])
def test_a_value_out_of_range_or_of_another_type_is_named(name: str) -> None:
    strange = ["1", [1], float("nan"), float("inf"), True, object()]
    if name not in ("seed", "logprobs"):
        strange.append(None)
    if name in INTEGRAL:
        strange.append(1.5)
    for value in (*(REAL | INTEGRAL)[name], *strange):
        with pytest.raises(InvalidRequest, match=f"^{name} = .* must be"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "bias", [{-1: 0}, {1.5: 0}, {"7": 0}, {7: "1"}, {7: 1001}, {7: float("inf")}, {7: float("nan")}, {7: None}]
)
def test_a_wrong_bias_is_named(bias: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^logit_bias\[.*\] = .*: needs a token id"):
        SamplingParams(logit_bias=bias)


def test_a_bias_that_is_no_mapping_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^logit_bias = \[3\] must map token ids to numbers"):
        SamplingParams(logit_bias=[3])  # type: ignore[arg-type]


def test_the_ends_of_the_ranges_and_numbers_of_numpy_are_fine() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=0, presence_penalty=-100, repetition_penalty=0.01, seed=0, logprobs=0)
    SamplingParams(temperature=100, top_k=2**31, frequency_penalty=100, seed=2**64 - 1, logprobs=20)
    SamplingParams(logit_bias={0: -1000, 1: float("-inf"), np.int64(3): np.float32(1)})
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63))  # type: ignore[arg-type]


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams().greedy
    assert SamplingParams(temperature=1e-7).greedy
    assert not SamplingParams(temperature=0.01).greedy
