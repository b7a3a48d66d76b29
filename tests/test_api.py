"""Text in, text out: streams, stop strings, limits, chats and asyncio, on a fake backend that says what it is told."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import onekernel
from onekernel import Chunk, Conversation, Model, SamplingParams
from onekernel.errors import BackendError, InvalidRequest

MakeModel = Callable[..., Model]
PROMPT = "once "


def test_generate_gives_the_text_without_the_end_token(make_model: MakeModel) -> None:
    completion = make_model("upon a time", prompt=PROMPT).generate(PROMPT)
    assert completion.text == "upon a time"
    assert completion.finish_reason == "stop"
    assert completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == len(completion.tokens) == 12
    assert completion.ttft_s is not None
    assert completion.ttft_s > 0
    assert completion.decode_tokens_per_s is not None
    assert completion.decode_tokens_per_s > 0
    assert completion.logprobs is None


def test_token_ids_are_a_prompt_too(make_model: MakeModel) -> None:
    model = make_model("upon", prompt=PROMPT)
    assert model.generate(model.tokenizer.encode(PROMPT)).text == "upon"


def test_streamed_chunks_join_to_the_completion(make_model: MakeModel) -> None:
    text = "naïve 日本 🙂 end"
    stream = make_model(text, prompt=PROMPT).stream(PROMPT)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.completion.text == text
    assert all("\ufffd" not in chunk.text for chunk in chunks)
    assert [token.id for chunk in chunks for token in chunk.tokens] == list(stream.completion.tokens)


def test_max_tokens_ends_the_text(make_model: MakeModel) -> None:
    completion = make_model("upon a time", prompt=PROMPT).generate(PROMPT, max_tokens=4)
    assert completion.text == "upon"
    assert completion.finish_reason == "length"


def test_a_character_cut_by_max_tokens_is_not_lost_silently(make_model: MakeModel) -> None:
    completion = make_model("ab日", prompt=PROMPT).generate(PROMPT, max_tokens=4)
    assert completion.text == "ab\ufffd"


@pytest.mark.parametrize("stop", ["a t", ["xyz", "a t"], ("a time!", "a t")])
def test_stop_strings_span_tokens_and_are_cut(make_model: MakeModel, stop: str | list[str]) -> None:
    stream = make_model("upon a time", prompt=PROMPT).stream(PROMPT, stop=stop)
    assert "".join(chunk.text for chunk in stream) == stream.completion.text == "upon "
    assert stream.completion.finish_reason == "stop"
    assert stream.completion.usage.completion_tokens == 8


def test_the_start_of_a_stop_string_is_given_out_at_the_end(make_model: MakeModel) -> None:
    assert make_model("upon a time", prompt=PROMPT).generate(PROMPT, stop="time flies").text == "upon a time"


def test_leaving_a_loop_frees_the_model(make_model: MakeModel) -> None:
    model = make_model("upon a time", prompt=PROMPT)
    gc.disable()
    try:
        for _ in model.stream(PROMPT):
            break
        assert model.generate(PROMPT).text == "upon a time"
    finally:
        gc.enable()


def test_a_closed_stream_is_cancelled_and_keeps_its_text(make_model: MakeModel) -> None:
    model = make_model("upon a time", prompt=PROMPT)
    with model.stream(PROMPT) as stream:
        for chunk in stream:
            if chunk.text == "n":
                break
    assert stream.completion.text == "upon"
    assert stream.completion.finish_reason == "cancelled"


def test_logprobs_come_when_asked_for(make_model: MakeModel) -> None:
    completion = make_model("upon", prompt=PROMPT).generate(PROMPT, logprobs=2)
    assert completion.logprobs is not None
    assert [token.id for token in completion.logprobs] == list(completion.tokens)
    assert all(token.logprob is not None and len(token.top_logprobs) == 2 for token in completion.logprobs)


def test_unknown_options_are_refused_by_name(make_model: MakeModel) -> None:
    model = make_model("upon", prompt=PROMPT)
    with pytest.raises(TypeError, match="unknown sampling parameter 'temprature': did you mean 'temperature'"):
        model.generate(PROMPT, temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="not both"):
        model.generate(PROMPT, SamplingParams(), top_k=3)
    with pytest.raises(InvalidRequest, match="top_p = 2"):
        model.generate(PROMPT, top_p=2)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        model.generate("")


def test_options_reach_the_backend(make_model: MakeModel) -> None:
    model = make_model("upon", prompt=PROMPT)
    forbidden = model.tokenizer.encode("u")[0]
    assert not model.generate(PROMPT, logit_bias={forbidden: float("-inf")}, max_tokens=1).text.startswith("u")


def test_chat_renders_the_template_and_remembers_nothing(make_model: MakeModel) -> None:
    model = make_model("hello")
    messages = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        completion = model.chat(messages)
        assert completion.text == "hello"
        assert completion.usage.prompt_tokens == len(
            model.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        )
    assert messages == [{"role": "user", "content": "hi"}]
    assert model.render(messages, thinking=True).endswith("<think>")


def ask(conversation: Conversation, text: str) -> str:
    return "".join(chunk.text for chunk in conversation.ask(text))


def consumed(model: Model) -> int:
    with model.engine.exclusive() as backend:
        return backend.consumed_in_all  # type: ignore[attr-defined, no-any-return]


def test_a_conversation_reads_only_what_is_new(make_model: MakeModel) -> None:
    model = make_model(["hello", "fine"])
    conversation = Conversation(model, SamplingParams(), system="be nice")
    assert ask(conversation, "hi") == "hello"
    before = consumed(model)
    assert ask(conversation, "how are you?") == "fine"
    whole = model.render(conversation.messages, thinking=None, add_generation_prompt=False)
    new = model.tokenizer.encode("\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\nfine")
    assert consumed(model) - before <= len(new) + 1 < len(model.tokenizer.encode(whole))
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_a_conversation_whose_template_drops_the_thinking_returns_to_before_the_answer(make_model: MakeModel) -> None:
    model = make_model(["hmm</think>hello", "fine"])
    conversation = Conversation(model, SamplingParams(), thinking=False)
    ask(conversation, "h" * 200)
    before = consumed(model)
    assert ask(conversation, "so?") == "fine"
    assert consumed(model) - before < 100
    assert conversation.completion is not None
    prompt = model.render(conversation.messages[:-1], thinking=False)
    assert "hmm" not in prompt
    assert conversation.completion.usage.prompt_tokens == len(model.tokenizer.encode(prompt))


def test_a_conversation_survives_a_broken_off_answer(make_model: MakeModel) -> None:
    conversation = Conversation(make_model(["hello", "fine"]), SamplingParams())
    for chunk in conversation.ask("hi"):
        if chunk.text == "l":
            conversation.cancel()
    assert conversation.completion is not None
    assert conversation.completion.finish_reason == "cancelled"
    assert conversation.messages[-1]["content"] in ("hel", "hell")
    assert ask(conversation, "and?") == "fine"


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(make_model: MakeModel) -> None:
    conversation = Conversation(make_model(["hello", "fine"], max_context=150), SamplingParams())
    ask(conversation, "hi")
    messages = list(conversation.messages)
    with pytest.raises(InvalidRequest, match="context of 150"):
        ask(conversation, "x" * 200)
    assert conversation.messages == messages
    assert ask(conversation, "ok?") == "fine"


def test_async_stream_equals_the_stream(make_model: MakeModel) -> None:
    model = make_model("upon a time", prompt=PROMPT)

    async def collect() -> tuple[list[Chunk], str]:
        stream = model.astream(PROMPT)
        return [chunk async for chunk in stream], stream.completion.text

    chunks, text = asyncio.run(collect())
    assert "".join(chunk.text for chunk in chunks) == text == "upon a time"


def test_async_requests_run_beside_each_other_without_blocking_the_loop(make_model: MakeModel) -> None:
    model = make_model("upon a time", prompt=PROMPT, delay=0.01)

    async def work() -> tuple[list[str], float]:
        longest, done = 0.0, asyncio.gather(*(model.agenerate(PROMPT) for _ in range(3)))
        while not done.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)
        return [completion.text for completion in await done], longest

    texts, longest = asyncio.run(work())
    assert texts == ["upon a time"] * 3
    assert longest < 0.3


def test_async_chat(make_model: MakeModel) -> None:
    model = make_model("hello")
    completion = asyncio.run(model.achat([{"role": "user", "content": "hi"}]))
    assert completion.text == "hello"


def test_cancelling_the_task_stops_the_model(make_model: MakeModel) -> None:
    model = make_model("upon a time " * 50, prompt=PROMPT, delay=0.01)

    async def work() -> int:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in model.astream(PROMPT, max_tokens=None):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = consumed(model)
        await asyncio.sleep(0.1)
        return consumed(model) - count

    assert asyncio.run(work()) == 0
    assert consumed(model) < 50


def test_leaving_an_async_loop_stops_the_model(make_model: MakeModel) -> None:
    model = make_model("upon a time " * 50, prompt=PROMPT, delay=0.01)

    async def work() -> None:
        stream = model.astream(PROMPT, max_tokens=None)
        async for _ in stream:
            break
        with pytest.raises(InvalidRequest, match="iterated over before"):
            async for _ in stream:
                pass

    asyncio.run(work())
    assert consumed(model) < 50


def test_errors_of_async_requests_reach_the_caller(make_model: MakeModel) -> None:
    model = make_model("upon", prompt=PROMPT)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        asyncio.run(model.agenerate(""))
    with pytest.raises(InvalidRequest, match="has not started"):
        _ = model.astream(PROMPT).completion


def test_load_runs_a_checkpoint(random_folder: Path) -> None:
    lines: list[str] = []
    with onekernel.load(str(random_folder), backend="cpu", max_context=100, report=lines.append) as model:
        first = model.generate("some text", max_tokens=8)
        again = model.generate("some text", max_tokens=8)
        assert first.tokens == again.tokens
        assert 1 <= len(first.tokens) <= 8
        assert all(token < model.tokenizer.size for token in first.tokens)
        assert model.engine.max_context == 100
        chat = Conversation(model, model.sampling_params(temperature=1.0, seed=5), max_tokens=6)
        ask(chat, "hi")
        ask(chat, "and?")
        whole = model.chat(chat.messages[:-1], temperature=1.0, seed=5, max_tokens=6)
        assert chat.completion is not None
        assert chat.completion.tokens == whole.tokens
    assert len(lines) == 1
    assert "on the backend cpu (it was asked for): 0." in lines[0]


def test_load_refuses_what_cannot_be(random_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="max_context = 513 must be between 1 and 512"):
        onekernel.load(str(random_folder), max_context=513)

    def no_gpu() -> NoReturn:
        raise BackendError("there is no NVIDIA driver on this machine")

    monkeypatch.setattr("onekernel.backend.cuda.find_gpu", no_gpu)
    with pytest.raises(BackendError, match="the backend cuda cannot run"):
        onekernel.load(str(random_folder), backend="cuda")


def test_load_checks_the_backend_first(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="backend = 'tpu' is unknown"):
        onekernel.load(str(tmp_path), backend="tpu")


def test_public_names_resolve() -> None:
    for name in onekernel.__all__:
        assert getattr(onekernel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        onekernel.laod  # noqa: B018
