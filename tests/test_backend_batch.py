"""Batches of the backends: many rows together make what each makes alone, and what befalls one leaves the others be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from test_cpu_backend import NEVER, SHAPE, VOCABULARY, RandomWeights

from onekernel.backend.batch import LoopBatch, Made, Row
from onekernel.backend.cpu import CpuBackend
from onekernel.backend.cuda_batch import CudaBatch
from onekernel.backend.fake import FakeBackend
from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory
from onekernel.reference.parameters import Parameters
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=1, seed=3, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=1.3, seed=4, frequency_penalty=0.5, top_k=20),
)


class EveryThird:
    """A constraint that leaves a third of the tokens."""

    def allowed(self) -> np.ndarray:
        return np.arange(VOCABULARY) % 3 == 0

    def accept(self, token: int) -> None:
        assert token % 3 == 0


class Broken:
    def allowed(self) -> None:
        raise BackendError("no way")

    def accept(self, token: int) -> None:
        pass


def row(backend: Any, prompt: Sequence[int], params: SamplingParams, count: int, constraint: Any = None) -> Row:
    sampler = Sampler(params, backend.vocabulary_size, prompt, constraint)
    return Row(backend.new_state(), prompt, sampler, count)


def run_to_the_end(batch: Any, rows: list[Row], steps: int) -> dict[Row, list[int]]:
    """Again and again with those that have tokens left, each a different number of steps."""
    made: dict[Row, list[int]] = {one: [] for one in rows}
    while left := [one for one in rows if one.max_tokens > len(made[one])]:
        wanted = {one: one.max_tokens for one in left}
        for one in left:
            one.max_tokens -= len(made[one])
        for step in batch.run(left, steps):
            places = [place for place, _ in step]
            assert places == sorted(set(places))
            for place, token in step:
                made[left[place]].append(token.id)
        for one in left:
            one.max_tokens = wanted[one]
            one.tokens = made[one][-1:]
    assert all(one.error is None for one in rows)
    return made


@pytest.fixture(scope="module")
def backend() -> Any:
    return CpuBackend(Parameters.load(RandomWeights(SHAPE), SHAPE), VOCABULARY)


class LastTokenKernel:
    """Stands for the batch kernel of the GPU: one token a row to consume, and the same sampling."""

    slots = 7

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.runs: list[tuple[int, int]] = []
        self.closed = False

    def run(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool]) -> Iterator[Made]:
        self.runs.append((len(rows), steps))
        assert all(one.sampler.constraint is None for one in rows)

        def generate(one: Row, count: int) -> Iterator[Any]:
            return self._backend._generate(one.state, one.tokens[-1:], one.sampler, count, one.stop_tokens)

        return LoopBatch(self.slots, lambda *_: None, generate).run(rows, steps, interrupted)

    def close(self) -> None:
        self.closed = True


def cuda_batch(backend: Any, kernel: Any) -> CudaBatch:
    return CudaBatch(kernel, backend.batch(8), backend._prepare, backend.prefill, 2, backend.max_context)


@pytest.mark.parametrize("kind", ["loop", "whole rows", "cuda"])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_rows_make_what_they_make_alone(backend: Any, kind: str, steps: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(backend), "runs_ahead", kind == "whole rows")
    batch = cuda_batch(backend, LastTokenKernel(backend)) if kind == "cuda" else backend.batch(8)
    prompts = [list(range(i, i + 1 + i % 3)) for i in range(6)]
    rows = [row(backend, prompt, PARAMS[i % 3], 4 + 5 * i) for i, prompt in enumerate(prompts)]
    rows.append(row(backend, [5], PARAMS[1], 9, EveryThird()))
    made = run_to_the_end(batch, rows, steps)
    for i, (one, prompt) in enumerate(zip(rows, [*prompts, [5]], strict=True)):
        params, constraint = (PARAMS[1], EveryThird()) if i == 6 else (PARAMS[i % 3], None)
        alone = backend.generate(backend.new_state(), prompt, [], params, one.max_tokens, NEVER, constraint)
        assert made[one] == [token.id for token in alone]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on() -> None:
    fake = FakeBackend()
    alone = [token.id for token in fake.generate(fake.new_state(), [1], [], SamplingParams(), 20, NEVER)]
    stop = next(i for i in range(1, 20) if alone[i] not in alone[:i])
    rows = [row(fake, [1], SamplingParams(), 20), row(fake, [1], SamplingParams(), 20)]
    rows[0].stop_tokens = frozenset({alone[stop]})
    made: list[list[int]] = [[], []]
    for step in fake.batch(2).run(rows, 20):
        for place, token in step:
            made[place].append(token.id)
    assert made == [alone[: stop + 1], alone]
    assert [one.state.position for one in rows] == [stop + 1, 20]


def test_a_full_state_ends_its_row() -> None:
    fake = FakeBackend(max_context=10)
    rows = [row(fake, list(range(8)), SamplingParams(), 20), row(fake, [1], SamplingParams(), 20)]
    for batch in (fake.batch(2), cuda_batch(fake, LastTokenKernel(fake))):
        counts = [0, 0]
        for step in batch.run(rows, 5):
            for place, _ in step:
                counts[place] += 1
        assert counts[0] == 3
        assert counts[1] in (3, 5)  # the GPU's launch ends where the first state is full
        rows = [row(fake, list(range(8)), SamplingParams(), 20), row(fake, [1], SamplingParams(), 20)]


def test_interrupted_runs_end_after_a_step_and_nothing_is_lost() -> None:
    fake = FakeBackend()
    rows = [row(fake, [i], SamplingParams(), 50) for i in range(3)]
    made = []
    for step in fake.batch(3).run(rows, 50, lambda: len(made) >= 4):
        made.append(step)
    assert len(made) == 4 or len(made) == 5
    assert all(len(step) == 3 for step in made)
    assert all(one.state.position == len(made) for one in rows)


def test_the_error_of_a_row_is_its_own() -> None:
    fake = FakeBackend()
    rows = [row(fake, [1], SamplingParams(), 5), row(fake, [1], SamplingParams(), 5, Broken())]
    made = list(fake.batch(2).run(rows, 5))
    assert [place for step in made for place, _ in step] == [0] * 5
    assert rows[0].error is None
    assert str(rows[1].error) == "no way"


@pytest.mark.parametrize(("tokens", "message"), [([], "is empty"), ([999], "does not exist"), ([1] * 200, "holds 100")])
def test_what_cannot_run_is_refused_before_anything_moves(tokens: list[int], message: str) -> None:
    fake = FakeBackend(max_context=100)
    rows = [row(fake, [1], SamplingParams(), 5), row(fake, [1], SamplingParams(), 5)]
    rows[1].tokens = tokens
    with pytest.raises(InvalidRequest, match=message):
        fake.batch(2).run(rows, 5)
    assert rows[0].state.position == 0


def test_without_room_nothing_moves() -> None:
    fake = FakeBackend(memory=192)
    rows = [row(fake, [i], SamplingParams(), 100) for i in range(2)]
    batch = fake.batch(2)
    assert fake.memory_free() == 4 * 192
    with pytest.raises(NotEnoughMemory, match="no room for 128 tokens: 64 are left"):
        batch.run(rows, 100)
    assert [one.state.position for one in rows] == [0, 0]
    assert len(list(batch.run(rows, 60))) == 60
    with pytest.raises(NotEnoughMemory):  # snapshots take from the same
        fake.snapshot(rows[0].state)
    parked = fake.park(rows[0].state)
    assert fake.memory_free() == 4 * 128
    restored = fake.restore(parked)
    assert (restored.position, fake.memory_free()) == (60, 4 * 64)


@pytest.mark.parametrize("kind", ["cpu", "fake"])
def test_parked_states_go_on_as_if_nothing_had_been(backend: Any, kind: str) -> None:
    backend = FakeBackend() if kind == "fake" else backend
    state, other = backend.new_state(), backend.new_state()
    for one in (state, other):
        backend.prefill(one, [5, 6, 7])
    parked = backend.park(state)
    restored = backend.restore(parked)
    assert restored.position == 3
    np.testing.assert_array_equal(backend.logits(restored, [8, 9]), backend.logits(other, [8, 9]))


def test_the_gpu_gets_constrained_rows_one_token_at_a_time() -> None:
    fake = FakeBackend(VOCABULARY)
    kernel = LastTokenKernel(fake)
    batch = cuda_batch(fake, kernel)
    assert batch.slots == 7
    rows = [row(fake, [1, 2], SamplingParams(), 5), row(fake, [1], SamplingParams(), 5, EveryThird())]
    many_stops = row(fake, [3], SamplingParams(), 5)
    many_stops.stop_tokens = frozenset({1, 2, 4})
    counts = [0, 0, 0]
    for step in batch.run([*rows, many_stops], 5):
        for place, _ in step:
            counts[place] += 1
    assert counts == [1, 1, 1]
    assert kernel.runs == [(1, 1)]
    batch.close()
    assert kernel.closed
