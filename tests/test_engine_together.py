"""Sessions continued together stay exact: alone, in company, parked, extended between runs, after failures."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import WatchedBackend

from onekernel.engine import Engine, Member, Session, run_together
from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory
from onekernel.sampling.params import SamplingParams

FLAT: Any = lambda tokens, _: 0  # noqa: E731
PENALTIES = SamplingParams(temperature=1.0, frequency_penalty=0.7, presence_penalty=0.3, seed=11, top_k=50)


def session_of(engine: Engine, tokens: list[int]) -> Session:
    session = engine.new_session()
    session.extend(tokens)
    return session


def alone(tokens: list[int], count: int, sampling: SamplingParams | None = None, **backend: Any) -> list[int]:
    session = session_of(Engine(WatchedBackend(**backend)), tokens)
    return [token.id for token in session.generate(sampling, count)]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_sessions_that_come_and_go_make_what_they_make_alone(runs_ahead: bool) -> None:
    """Now together, now by themselves, now parked, now rolled back and forth through a snapshot."""
    rng = random.Random(5)
    engine = Engine(WatchedBackend(runs_ahead=runs_ahead, next_token=FLAT))
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    samplings = [PENALTIES if i % 2 else SamplingParams(temperature=1, seed=i) for i in range(12)]
    sessions = [session_of(engine, prompt) for prompt in prompts]
    members = [Member(session, sampling) for session, sampling in zip(sessions, samplings, strict=True)]
    for _ in range(60):
        chosen = rng.sample(members, rng.randint(1, 6))
        for member in chosen:
            member.generated = len(member.session) - 3
            member.max_tokens = rng.randint(1, 5)
        match rng.randrange(5):
            case 0:
                chosen[0].session.park()
                assert not chosen[0].session.holds_state
            case 1:
                chosen[0].session.restore(chosen[0].session.snapshot())
            case 2:
                index = members.index(chosen[0])
                list(sessions[index].stream(samplings[index], 2, generated=chosen[0].generated))
            case _:
                made = {member: 0 for member in chosen}
                for step in run_together(engine, chosen, rng.randint(1, 5)):
                    for member, _token in step:
                        made[member] += 1
                assert all(0 < made[member] <= member.max_tokens for member in chosen)
    for prompt, session, sampling in zip(prompts, sessions, samplings, strict=True):
        assert len(session) > 10
        assert list(session.tokens[3:]) == alone(prompt, len(session) - 3, sampling, next_token=FLAT)


def test_a_session_extended_between_runs() -> None:
    engine = Engine(WatchedBackend())
    session = session_of(engine, [1, 2])
    member = Member(session, SamplingParams())
    member.max_tokens = 3
    first = [token.id for step in run_together(engine, [member], 9) for _, token in step]
    session.extend([9, 9])
    second = [token.id for step in run_together(engine, [member], 9) for _, token in step]
    assert (first, second) == (alone([1, 2], 3), alone([1, 2, *first, 9, 9], 3))


def test_the_error_of_one_member_costs_only_its_state() -> None:
    class Broken:
        def allowed(self) -> None:
            raise BackendError("no way")

        def accept(self, token: int) -> None:
            pass

    engine = Engine(WatchedBackend())
    good = Member(session_of(engine, [1]), SamplingParams())
    bad = Member(session_of(engine, [1]), SamplingParams(), constraint=Broken())
    good.max_tokens = bad.max_tokens = 5
    made = [token.id for step in run_together(engine, [bad, good], 5) for _, token in step]
    assert made == alone([1], 5)
    assert good.error is None
    assert str(bad.error) == "no way"
    assert [token.id for token in bad.session.generate(max_tokens=5)] == made, "it is rebuilt from its tokens"


def test_a_run_that_breaks_costs_only_states(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = WatchedBackend()
    engine = Engine(backend)
    sessions = [session_of(engine, [i]) for i in range(3)]
    members = [Member(session, SamplingParams()) for session in sessions]
    for member in members:
        member.max_tokens = 10
    consume, calls = backend._consume, 0

    def breaks(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("the backend broke")
        return consume(*arguments)

    monkeypatch.setattr(backend, "_consume", breaks)
    with pytest.raises(RuntimeError, match="broke"):
        list(run_together(engine, members, 10))
    assert [len(session) for session in sessions] == [3, 3, 3]
    for i, session in enumerate(sessions):
        assert [token.id for token in session.generate(max_tokens=3)] == alone([i], 5)[2:]


def test_without_memory_everything_is_as_it_was() -> None:
    engine = Engine(WatchedBackend(memory=128))
    members = [Member(session_of(engine, [i]), SamplingParams()) for i in range(3)]
    assert engine.memory_free() == 4 * 128
    assert engine.state_bytes(65) == 4 * 128
    with pytest.raises(NotEnoughMemory):
        list(run_together(engine, members, 10))
    members[0].session.park()
    assert [token.id for step in run_together(engine, members[1:], 10) for _, token in step] == [
        alone([1], 1)[0],
        alone([2], 1)[0],
    ]


def test_a_session_that_streams_cannot_run_elsewhere() -> None:
    engine = Engine(WatchedBackend())
    session = session_of(engine, [1])
    stream = session.stream()
    next(stream)
    with pytest.raises(InvalidRequest, match="unfinished"):
        list(run_together(engine, [Member(session, SamplingParams())], 1))
    stream.close()
