"""Continuous batching: who joins, leaves and waits changes no token; long runs, short stalls; memory that runs out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fakes import WatchedBackend
from test_scheduler import Reader, running, wait_idle

from onekernel.backend.fake import FakeState
from onekernel.engine import Engine
from onekernel.errors import NotEnoughMemory
from onekernel.sampling.params import SamplingParams
from onekernel.scheduler import Interruption, Request, Scheduler
from onekernel.scheduler.rounds import DECODE_S, LONG_STEPS, PREFILL_S


def mixed(tokens: Sequence[int], vocabulary: int) -> int:
    """Unlike the default of the fake backend it does not come to rest."""
    value = 17
    for token in tokens:
        value = (value * 31 + token * 7 + 3) % 65521
    return value % vocabulary


class FromAList:
    """A constraint: the tokens of one residue."""

    def __init__(self, residue: int) -> None:
        self._residue = residue
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(256) % 5 == self._residue

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def alone(request: Request) -> list[int]:
    """What the request gets with the engine to itself, without a scheduler."""
    session = Engine(WatchedBackend(next_token=mixed)).new_session()
    session.extend(request.prompt)
    constraint = None if request.constraint is None else FromAList(request.constraint._residue)  # type: ignore[attr-defined]
    stream = session.stream(request.sampling, request.max_tokens, request.stop_tokens, constraint)
    return [token.id for token in stream]


def random_request(rng: random.Random, shared: Sequence[int]) -> Request:
    prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 20, 200]))]
    if rng.random() < 0.3:
        prompt = [*shared[: rng.randrange(1, len(shared))], *prompt]
    greedy = SamplingParams(seed=rng.randrange(1000))
    sampled = SamplingParams(temperature=4.0, top_k=30, frequency_penalty=0.5, seed=rng.randrange(1000))
    return Request(
        tuple(prompt),
        rng.choice([greedy, sampled]),
        max_tokens=rng.choice([1, 2, 10, 60]),
        stop_tokens=frozenset(rng.sample(range(256), 3)),
        constraint=FromAList(rng.randrange(5)) if rng.random() < 0.15 else None,
        boundaries=(len(prompt) // 2,) if rng.random() < 0.3 else (),
        priority=rng.randrange(3),
    )


@pytest.mark.parametrize("memory", [None, 2000])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_whoever_joins_and_leaves_each_gets_its_own_tokens(runs_ahead: bool, memory: int | None) -> None:
    """Random requests at random moments, some of them given up; with little memory some have to wait parked."""
    rng = random.Random(7)
    shared = [rng.randrange(256) for _ in range(300)]
    options = {"most_running": 9, "most_waiting": 500}
    with running(options, runs_ahead=runs_ahead, memory=memory, next_token=mixed) as (scheduler, _):
        readers: list[tuple[Request, Reader, bool]] = []
        for _ in range(150):
            request = random_request(rng, shared)
            given_up = rng.random() < 0.1
            readers.append((request, Reader(scheduler, request), given_up))
            if given_up:
                readers[-1][1].ticket.cancel()
            if rng.random() < 0.2:
                time.sleep(0.003)
        for request, reader, given_up in readers:
            tokens, wanted = reader.read(), alone(request)
            assert tokens == wanted or (given_up and tokens == wanted[: len(tokens)])
            assert reader.ticket.finish_reason in ("stop", "length") or given_up, reader.ticket.error
        wait_idle(scheduler)
        assert scheduler.parked == 0


def test_when_memory_runs_out_the_newest_waits_and_nothing_fails() -> None:
    # Room for 1,024 tokens; each of the four needs 500 in the end, and they are admitted as if 320 were enough.
    with running({"cache_bytes": 0}, memory=1024, next_token=mixed, delay=0.0002) as (scheduler, fake):
        requests = [Request((i,), max_tokens=500) for i in range(3)]
        readers = [Reader(scheduler, request) for request in requests]
        most_parked = 0
        while any(reader.ticket.finish_reason is None for reader in readers):
            most_parked = max(most_parked, scheduler.parked)
            time.sleep(0.001)
        assert most_parked > 0
        for request, reader in zip(requests, readers, strict=True):
            assert reader.read() == alone(request)
        ends = [reader.ticket.ended_at or 0.0 for reader in readers]
        assert ends == sorted(ends)
        wait_idle(scheduler)
        assert fake.memory_free() == 4 * 1024, "a state was left behind"


def test_what_does_not_fit_stays_in_the_queue_until_something_ends() -> None:
    with running({"cache_bytes": 0}, memory=1024, next_token=mixed, delay=0.001) as (scheduler, _):
        first = Reader(scheduler, Request((1,), max_tokens=150))
        first.read(1)
        second = Reader(scheduler, Request(tuple(range(200)) * 4, max_tokens=200))
        first.read(20)
        assert (scheduler.running, scheduler.waiting) == (1, 1)
        assert first.read() == alone(Request((1,), max_tokens=150))
        assert len(second.read()) == 200
        assert first.ticket.ended_at < second.ticket.started_at


def test_snapshots_make_room_for_requests() -> None:
    with running(memory=1024, next_token=mixed) as (scheduler, _):
        for i in range(4):
            Reader(scheduler, Request((i, *range(150)), max_tokens=20)).read()
            wait_idle(scheduler)
        assert len(scheduler.cache) > 1
        request = Request(tuple(range(250)) * 3, max_tokens=100)
        assert Reader(scheduler, request).read() == alone(request)


def test_a_request_too_large_for_the_memory_alone_gets_the_error() -> None:
    with running({"cache_bytes": 0}, memory=128, next_token=mixed) as (scheduler, _):
        reader = Reader(scheduler, Request(tuple(range(100)), max_tokens=100))
        reader.read()
        assert isinstance(reader.ticket.error, NotEnoughMemory)
        small = Request((1,), max_tokens=10)
        assert Reader(scheduler, small).read() == alone(small)


def test_the_queue_is_served_by_priority_then_by_age() -> None:
    with running({"most_running": 1}, delay=0.001) as (scheduler, _):
        first = Reader(scheduler, Request((1,), max_tokens=50))
        first.read(1)
        order = [1, 0, 1, -1, 0]
        readers = [Reader(scheduler, Request((2,), max_tokens=2, priority=priority)) for priority in order]
        for reader in readers:
            reader.read()
        starts = sorted(range(5), key=lambda i: readers[i].ticket.started_at or 0.0)
        assert starts == [3, 1, 4, 0, 2]


class Runs:
    """Counts the runs of a backend's batches and their steps."""

    def __init__(self, fake: WatchedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        make = fake.batch

        def batch(slots: int) -> Any:
            made = make(slots)
            run = made.run

            def watched(rows: Any, steps: int, interrupted: Callable[[], bool]) -> Any:
                self.steps.append(0)
                for step in run(rows, steps, interrupted):
                    self.steps[-1] += 1
                    yield step

            made.run = watched  # type: ignore[method-assign]
            return made

        monkeypatch.setattr(fake, "batch", batch)


def test_runs_are_long_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = WatchedBackend(next_token=mixed)
    runs = Runs(fake, monkeypatch)
    scheduler = Scheduler(Engine(fake))
    readers = [Reader(scheduler, Request((i,), max_tokens=1500)) for i in range(4)]
    for reader in readers:
        reader.read()
    scheduler.close()
    assert max(runs.steps) == LONG_STEPS
    assert len(runs.steps) < 40


class Timed(WatchedBackend):
    """Takes its time for each token of a prompt, and for each step."""

    def __init__(self, prefill_token_s: float, step_s: float, **options: Any) -> None:
        super().__init__(next_token=mixed, **options)
        self._prefill_token_s, self._step_s = prefill_token_s, step_s

    def _consume(self, state: FakeState, tokens: Sequence[int]) -> np.ndarray:
        time.sleep(self._step_s if len(tokens) == 1 else self._prefill_token_s * len(tokens))
        return super()._consume(state, tokens)


def test_a_long_prompt_stalls_a_stream_for_no_longer_than_a_round() -> None:
    """4,096 tokens that take 0.8 s to read."""
    scheduler = Scheduler(Engine(Timed(0.0002, 0.002, max_context=8192)))
    talker = Reader(scheduler, Request((1,), max_tokens=3000))
    talker.read(10)
    warm = Reader(
        scheduler, Request(tuple(i % 250 for i in range(1500)), max_tokens=1)
    )  # learns how long a token takes
    warm.read()
    long = Reader(scheduler, Request(tuple(i % 251 for i in range(4096)), max_tokens=1))
    times = [time.perf_counter()]
    while long.ticket.finish_reason is None:
        talker.read(len(talker.tokens) + 1)
        times.append(time.perf_counter())
    talker.ticket.cancel()
    scheduler.close()
    gaps = np.diff(times)
    assert len(gaps) > 100, "the stream goes on meanwhile"
    # A part may take longer than was thought (512 tokens are consumed at a time), but not all at once.
    assert gaps.max() < PREFILL_S + DECODE_S + 0.1
    ttft = (long.ticket.first_at or 0.0) - long.ticket.submitted_at
    assert ttft < 3 * 0.8 + 0.5, "half of the time is for the prompt"


def test_a_newcomer_ends_a_long_run() -> None:
    with running(delay=0.001, next_token=mixed) as (scheduler, _):
        old = [Reader(scheduler, Request((i,), max_tokens=2000)) for i in range(2)]
        for reader in old:
            reader.read(200)  # runs are long by now
        newcomer = Reader(scheduler, Request((9,), max_tokens=5))
        newcomer.read()
        assert (newcomer.ticket.first_at or 0.0) - newcomer.ticket.submitted_at < 0.1
        for reader in old:
            reader.ticket.cancel()


def test_readers_hear_of_the_end_before_the_run_is_over() -> None:
    with running(delay=0.002, next_token=mixed) as (scheduler, _):
        long = Reader(scheduler, Request((1,), max_tokens=2000))
        short = Reader(scheduler, Request((2,), max_tokens=40))
        short.read()
        ended_at = time.perf_counter()
        assert ended_at - (short.ticket.ended_at or 0.0) < 0.05
        assert long.ticket.finish_reason is None
        long.ticket.cancel()


def test_the_first_part_is_cut_short_in_company_too() -> None:
    counting: Callable[..., int] = lambda tokens, _: len(tokens) % 200  # noqa: E731
    with running(next_token=counting, delay=0.0005) as (scheduler, _):
        other = Reader(scheduler, Request((3,), max_tokens=2000))
        other.read(5)
        constraint = FromAList(0)
        constraint.allowed = lambda: None  # type: ignore[method-assign,assignment,return-value]
        cut = Interruption(end=250, after=10, insert=(250, 251))
        sampling = SamplingParams(presence_penalty=1.0)
        request = Request((0,), sampling, max_tokens=30, interruption=cut, constraint=constraint)
        tokens = Reader(scheduler, request).read()
        other.ticket.cancel()
    assert tokens == [*range(1, 11), 250, 251, *range(13, 31)]
    assert constraint.accepted == tokens


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_more_ready_requests_than_slots_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = WatchedBackend(next_token=mixed)
    make = fake.batch
    monkeypatch.setattr(fake, "batch", lambda _: make(3))
    scheduler = Scheduler(Engine(fake))
    requests = [Request((i,), max_tokens=300) for i in range(8)]
    readers = [Reader(scheduler, request) for request in requests]
    for request, reader in zip(requests, readers, strict=True):
        assert reader.read() == alone(request)
    scheduler.close()


def test_prompts_are_cut_only_where_the_backend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a prompt leaves does not depend on who else was there."""
    fake = WatchedBackend(next_token=mixed, runs_ahead=True)
    fake.prefill_cut = fake.prefill_chunk = 96
    ends: list[int] = []
    prefill = fake.prefill

    def watched(state: FakeState, tokens: Sequence[int]) -> None:
        prefill(state, tokens)
        ends.append(state.position)

    monkeypatch.setattr(fake, "prefill", watched)
    scheduler = Scheduler(Engine(fake))
    requests = [Request(tuple(range(i, 200)) * 3, max_tokens=30) for i in range(5)]
    readers = [Reader(scheduler, request) for request in requests]
    for request, reader in zip(requests, readers, strict=True):
        assert reader.read() == alone(request)
    scheduler.close()
    wholes = {len(request.prompt) - 1 for request in requests}
    assert wholes <= set(ends)
    assert all(end % 96 == 0 for end in ends if end < min(wholes))
    assert len(ends) > 6 * 5


def test_deterministic_requests_run_as_one_of_many_even_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = WatchedBackend(next_token=mixed)
    runs = Runs(fake, monkeypatch)
    scheduler = Scheduler(Engine(fake), deterministic=True)
    request = Request((1,), max_tokens=400)
    assert Reader(scheduler, request).read() == alone(request)
    scheduler.close()
    assert sum(runs.steps) == 400
    assert "generate" not in fake.calls
