"""The timeline stays exact whatever happens to a stream: closed early, cancelled, failed, run ahead, interleaved."""

from __future__ import annotations

import threading
import time
from unittest.mock import patch

import numpy as np
import pytest
from fakes import WatchedBackend
from hypothesis import given
from hypothesis import strategies as st

from onekernel.engine import Engine, Session
from onekernel.engine.session import ANCHOR_TOKENS
from onekernel.errors import BackendError, InvalidRequest
from onekernel.sampling.params import SamplingParams

VOCABULARY = 256 + 8  # with the padding of FakeBackend
PROMPT = [3, 1, 4, 1, 5]


def started(backend: WatchedBackend | None = None, tokens: list[int] = PROMPT) -> Session:
    session = Engine(backend or WatchedBackend()).new_session()
    session.extend(tokens)
    return session


def continuation(tokens: list[int], count: int) -> list[int]:
    """What an undisturbed session makes of `tokens`, greedily."""
    return [token.id for token in started(tokens=tokens).generate(max_tokens=count)]


def test_generated_tokens_join_the_timeline() -> None:
    session = started()
    made = [token.id for token in session.generate(max_tokens=6)]
    assert list(session.tokens) == PROMPT + made
    assert len(session) == 11
    assert session.finish_reason == "length"


def test_generation_in_pieces_equals_generation_at_once() -> None:
    session = started()
    pieces = [token.id for count in (1, 2, 5, 1) for token in session.generate(max_tokens=count)]
    assert pieces == continuation(PROMPT, 9)


def test_extension_between_generations_is_consumed() -> None:
    session = started()
    first = [token.id for token in session.generate(max_tokens=3)]
    session.extend([9, 9])
    second = [token.id for token in session.generate(max_tokens=3)]
    assert second == continuation([*PROMPT, *first, 9, 9], 3)


def test_every_token_is_consumed_once() -> None:
    backend = WatchedBackend()
    session = started(backend)
    session.prefill()
    assert backend.consumed_in_all == len(PROMPT) - 1
    session.generate(max_tokens=3)
    session.generate(max_tokens=3)
    assert backend.consumed_in_all == len(PROMPT) + 5


def test_long_prompts_are_prefilled_in_chunks() -> None:
    prompt = [i % 200 for i in range(1700)]
    backend = WatchedBackend()
    made = [token.id for token in started(backend, prompt).generate(max_tokens=2)]
    assert backend.calls.count("prefill") == 3
    assert backend.consumed_in_all == 1701
    small = started(WatchedBackend(), prompt[:1000])
    small.generate(max_tokens=1)
    small.restore(started(WatchedBackend(), prompt).snapshot())
    assert [token.id for token in small.generate(max_tokens=2)] == made


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 5])
def test_closing_early_keeps_exactly_what_was_yielded(taken: int, runs_ahead: bool) -> None:
    session = started(WatchedBackend(runs_ahead=runs_ahead))
    stream = session.stream(max_tokens=20)
    seen = [next(stream).id for _ in range(taken)]
    stream.close()
    assert list(session.tokens) == PROMPT + seen
    assert session.finish_reason == "cancelled"
    rest = [token.id for token in session.generate(max_tokens=5)]
    assert seen + rest == continuation(PROMPT, taken + 5)


def test_closing_early_costs_nothing_unless_the_backend_ran_ahead() -> None:
    backend = WatchedBackend()
    session = started(backend)
    stream = session.stream(max_tokens=20)
    next(stream)
    stream.close()
    session.generate(max_tokens=1)
    assert backend.calls == ["new_state", "generate", "generate"]


def test_a_backend_that_runs_ahead_is_copied_once_in_a_while() -> None:
    """Not at every stream: those may be short, and a copy takes as long as a token."""
    backend = WatchedBackend(runs_ahead=True)
    session = started(backend)
    for _ in range(2 * ANCHOR_TOKENS // 8):
        session.generate(max_tokens=8)
    assert backend.calls.count("snapshot") == 1
    session.generate(max_tokens=8)
    before = backend.consumed_in_all
    stream = session.stream(max_tokens=20)
    next(stream)
    stream.close()
    session.prefill()
    assert backend.calls.count("restore") == 1
    assert backend.consumed_in_all - before < ANCHOR_TOKENS + 20


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_failed_backend_does_not_spoil_the_session(runs_ahead: bool) -> None:
    backend = WatchedBackend(runs_ahead=runs_ahead)
    session = started(backend)
    backend.break_after = 3
    with pytest.raises(RuntimeError, match="broke"):
        session.generate(max_tokens=9)
    backend.break_after = None
    assert list(session.tokens) == PROMPT + continuation(PROMPT, 3)
    assert [token.id for token in session.generate(max_tokens=4)] == continuation(PROMPT, 7)[3:]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.integers(1, 4)),
            st.tuples(st.just("generate"), st.integers(1, 4)),
            st.tuples(st.just("close"), st.integers(1, 4)),
            st.tuples(st.just("snapshot"), st.just(0)),
            st.tuples(st.just("restore"), st.just(0)),
            st.tuples(st.just("prefill"), st.just(0)),
            st.tuples(st.just("logits"), st.just(0)),
        ),
        max_size=12,
    ),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_sequence_of_operations_leaves_an_exact_timeline(
    steps: list[tuple[str, int]], runs_ahead: bool, anchor_tokens: int
) -> None:
    with patch("onekernel.engine.session.ANCHOR_TOKENS", anchor_tokens):
        carry_out(steps, runs_ahead)


def carry_out(steps: list[tuple[str, int]], runs_ahead: bool) -> None:
    session = started(WatchedBackend(runs_ahead=runs_ahead))
    expected = list(PROMPT)
    saved, snapshot = list(PROMPT), session.snapshot()
    for step, count in steps:
        if step == "extend":
            session.extend(range(count))
            expected += range(count)
        elif step in ("generate", "close"):
            stream = session.stream(max_tokens=count if step == "generate" else 50)
            expected += [next(stream).id for _ in range(count)]
            stream.close()
        elif step == "snapshot":
            saved, snapshot = list(expected), session.snapshot()
        elif step == "restore":
            session.restore(snapshot)
            expected = list(saved)
        elif step == "prefill":
            session.prefill()
        else:
            assert session.logits().argmax() == continuation(expected, 1)[0]
        assert list(session.tokens) == expected
    assert [token.id for token in session.generate(max_tokens=3)] == continuation(expected, 3)


def test_a_snapshot_serves_several_sessions() -> None:
    engine = Engine(WatchedBackend())
    first, second = engine.new_session(), engine.new_session()
    first.extend(PROMPT)
    snapshot = first.snapshot()
    second.restore(snapshot)
    assert [t.id for t in first.generate(max_tokens=4)] == [t.id for t in second.generate(max_tokens=4)]
    second.restore(snapshot)
    assert list(second.tokens) == PROMPT


def test_logits_are_of_the_next_token_and_change_nothing() -> None:
    session = started()
    logits = session.logits()
    assert logits.shape == (VOCABULARY,)
    assert logits.dtype == np.float32
    assert list(session.tokens) == PROMPT
    assert session.generate(max_tokens=1)[0].id == logits.argmax()


def test_stop_tokens_end_the_stream_and_are_yielded() -> None:
    stop = continuation(PROMPT, 4)[3]
    session = started()
    made = [token.id for token in session.generate(max_tokens=50, stop_tokens=[stop])]
    assert made[-1] == stop
    assert stop not in made[:-1]
    assert session.finish_reason == "stop"


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    made = continuation(PROMPT, 4)
    session = started()
    session.generate(max_tokens=made.index(made[3]) + 1, stop_tokens=[made[3]])
    assert session.finish_reason == "stop"


def test_max_tokens_is_clamped_to_the_context() -> None:
    session = started(WatchedBackend(max_context=8))
    assert len(session.generate(max_tokens=100)) == 3
    assert session.finish_reason == "length"
    with pytest.raises(InvalidRequest, match="fills the context of 8"):
        session.generate()


def test_a_prompt_beyond_the_context_is_refused_whole() -> None:
    session = started(WatchedBackend(max_context=8))
    with pytest.raises(InvalidRequest, match="9 tokens do not fit into the context of 8"):
        session.extend([1, 2, 3, 4])
    assert list(session.tokens) == PROMPT


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {token} is outside the vocabulary of {VOCABULARY}"):
        started(tokens=[1, token])


def test_tokens_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError):
        started(tokens=[1.5])  # type: ignore[list-item]


def test_an_empty_prompt_is_refused() -> None:
    session = Engine(WatchedBackend()).new_session()
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        session.stream()
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        session.logits()
    with pytest.raises(InvalidRequest, match="max_tokens = 0"):
        started().stream(max_tokens=0)


def test_a_missing_seed_is_fresh_and_a_given_one_is_kept() -> None:
    backend = WatchedBackend()
    session = started(backend)
    for seed in (None, None, 11):
        session.generate(SamplingParams(temperature=1.0, seed=seed), max_tokens=1)
    assert backend.seeds[0] != backend.seeds[1]
    assert backend.seeds[2] == 11


def test_cancel_from_another_thread_ends_a_stream_within_a_token() -> None:
    session = started(WatchedBackend(delay=0.002))
    stream = session.stream()
    next(stream)
    canceller = threading.Thread(target=session.cancel)
    canceller.start()
    canceller.join()
    assert len(list(stream)) <= 1
    assert session.finish_reason == "cancelled"
    assert list(session.tokens) == PROMPT + continuation(PROMPT, len(session) - len(PROMPT))


def test_cancel_before_the_first_token_is_not_lost() -> None:
    session = started()
    stream = session.stream()
    session.cancel()
    assert list(stream) == []
    assert session.finish_reason == "cancelled"
    assert len(session.generate(max_tokens=2)) == 2


def test_cancel_reaches_a_stream_that_waits_for_its_turn() -> None:
    engine = Engine(WatchedBackend())
    first, second = engine.new_session(), engine.new_session()
    first.extend(PROMPT)
    second.extend(PROMPT)
    holder = first.stream()
    next(holder)
    waiting = threading.Thread(target=second.generate)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    second.cancel()
    waiting.join(5)
    assert not waiting.is_alive()
    assert second.finish_reason == "cancelled"
    holder.close()


def test_threads_take_turns() -> None:
    engine = Engine(WatchedBackend(delay=0.0005))  # the fake asserts that it is used by one thread at a time
    results: list[list[int]] = []

    def work() -> None:
        session = engine.new_session()
        session.extend(PROMPT)
        results.append([token.id for token in session.generate(max_tokens=10)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [continuation(PROMPT, 10)] * 4


def test_two_streams_of_one_thread_are_an_error_and_no_deadlock() -> None:
    engine = Engine(WatchedBackend())
    first, second = engine.new_session(), engine.new_session()
    first.extend(PROMPT)
    second.extend(PROMPT)
    stream = first.stream()
    next(stream)
    with pytest.raises(InvalidRequest, match="unfinished in this thread"):
        second.generate(max_tokens=1)
    with pytest.raises(InvalidRequest, match="the session is streaming"):
        first.extend([1])
    stream.close()
    assert len(second.generate(max_tokens=1)) == 1


def test_a_closed_engine_says_so() -> None:
    backend = WatchedBackend()
    with Engine(backend) as engine:
        session = engine.new_session()
        session.extend(PROMPT)
    assert backend.closed
    with pytest.raises(BackendError, match="closed"):
        session.generate(max_tokens=1)
