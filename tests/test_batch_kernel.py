"""The batch kernel's own source, run on the CPU by tests/emulation: against the float32 reference, and row by row
against the same row alone. Tensor cores add in another order than the emulation does, so bits say nothing about a GPU
here; that they do not depend on the company is a matter of the code alone, and shows here as well."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.gpu.batch_layout import BatchLayout
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from emulation.batch import HostModel
from random_model import random_weights
from small_shape import SMALL

if not shutil.which("g++") or sys.platform == "darwin":
    pytest.skip("needs g++ for x86-64", allow_module_level=True)

VOCABULARY_SIZE = 250
CLEAR = 0.02  # of the standard deviation of the logits: a lead that rounding does not turn around
# Query heads that are no power of two, several stages a row group with a rest, an embedding of its own.
WIDE = dataclasses.replace(SMALL, hidden=512, intermediate=1792, heads=6, kv_heads=1, layer_types=(FULL, LINEAR))
WIDE = dataclasses.replace(WIDE, key_heads=2, value_heads=6, tied=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> HostModel:
    return HostModel(SMALL, random_weights(SMALL), VOCABULARY_SIZE, 4, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> HostModel:
    return HostModel(WIDE, random_weights(WIDE), VOCABULARY_SIZE, 5, tmp_path_factory.mktemp("wide"))


def check_against_reference(shape: Shape, first: int, tokens: list[int]) -> None:
    parameters = Parameters.load(random_weights(shape), shape, mtp=False)
    logits = model.forward(parameters, State.empty(shape), [first, *tokens[:-1]], all_logits=True)[:, :VOCABULARY_SIZE]
    for token, scores in zip(tokens, logits, strict=True):
        assert (scores.max() - scores[token]) / scores.std() < CLEAR


@pytest.mark.parametrize("name", ["small", "wide"])
def test_tokens_are_those_of_the_reference_in_any_company(name: str, request: pytest.FixtureRequest) -> None:
    host: HostModel = request.getfixturevalue(name)
    plan = BatchLayout.plan(host.layout, 8)
    alone = host.row(9)
    tokens = [token.id for token in host.run([alone], 5, plan)[0]]
    check_against_reference(host.shape, 9, tokens)
    more = [(16, 2, 13), (32, 4, 20), (64, 4, 50), (64, 8, 50), (128, 8, 70)] if name == "small" else [(16, 2, 9)]
    for columns, groups, count in more:
        layout = dataclasses.replace(BatchLayout.plan(host.layout, columns), column_groups=groups, ring_stages=6)
        rows = [host.row(i % VOCABULARY_SIZE) for i in range(count)]
        rows[0].max_tokens = 2
        rows[-2] = host.row(9)
        made = host.run(rows, 5, layout)
        assert [token.id for token in made[-2]] == tokens
        assert np.array_equal(rows[-2].state, alone.state)
        assert [len(row) for row in made] == [2, *[5] * (count - 1)]
        check_against_reference(host.shape, 3, [token.id for token in made[3]])


def test_launches_may_be_cut_anywhere_and_stop_tokens_end_a_row(small: HostModel) -> None:
    plan = BatchLayout.plan(small.layout, 8)
    whole, cut, stopped = small.row(5), small.row(5), small.row(5)
    tokens = [token.id for token in small.run([whole], 6, plan)[0]]
    parts = [small.run([cut], 2, plan)[0], small.run([cut], 4, plan)[0]]
    assert [token.id for part in parts for token in part] == tokens
    assert np.array_equal(whole.state, cut.state)
    stopped.stop_tokens = (tokens[2], 249)
    (made,) = small.run([stopped], 6, plan)
    assert [token.id for token in made] == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped.position == len(made)


def test_contexts_of_several_splits(small: HostModel) -> None:
    """70 tokens: the reference must agree where attention is merged from three parts."""
    plan = BatchLayout.plan(small.layout, 8)
    row = small.row(5)
    tokens = [token.id for token in small.run([row, small.row(8)], 70, plan)[0]]
    check_against_reference(SMALL, 5, tokens)


PARAMS = (
    SamplingParams(temperature=0.05, seed=1, logprobs=3),
    SamplingParams(temperature=1.0, seed=2, top_k=20, logprobs=2),
    SamplingParams(temperature=1.5, seed=3, top_p=0.7, logprobs=0),
    SamplingParams(temperature=0.8, seed=4, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.3, logprobs=20),
    SamplingParams(temperature=1.0, seed=5, presence_penalty=0.5, frequency_penalty=0.2, logprobs=1),
    SamplingParams(logprobs=5),
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=2**63 + 5, logit_bias={7: 5.0, 9: -3.0}, logprobs=1),
    SamplingParams(temperature=1.0, seed=6, top_p=0.05, logprobs=1),
    SamplingParams(repetition_penalty=2.0, logprobs=1),
)


def test_sampling_is_that_of_the_sampler(small: HostModel) -> None:
    layout = BatchLayout.plan(small.layout, 16)
    rows = [small.row(10 + i, params) for i, params in enumerate(PARAMS)]
    one_by_one: list[list[int]] = [[] for _ in rows]
    for _ in range(8):
        twins = []
        for row in rows:
            twin = Sampler(row.sampler.params, VOCABULARY_SIZE)
            twin.seen, twin.generated = row.sampler.seen.copy(), row.sampler.generated.copy()
            twins.append(twin)
        for place, (made, row, twin) in enumerate(zip(small.run(rows, 1, layout), rows, twins, strict=True)):
            one_by_one[place].append(made[0].id)
            if row.sampler.params.logprobs is not None:
                expected = twin.choose(row.logits, row.position)
                assert made[0].id == expected.id, row.sampler.params
                assert made[0].logprob == pytest.approx(expected.logprob, abs=1e-5)
                assert [i for i, _ in made[0].top_logprobs] == [i for i, _ in expected.top_logprobs]
    rows = [small.row(10 + i, params) for i, params in enumerate(PARAMS)]
    together = [[token.id for token in made] for made in small.run(rows, 8, layout)]
    assert together == one_by_one
