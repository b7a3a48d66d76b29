"""Tokens become text as they are made: for any text, stop strings, limit, and in asyncio just the same."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from fakes import WatchedBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel import Chunk, Completion, Model, Stream
from onekernel.engine import Engine
from onekernel.errors import InvalidRequest

MakeModel = Callable[..., Model]
PROMPT = "once "


@pytest.fixture(scope="module")
def say(text_folder) -> Callable[..., Stream]:
    """A stream of any answer; `end` says whether the end token follows it."""
    from onekernel.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(text_folder)

    def stream(answer: str, end: bool = True, **options: object) -> Stream:
        script = [*tokenizer.encode(answer, parse_special=False), *([257] if end else [])] or [0]
        begin = len(tokenizer.encode(PROMPT))

        def next_token(consumed: Sequence[int], _: int) -> int:
            return script[(len(consumed) - begin) % len(script)]

        return Model(
            "fake", Engine(WatchedBackend(next_token=next_token, vocabulary_size=258)), tokenizer, text_folder
        ).stream(PROMPT, **options)  # type: ignore[arg-type]

    return stream


@settings(deadline=None)
@given(st.text(max_size=15), st.lists(st.text("ab\né日", min_size=1, max_size=3), max_size=3), st.integers(1, 60))
def test_the_chunks_are_the_text_up_to_the_first_stop(
    say: Callable[..., Stream], text: str, stops: list[str], limit: int
) -> None:
    stream = say(text, max_tokens=limit, stop=stops)
    chunks = list(stream)
    completion = stream.completion
    made = (text.encode() + b"\x00")[:limit]  # the end token is a token too
    whole = made[: len(text.encode())].decode("utf-8", "replace")
    ends = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    expected = whole[: min(at for end, at in ends if end == min(ends)[0])] if ends else whole
    assert "".join(chunk.text for chunk in chunks) == completion.text == expected
    assert [token.id for chunk in chunks for token in chunk.tokens] == list(completion.tokens)
    assert completion.usage.completion_tokens == len(completion.tokens) <= limit
    if ends or limit > len(text.encode()):
        assert completion.finish_reason == "stop"
    else:
        assert completion.finish_reason == "length"


def test_every_token_is_a_chunk_and_what_was_held_back_comes_last(say: Callable[..., Stream]) -> None:
    chunks = list(say("aé", end=False, max_tokens=2, stop="xyz"))
    assert [(chunk.text, len(chunk.tokens)) for chunk in chunks] == [("a", 1), ("", 1), ("\ufffd", 0)]
    chunks = list(say("ax", stop="xyz"))
    assert [(chunk.text, len(chunk.tokens)) for chunk in chunks] == [("a", 1), ("", 1), ("", 1), ("x", 0)]


def test_a_stream_is_iterated_over_once(say: Callable[..., Stream]) -> None:
    stream = say("abc")
    assert "".join(chunk.text for chunk in stream) == "abc"
    with pytest.raises(InvalidRequest, match="iterated over before"):
        iter(stream)
    assert stream.completion.finish_reason == "stop"


def test_the_completion_grows_with_the_stream(say: Callable[..., Stream]) -> None:
    stream = say("abc")
    assert stream.completion == Completion("", (), "cancelled", stream.completion.usage, None, None, None)
    seen = [(chunk.text, stream.completion.text, stream.completion.ttft_s is None) for chunk in stream]
    assert seen == [("a", "a", False), ("b", "ab", False), ("c", "abc", False), ("", "abc", False)]
    assert stream.completion.usage.prompt_tokens == 5
    assert stream.completion.decode_tokens_per_s is not None


def test_a_cancelled_stream_gives_out_what_it_held_back(say: Callable[..., Stream]) -> None:
    stream = say("abxy" * 20, stop="xyz")
    text = ""
    for chunk in stream:
        text += chunk.text
        if stream.completion.usage.completion_tokens == 3:
            stream.cancel()
    assert text == stream.completion.text
    assert text[:3] == "abx"
    assert len(text) <= 4
    assert stream.completion.finish_reason == "cancelled"


def test_a_stream_that_was_closed_before_it_began_holds_nothing(say: Callable[..., Stream]) -> None:
    with say("abc") as stream:
        pass
    assert list(stream) == []
    assert stream.completion.text == ""
    assert stream.completion.finish_reason == "cancelled"


async def collect(stream: object) -> list[Chunk]:
    return [chunk async for chunk in stream]  # type: ignore[attr-defined]


def test_asyncio_gives_the_same_chunks(make_model: MakeModel) -> None:
    model = make_model("naïve 日本 🙂 stop", prompt=PROMPT)
    plain = list(model.stream(PROMPT, stop="stop"))
    stream = model.astream(PROMPT, stop="stop")
    assert asyncio.run(collect(stream)) == plain
    assert stream.completion.text == "naïve 日本 🙂 "


def test_cancel_before_an_async_stream_begins_is_not_lost(make_model: MakeModel) -> None:
    stream = make_model("abc", prompt=PROMPT).astream(PROMPT)
    stream.cancel()
    assert asyncio.run(collect(stream)) == []
    assert stream.completion.finish_reason == "cancelled"


def test_cancel_of_an_async_stream_keeps_what_was_made(make_model: MakeModel) -> None:
    stream = make_model("abc" * 100, prompt=PROMPT, delay=0.005).astream(PROMPT, max_tokens=None)

    async def work() -> str:
        text = ""
        async for chunk in stream:
            text += chunk.text
            if len(text) == 3:
                stream.cancel()
        return text

    text = asyncio.run(work())
    assert text == stream.completion.text
    assert 3 <= len(text) < 30


def test_an_error_in_the_backend_reaches_the_loop_after_what_was_made(make_model: MakeModel) -> None:
    model = make_model("abcdef", prompt=PROMPT)
    with model.engine.exclusive() as backend:
        backend.break_after = 3  # type: ignore[attr-defined]
    texts = []

    async def work() -> None:
        async for chunk in model.astream(PROMPT):
            texts.append(chunk.text)

    with pytest.raises(RuntimeError, match="the backend broke"):
        asyncio.run(work())
    assert texts == ["a", "b", "c"]


def test_a_timeout_around_an_async_stream_stops_the_model(make_model: MakeModel) -> None:
    model = make_model("abc" * 300, prompt=PROMPT, delay=0.01)

    async def work() -> None:
        async with asyncio.timeout(0.1):
            await collect(model.astream(PROMPT, max_tokens=None))

    with pytest.raises(TimeoutError):
        asyncio.run(work())
    with model.engine.exclusive() as backend:  # the turn was given back
        assert backend.consumed_in_all < 100  # type: ignore[attr-defined]


def test_the_thread_of_an_async_stream_ends_with_it(make_model: MakeModel) -> None:
    model = make_model("abc", prompt=PROMPT)
    asyncio.run(collect(model.astream(PROMPT)))
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("onekernel-stream") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
