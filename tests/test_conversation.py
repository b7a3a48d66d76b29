"""A conversation answers exactly as one that reads everything anew, but reads only what is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onekernel
from onekernel import Conversation, Model, SamplingParams
from onekernel.errors import BackendError, InvalidRequest

MakeModel = Callable[..., Model]


def ask(conversation: Conversation, text: str, leave_after: int | None = None) -> str:
    answer = ""
    for count, chunk in enumerate(conversation.ask(text), 1):
        answer += chunk.text
        if count == leave_after:
            break
    return answer


@pytest.fixture(scope="module")
def random_model(random_folder: Path) -> Model:
    return onekernel.load(str(random_folder), backend="cpu")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab <|\n日", min_size=1, max_size=6), st.none() | st.integers(1, 4)), max_size=4),
    st.booleans(),
    st.none() | st.just("short"),
)
def test_answers_are_those_of_a_fresh_reading(
    random_model: Model, turns: list[tuple[str, int | None]], thinking: bool, system: str | None
) -> None:
    """Random weights answer with random bytes: half characters, broken-off answers, all of it is read again as text."""
    sampling = SamplingParams(temperature=1.0, seed=3)
    conversation = Conversation(random_model, sampling, system=system, thinking=thinking, max_tokens=5)
    for text, leave_after in turns:
        expected = random_model.chat(
            [*conversation.messages, {"role": "user", "content": text}], sampling, thinking=thinking, max_tokens=5
        )
        ask(conversation, text, leave_after)
        assert conversation.completion is not None
        made = conversation.completion.tokens
        assert made == expected.tokens[: len(made)]
        assert leave_after is not None or made == expected.tokens
        assert conversation.messages[-1] == {"role": "assistant", "content": conversation.completion.text}


def test_a_question_that_does_not_fit_leaves_no_trace(make_model: MakeModel) -> None:
    model = make_model(["hello", "fine"], max_context=150)
    conversation = Conversation(model, SamplingParams())
    ask(conversation, "hi")
    messages = list(conversation.messages)
    for length in (80, 83, 84, 85, 90, 200):  # around the limit, and far beyond it
        try:
            ask(conversation, "x" * length, leave_after=1)
        except InvalidRequest as error:
            assert "context of 150" in str(error)  # noqa: PT017
            assert conversation.messages == messages
        else:
            messages = list(conversation.messages)
            assert len(messages) == 4
    assert conversation.messages == messages


def test_a_question_that_does_not_fit_costs_the_next_one_nothing(make_model: MakeModel) -> None:
    """The question alone would fit, but not with the opening of the answer: what was read before is still of use."""
    model = make_model(["hello", "fine"], max_context=200)
    conversation = Conversation(model, SamplingParams())
    ask(conversation, "x" * 60)
    limit = len(model.tokenizer.encode(model.render([*conversation.messages, {"role": "user", "content": ""}])))
    with pytest.raises(InvalidRequest, match="context of 200"):
        ask(conversation, "y" * (200 - limit))
    with model.engine.exclusive() as backend:
        before = backend.consumed_in_all  # type: ignore[attr-defined]
    assert ask(conversation, "so?") == "fine"
    with model.engine.exclusive() as backend:
        assert backend.consumed_in_all - before < 60  # type: ignore[attr-defined]


def test_a_backend_that_fails_while_reading_leaves_no_trace(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("hello")
    conversation = Conversation(model, SamplingParams())
    with model.engine.exclusive() as backend:
        monkeypatch.setattr(backend, "prefill", lambda *_: (_ for _ in ()).throw(BackendError("it broke")))
    with pytest.raises(BackendError, match="it broke"):
        ask(conversation, "hi")
    assert conversation.messages == []
    monkeypatch.undo()
    assert ask(conversation, "hi") == "hello"


def test_a_backend_that_fails_while_answering_keeps_what_it_said(make_model: MakeModel) -> None:
    model = make_model(["hello", "fine"])
    conversation = Conversation(model, SamplingParams())
    with model.engine.exclusive() as backend:
        backend.break_after = 3  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="broke"):
        ask(conversation, "hi")
    assert [message["content"] for message in conversation.messages] == ["hi", "hel"]
    with model.engine.exclusive() as backend:
        backend.break_after = None  # type: ignore[attr-defined]
    assert ask(conversation, "so?") == "fine"


def test_two_answers_at_once_are_refused(make_model: MakeModel) -> None:
    conversation = Conversation(make_model("hello"), SamplingParams())
    running = conversation.ask("hi")
    next(running)
    with pytest.raises(InvalidRequest, match="the session is streaming"):
        ask(conversation, "and?")
    assert "".join(chunk.text for chunk in running) == "ello"
    assert len(conversation.messages) == 2


def test_a_cancelled_answer_is_kept_and_the_next_one_is_whole(make_model: MakeModel) -> None:
    conversation = Conversation(make_model(["hello", "fine"]), SamplingParams())
    for chunk in conversation.ask("hi"):
        if chunk.text == "e":
            conversation.cancel()
    assert conversation.completion is not None
    assert conversation.completion.finish_reason == "cancelled"
    assert conversation.messages[-1]["content"] in ("he", "hel")
    assert ask(conversation, "so?") == "fine"


def test_stop_strings_and_limits_hold_in_every_turn(make_model: MakeModel) -> None:
    conversation = Conversation(make_model(["hello", "yellow"]), SamplingParams(), max_tokens=5, stop=("lo",))
    assert [ask(conversation, "hi"), ask(conversation, "so?")] == ["hel", "yel"]
    assert conversation.completion is not None
    assert conversation.completion.finish_reason == "stop"
