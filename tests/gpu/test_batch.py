"""The batch kernel: every row against the float32 reference, and against the same row alone, bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from batch_errors import check, compare, load
from batch_rows import Row, advance, ids, new_row
from measures import greedy, random_tokens
from random_model import SIZES, VOCABULARY_SIZE, random_weights, shortened
from state_parts import state_bytes

from onekernel.checkpoint.weights import Weights
from onekernel.errors import InvalidRequest, NotEnoughMemory
from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.batch_layout import BUCKETS
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

SHAPE = shortened("0.8b")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(SHAPE)


@pytest.fixture(scope="module")
def batch(gpu: Gpu, weights: Weights) -> Iterator[BatchDecoder]:
    made = BatchDecoder(load(gpu, SHAPE, weights), BUCKETS[-1])
    yield made
    made.close()
    made.decoder.close()


@pytest.mark.parametrize("count", [1, 8, 32, 64])
def test_rows_are_those_of_the_reference(batch: BatchDecoder, weights: Weights, count: int, record_property) -> None:
    lengths = [1, 2, 63, 64, 65, 130, 5, 17][:count] + [9] * (count - 8)
    prompts = [random_tokens(SHAPE, length, seed=i) for i, length in enumerate(lengths)]
    check(compare(batch, weights, prompts, 8, 6), record_property)


@pytest.mark.parametrize("count", [8, 16, 32, 64, 128, 256])
def test_a_row_has_the_same_bits_alone_and_in_company(batch: BatchDecoder, count: int) -> None:
    prompt = random_tokens(SHAPE, 100, seed=77)
    alone = new_row(batch.decoder, prompt)
    expected = [*ids(advance(batch, [alone], 9))[0], *ids(advance(batch, [alone], 11))[0]]
    rows = [new_row(batch.decoder, random_tokens(SHAPE, 1 + i % 5, seed=i)) for i in range(count)]
    place = count * 3 // 4
    rows[place] = new_row(batch.decoder, prompt)
    rows[0].max_tokens = 3
    made = ids(advance(batch, rows, 20))
    assert made[place] == expected
    assert len(made[0]) == 3
    assert state_bytes(batch.decoder, rows[place].state) == state_bytes(batch.decoder, alone.state)


def test_long_contexts_are_split_the_same_for_all(batch: BatchDecoder) -> None:
    prompt = random_tokens(SHAPE, 5000, seed=5)
    alone, other = new_row(batch.decoder, prompt), new_row(batch.decoder, prompt)
    rows = [other, *(new_row(batch.decoder, random_tokens(SHAPE, 300, seed=i)) for i in range(3))]
    assert ids(advance(batch, rows, 5))[0] == ids(advance(batch, [alone], 5))[0]
    assert state_bytes(batch.decoder, other.state) == state_bytes(batch.decoder, alone.state)
    single = new_row(batch.decoder, prompt)
    expected = greedy(batch.decoder, single.state, single.tokens, 5)
    again = new_row(batch.decoder, prompt)
    assert ids(advance(batch, [again], 5))[0][0] == next(expected)


def test_stop_tokens_end_a_row_and_no_other(batch: BatchDecoder) -> None:
    prompts = [random_tokens(SHAPE, 10, seed=i) for i in range(4)]
    free = ids(advance(batch, [new_row(batch.decoder, prompt) for prompt in prompts], 12))
    rows = [new_row(batch.decoder, prompt) for prompt in prompts]
    rows[2].stop_tokens = frozenset([free[2][5], 4095])
    made = ids(advance(batch, rows, 12))
    first = free[2].index(free[2][5])
    assert made[2] == free[2][: first + 1]
    assert [made[i] for i in (0, 1, 3)] == [free[i] for i in (0, 1, 3)]
    assert rows[2].state.position == 9 + first + 1


def test_an_interruption_ends_the_launch_between_steps(batch: BatchDecoder) -> None:
    rows = [new_row(batch.decoder, random_tokens(SHAPE, 10, seed=i)) for i in range(8)]
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    steps = list(batch.run(rows, 250, interrupted))
    assert 3 <= len(steps) < 250
    assert all(row.state.position == 9 + len(steps) for row in rows)
    again = [new_row(batch.decoder, random_tokens(SHAPE, 10, seed=i)) for i in range(8)]
    advance(batch, again, len(steps))
    for row, other in zip(rows, again, strict=True):
        assert state_bytes(batch.decoder, row.state) == state_bytes(batch.decoder, other.state)


PARAMS = (
    SamplingParams(temperature=0.05, seed=1, logprobs=3),
    SamplingParams(temperature=1.0, seed=2, top_k=20, logprobs=2),
    SamplingParams(temperature=1.5, seed=3, top_p=0.7, logprobs=0),
    SamplingParams(temperature=0.8, seed=4, top_k=30, top_p=0.9, min_p=0.02, logprobs=20),
    SamplingParams(
        temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logprobs=1
    ),
    SamplingParams(logprobs=5),
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=2**63 + 5, logit_bias={7: 50.0, 9: -3.0}, logprobs=1),
    SamplingParams(temperature=2.0, seed=6, top_p=0.01, logprobs=1),
    SamplingParams(repetition_penalty=2.0, logprobs=1),
    SamplingParams(temperature=1.0, seed=7, min_p=0.3, logprobs=1),
)


def sampled_rows(decoder: Decoder) -> list[Row]:
    return [new_row(decoder, random_tokens(decoder.shape, 10, seed=i), params) for i, params in enumerate(PARAMS)]


def test_sampling_is_that_of_the_sampler_for_the_same_logits(gpu: Gpu) -> None:
    shape = dataclasses.replace(SIZES["0.8b"], layer_types=SIZES["0.8b"].layer_types[:4])
    decoder = load(gpu, shape, random_weights(shape), VOCABULARY_SIZE)
    batch = BatchDecoder(decoder, 16)
    rows = sampled_rows(decoder)
    by_step: list[list[int]] = [[] for _ in rows]
    for _ in range(3):
        twins = []
        for row in rows:
            twin = Sampler(row.sampler.params, VOCABULARY_SIZE)
            twin.seen, twin.generated = row.sampler.seen.copy(), row.sampler.generated.copy()
            twins.append(twin)
        for place, (tokens, row, twin) in enumerate(zip(advance(batch, rows, 1), rows, twins, strict=True)):
            (token,) = tokens
            by_step[place].append(token.id)
            if row.sampler.params.logprobs is None:
                continue
            logits = batch._sampling[place].logits.read(np.float32, shape.vocab)
            expected = twin.choose(logits, row.state.position)
            assert token.id == expected.id, row.sampler.params
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [i for i, _ in token.top_logprobs] == [i for i, _ in expected.top_logprobs]
    rows = sampled_rows(decoder)
    assert ids(advance(batch, rows, 3)) == by_step  # many steps a launch
    for place in (1, 3, 4):  # alone
        (row,) = [new_row(decoder, random_tokens(shape, 10, seed=place), PARAMS[place])]
        assert ids(advance(batch, [row], 3))[0] == by_step[place]
    batch.close()
    decoder.close()


def test_a_row_without_a_possible_token_fails_alone(batch: BatchDecoder) -> None:
    bias = {token: float("-inf") for token in range(SHAPE.vocab)}
    rows = [new_row(batch.decoder, [1, 2, 3]), new_row(batch.decoder, [1, 2, 3], SamplingParams(logit_bias=bias))]
    made = ids(advance(batch, rows, 3))
    assert len(made[0]) == 3
    assert made[1] == []
    assert isinstance(rows[1].error, InvalidRequest)
    assert rows[0].error is None


def test_too_little_memory_is_said_before_anything_moves(batch: BatchDecoder, monkeypatch) -> None:
    rows = [new_row(batch.decoder, [1, 2, 3]) for _ in range(3)]
    monkeypatch.setattr(Gpu, "memory_free", lambda _: 1234)
    monkeypatch.setattr(batch, "_held", lambda _: 0)
    with pytest.raises(NotEnoughMemory, match=r"a step of 8 sequences needs [\d,]+ more bytes .* and 1,234 are free"):
        batch.run(rows, 3)
    assert [row.state.position for row in rows] == [2, 2, 2]
