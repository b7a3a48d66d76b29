"""The scheduler: fairness, cancellation, prefixes read once, limits, and the end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import WatchedBackend

from onekernel.engine import Engine
from onekernel.errors import BackendError, InvalidRequest
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.scheduler import Interruption, QueueFull, Request, Scheduler, ShuttingDown, Ticket

SLICE_TOKENS = 8  # of a request, that others may have to wait for


class Reader:
    """Waits for a ticket and gathers its tokens."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self._news = threading.Event()
        self.tokens: list[SampledToken] = []
        self.ticket: Ticket = scheduler.submit(request, self._news.set)

    def read(self, count: int | None = None) -> list[int]:
        """All tokens, or the first ones."""
        while count is None or len(self.tokens) < count:
            assert self._news.wait(20), "nothing comes"
            self._news.clear()
            ended = self.ticket.finish_reason is not None
            self.tokens += self.ticket.take()
            if ended:
                break
        return [token.id for token in self.tokens][:count]


@contextmanager
def running(
    scheduler_options: dict[str, Any] | None = None, **backend: Any
) -> Iterator[tuple[Scheduler, WatchedBackend]]:
    fake = WatchedBackend(**backend)
    scheduler = Scheduler(Engine(fake), **(scheduler_options or {}))
    try:
        yield scheduler, fake
    finally:
        scheduler.close()


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    """What the fake backend makes of a prompt on its own."""
    session = Engine(WatchedBackend()).new_session()
    session.extend(prompt)
    return [token.id for token in session.generate(max_tokens=count)]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_many_requests_at_once_get_the_tokens_they_would_get_alone(runs_ahead: bool) -> None:
    with running({"most_running": 7}, runs_ahead=runs_ahead) as (scheduler, _):
        prompts = [tuple(range(i, i + 1 + i % 5)) for i in range(40)]
        readers = [Reader(scheduler, Request(prompt, max_tokens=5 + i)) for i, prompt in enumerate(prompts)]
        for i, reader in enumerate(readers):
            assert reader.read() == expected(prompts[i], 5 + i)
            assert reader.ticket.finish_reason == "length"


def test_rounds_change_nothing_about_sampling_and_penalties() -> None:
    sampling = SamplingParams(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.3, seed=11, top_k=50)
    flat: Callable[..., int] = lambda tokens, _: 0  # noqa: E731
    alone = Engine(WatchedBackend(next_token=flat)).new_session()
    alone.extend((1, 2, 3))
    whole = [token.id for token in alone.generate(sampling, 60)]
    with running(next_token=flat) as (scheduler, _):
        readers = [Reader(scheduler, Request((1, 2, 3), sampling, 60)) for _ in range(3)]
        for reader in readers:
            assert reader.read() == whole


def test_time_is_shared_fairly() -> None:
    """Jain's index of what each had when the first one was done."""
    with running(delay=0.0005) as (scheduler, _):
        readers = [Reader(scheduler, Request((i,), max_tokens=100)) for i in range(20)]
        readers[0].read()
        counts = []
        for reader in readers:
            reader.tokens += reader.ticket.take()
            counts.append(len(reader.tokens))
    fairness = sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))
    assert fairness > 0.97, counts
    assert min(counts) > 50, counts


def test_a_newcomer_waits_for_a_slice_of_each_other_and_no_longer() -> None:
    with running(delay=0.001) as (scheduler, _):
        old = [Reader(scheduler, Request((i,), max_tokens=2000)) for i in range(3)]
        for reader in old:
            reader.read(20)
        before = sum(len(reader.tokens) + len(reader.ticket._fresh) for reader in old)
        Reader(scheduler, Request((9,), max_tokens=5)).read(1)
        after = sum(len(reader.tokens) + len(reader.ticket._fresh) for reader in old)
        assert after - before <= 5 * SLICE_TOKENS
        for reader in old:
            reader.ticket.cancel()


def test_a_long_prompt_does_not_stop_the_others() -> None:
    with running({"most_running": 2}, max_context=100_000, delay=0.001) as (scheduler, _):
        talker = Reader(scheduler, Request((1,), max_tokens=3000))
        talker.read(10)
        long = Reader(scheduler, Request(tuple(i % 250 for i in range(80_000)), max_tokens=1))
        before = len(talker.tokens)
        long.read()
        talker.tokens += talker.ticket.take()
        assert len(talker.tokens) - before > 30
        talker.ticket.cancel()


def test_cancelling_ends_a_request_within_a_slice() -> None:
    with running(delay=0.002) as (scheduler, fake):
        reader, other = (Reader(scheduler, Request((i,), max_tokens=2000)) for i in range(2))
        reader.read(5)
        other.read(5)
        reader.ticket.cancel()
        had = fake.consumed_in_all
        reader.read()
        assert reader.ticket.finish_reason == "cancelled"
        assert fake.consumed_in_all - had <= 2 * SLICE_TOKENS
        other.ticket.cancel()


def test_a_request_cancelled_in_the_queue_never_runs() -> None:
    with running({"most_running": 1}, delay=0.002) as (scheduler, fake):
        first = Reader(scheduler, Request((1,), max_tokens=100))
        second = Reader(scheduler, Request((2, 2, 2), max_tokens=100))
        second.ticket.cancel()
        assert second.read() == []
        assert second.ticket.started_at is None
        first.ticket.cancel()
        first.read()
        assert scheduler.waiting == 0
        assert fake.calls.count("new_state") == 1


def test_only_new_tokens_of_a_conversation_are_read() -> None:
    with running() as (scheduler, fake):
        first_prompt = tuple(range(200))
        first = Reader(scheduler, Request(first_prompt, max_tokens=40))
        answer = first.read()
        wait_idle(scheduler)
        had = fake.consumed_in_all
        question = tuple(range(100, 150))
        second = Reader(scheduler, Request((*first_prompt, *answer, *question), max_tokens=1))
        assert second.read() == expected((*first_prompt, *answer, *question), 1)
        # The last token of the answer was never consumed, and the new token is not.
        assert fake.consumed_in_all - had == 1 + len(question)
        assert scheduler.prefilled == len(first_prompt) + len(question)
        assert second.ticket.cached_tokens == len(first_prompt) + len(answer)


def test_a_prefix_is_kept_at_the_boundaries_of_the_request() -> None:
    """An answer that is rendered differently the next time: what stood before it need not be read again."""
    with running() as (scheduler, fake):
        history, opening = tuple(range(150)), (7, 8, 9)
        Reader(scheduler, Request((*history, *opening), max_tokens=60, boundaries=(150,))).read()
        wait_idle(scheduler)
        had = fake.consumed_in_all
        rewritten = tuple(range(200, 240))
        second = Reader(scheduler, Request((*history, *rewritten), max_tokens=1))
        assert second.read() == expected((*history, *rewritten), 1)
        assert second.ticket.cached_tokens == 150
        assert fake.consumed_in_all - had == 1 + len(rewritten)


def test_where_two_prompts_part_the_third_begins() -> None:
    with running() as (scheduler, _):
        shared = tuple(i % 200 for i in range(1000))
        cached = []
        for i in range(3):
            reader = Reader(scheduler, Request((*shared, *[i] * 50), max_tokens=1))
            assert reader.read() == expected((*shared, *[i] * 50), 1)
            cached.append(reader.ticket.cached_tokens)
            wait_idle(scheduler)
        assert cached == [0, 0, 1000]


def test_the_cache_stays_within_its_bytes() -> None:
    with running() as (scheduler, _):
        budget = scheduler.cache.size(300) * 3
    with running({"cache_bytes": budget}) as (scheduler, _):
        for i in range(20):
            Reader(scheduler, Request((i, *range(200)), max_tokens=50)).read()
            wait_idle(scheduler)
            assert scheduler.cache.used <= budget
        assert 0 < len(scheduler.cache) <= 4
    with running({"cache_bytes": 0}) as (scheduler, _):
        Reader(scheduler, Request(tuple(range(200)), max_tokens=50)).read()
        wait_idle(scheduler)
        assert len(scheduler.cache) == 0


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    with running({"most_running": 2, "most_waiting": 3}, delay=0.002) as (scheduler, _):
        readers = [Reader(scheduler, Request((i,), max_tokens=3000)) for i in range(5)]
        with pytest.raises(QueueFull) as caught:
            Reader(scheduler, Request((9,)))
        assert 1 <= caught.value.retry_after_s <= 60
        assert not scheduler.accepts
        readers[4].ticket.cancel()
        readers[4].read()
        readers.append(Reader(scheduler, Request((9,), max_tokens=3000)))
        for reader in readers:
            reader.ticket.cancel()


def test_closing_lets_answers_end_and_cuts_off_those_that_do_not() -> None:
    fake = WatchedBackend(delay=0.002)
    scheduler = Scheduler(Engine(fake), most_running=2)
    short = Reader(scheduler, Request((1,), max_tokens=30))
    long = Reader(scheduler, Request((2,), max_tokens=3000))
    waiting = Reader(scheduler, Request((3,), max_tokens=3000))
    short.read(3)
    started_at = time.perf_counter()
    closing = threading.Thread(target=scheduler.close, args=(1.0,))
    closing.start()
    assert len(short.read()) == 30
    assert short.ticket.finish_reason == "length"
    with pytest.raises(ShuttingDown):
        scheduler.submit(Request((1,)), lambda: None)
    long.read()
    waiting.read()
    closing.join(10)
    assert long.ticket.finish_reason == waiting.ticket.finish_reason == "cancelled"
    assert 0.9 < time.perf_counter() - started_at < 3


def test_an_idle_scheduler_uses_no_time() -> None:
    with running():
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


def test_an_error_of_one_request_leaves_the_others_alone() -> None:
    class Broken:
        """A constraint that cannot be followed."""

        def allowed(self) -> None:
            raise BackendError("no way")

        def accept(self, token: int) -> None:
            pass

    with running() as (scheduler, _):
        good = Reader(scheduler, Request((1,), max_tokens=50))
        bad = Reader(scheduler, Request((1, 2), max_tokens=50, constraint=Broken()))
        assert bad.read() == []
        assert bad.ticket.finish_reason == "error"
        assert str(bad.ticket.error) == "no way"
        assert good.read() == expected((1,), 50)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_ends_everything_aloud() -> None:
    with running() as (scheduler, fake):
        fake.break_after = 3
        reader = Reader(scheduler, Request((1,), max_tokens=50))
        assert len(reader.read()) == 3
        assert isinstance(reader.ticket.error, BackendError)
        scheduler._thread.join(5)
        assert isinstance(scheduler.failure, RuntimeError)
        with pytest.raises(BackendError, match="start the server again"):
            scheduler.submit(Request((1,)), lambda: None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "prompt is empty"),
        (Request((1,) * 4096), "maximum context length is 4096"),
        (Request((999,)), "token id 999"),
        (Request((1,), max_tokens=0), "max_tokens = 0"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(request_: Request, message: str) -> None:
    with running() as (scheduler, _), pytest.raises(InvalidRequest, match=message):
        scheduler.submit(request_, lambda: None)


def test_the_first_part_is_cut_short_once() -> None:
    counting: Callable[..., int] = lambda tokens, _: len(tokens) % 200  # noqa: E731
    with running(next_token=counting) as (scheduler, _):
        cut = Interruption(end=250, after=10, insert=(250, 251))
        tokens = Reader(scheduler, Request((0,), max_tokens=30, interruption=cut)).read()
    assert tokens == [*range(1, 11), 250, 251, *range(13, 31)]


def test_a_first_part_that_ends_by_itself_is_left_alone() -> None:
    counting: Callable[..., int] = lambda tokens, _: len(tokens) % 200  # noqa: E731
    with running(next_token=counting) as (scheduler, _):
        cut = Interruption(end=5, after=10, insert=(250, 251))
        tokens = Reader(scheduler, Request((0,), max_tokens=30, interruption=cut)).read()
    assert tokens == list(range(1, 31))


def test_no_token_is_lost_between_threads() -> None:
    """A reader that takes while the scheduler pushes."""
    ticket = Ticket(Request((1,)), lambda: None)
    got: list[int] = []

    def read() -> None:
        while len(got) < 20_000:
            got.extend(token.id for token in ticket.take())

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(20_000):
        ticket.push(SampledToken(i))
    thread.join(20)
    assert got == list(range(20_000))


def test_tokens_that_come_faster_than_they_are_read_are_announced_once() -> None:
    announced = itertools.count()
    ticket = Ticket(Request((1,)), lambda: next(announced) and None)
    for i in range(100):
        ticket.push(SampledToken(i))
    assert len(ticket.take()) == 100
    assert next(announced) == 1


def wait_idle(scheduler: Scheduler) -> None:
    """Until the snapshots at the end of requests are taken: they come after the answer."""
    for _ in range(500):
        if scheduler.running == 0 and scheduler.waiting == 0:
            return
        time.sleep(0.002)
    raise AssertionError("still running")
