"""The Python API: `load` a model, then `generate`, `stream` or `chat` with it. Text in, text out."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from onekernel.backend.choose import choose, load_backend, memory_needed
from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.engine import Engine, Session
from onekernel.errors import InvalidRequest
from onekernel.many import generate_many
from onekernel.sampling.params import SamplingParams
from onekernel.stream import AsyncStream, Completion, Stream
from onekernel.text.chat_template import ChatTemplate
from onekernel.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256  # of `generate`: plain text need not come to an end by itself, unlike the answer in a chat

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, as in the chat template of the model


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments. Those not given come from the model's own defaults."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None


def load(
    model: str = "demo",
    *,
    backend: str = "auto",
    max_context: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Model:
    """Load a model.

    Args:
        model: "demo" (a tiny model that ships with onekernel), a folder, or a name on the Hugging Face hub, which is
            downloaded if it is not in the cache.
        backend: "cpu", "cuda", or "auto" for the fastest that runs here.
        max_context: tokens that one conversation can hold; None takes what the model was made for.
        report: called with one line before the weights are read: which backend, why, and the memory it takes.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError: what is wrong with the model, and what to do.
        NotEnoughMemory: the weights or the context do not fit.
        BackendError: the backend cannot run here.
        InvalidRequest: an unknown backend or an impossible max_context.
    """
    choose(backend)  # a backend that cannot run is refused before anything is downloaded
    folder = hub.resolve(model)
    shape = Shape.load(folder)
    if max_context is not None and not 1 <= max_context <= shape.max_context:
        raise InvalidRequest(f"max_context = {max_context} must be between 1 and {shape.max_context}, the model's own")
    tokenizer = Tokenizer.load(folder)
    choice = choose(backend, shape)
    if report is not None:
        memory = memory_needed(choice.name, shape) / 2**30
        report(f"loading {model} on the backend {choice.name} ({choice.reason}): {memory:.2f} GiB of memory")
    engine = Engine(load_backend(choice.name, folder, shape, tokenizer.size, max_context))
    return Model(model, engine, tokenizer, folder)


class Model:
    """A loaded model with its tokenizer and chat template. Any thread may use it; `generate_many` is for many prompts.

    Use it as a context manager, or call `close`, to free its memory.
    """

    def __init__(self, name: str, engine: Engine, tokenizer: Tokenizer, folder: Path) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self._folder = folder
        self._template: ChatTemplate | None = None
        self.stop_tokens = frozenset(tokenizer.stop_token_ids) | frozenset(engine.shape.eos_token_ids)
        """Tokens that end an answer."""

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """Continue `prompt`, a text or token ids.

        Args:
            prompt: the text, or the token ids, to continue.
            sampling: all sampling parameters at once; None takes the model's generation_config.json (greedy if it
                has none) with `options` over it.
            max_tokens: at most so many new tokens; None: as many as the context holds.
            stop: one string or several; the answer ends before the first that appears.
            options: single sampling parameters: temperature, top_k, top_p, min_p, presence_penalty,
                frequency_penalty, repetition_penalty, logit_bias, seed, logprobs.

        Raises:
            InvalidRequest: a parameter is out of range, or the prompt is empty or does not fit into the context.
            TypeError: an unknown option.
        """
        return _drain(self.stream(prompt, sampling, max_tokens=max_tokens, stop=stop, **options))

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        max_concurrent: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Continue each of `prompts` as `generate` would, several at a time. A common beginning is read once.

        Args:
            max_concurrent: prompts that share the engine at a time; None: as many as one step of it serves.
            prompts, sampling, max_tokens, stop, options: as in `generate`. A seed counts for each prompt by itself.

        Returns:
            The completions in the order of the prompts.

        Raises:
            InvalidRequest: as `generate`; names the prompt. Then none is answered.
            TypeError: an unknown option, or one text instead of a list.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of texts or of token ids: for one text there is `generate`")
        return generate_many(
            self.engine,
            self.tokenizer,
            [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
            self._sampling(sampling, options),
            max_tokens,
            (stop,) if isinstance(stop, str) else tuple(stop),
            self.stop_tokens,
            max_concurrent,
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """As `generate`, chunk by chunk. `Stream.completion` is the whole answer in the end."""
        started_at = time.perf_counter()
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        session = self.engine.new_session()
        session.extend(tokens)
        return self.continue_session(session, self._sampling(sampling, options), max_tokens, stop, started_at)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """Answer the last of `messages`. Nothing is remembered between calls: pass the whole conversation.

        Args:
            messages: {"role": ..., "content": ...}, rendered by the model's own chat template.
            sampling: as in `generate`.
            tools: descriptions of functions that the model may call (JSON schema, as the template expects).
            thinking: whether the model thinks before it answers; None leaves it to the template.
            max_tokens: as in `generate`, but without a limit unless given.
            stop: as in `generate`.
            options: as in `generate`.

        Raises:
            InvalidRequest: as `generate`, or the template refuses the messages.
        """
        stream = self.stream_chat(
            messages, sampling, tools=tools, thinking=thinking, max_tokens=max_tokens, stop=stop, **options
        )
        return _drain(stream)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """As `chat`, chunk by chunk."""
        prompt = self.render(messages, tools=tools, thinking=thinking)
        return self.stream(prompt, sampling, max_tokens=max_tokens, stop=stop, **options)

    async def agenerate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """`generate` for asyncio. Cancelling the task stops the generation within one token."""
        return await _drain_async(self.astream(prompt, sampling, max_tokens=max_tokens, stop=stop, **options))

    def astream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """`stream` for asyncio: `async for chunk in model.astream(prompt)`. Errors are raised by the loop."""
        return AsyncStream(lambda: self.stream(prompt, sampling, max_tokens=max_tokens, stop=stop, **options))

    async def achat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """`chat` for asyncio. Cancelling the task stops the generation within one token."""
        stream = self.astream_chat(
            messages, sampling, tools=tools, thinking=thinking, max_tokens=max_tokens, stop=stop, **options
        )
        return await _drain_async(stream)

    def astream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """`stream_chat` for asyncio."""

        def open_stream() -> Stream:
            return self.stream_chat(
                messages, sampling, tools=tools, thinking=thinking, max_tokens=max_tokens, stop=stop, **options
            )

        return AsyncStream(open_stream)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that the model's chat template makes of `messages`."""
        if self._template is None:
            self._template = ChatTemplate.load(self._folder)
        return self._template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=thinking
        )

    def continue_session(
        self,
        session: Session,
        sampling: SamplingParams,
        max_tokens: int | None,
        stop: str | Sequence[str],
        started_at: float,
    ) -> Stream:
        """Stream text from a session that holds its prompt; `started_at` (time.perf_counter) counts for ttft_s."""
        stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        return Stream(session, self.tokenizer, sampling, max_tokens, stop_strings, self.stop_tokens, started_at)

    def close(self) -> None:
        """Free the memory of the model. Safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sampling_params(self, **options: Unpack[SamplingOptions]) -> SamplingParams:
        """The model's own defaults (generation_config.json, else greedy) with `options` over them."""
        return self._sampling(None, options)

    def _sampling(self, sampling: SamplingParams | None, options: SamplingOptions) -> SamplingParams:
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise TypeError(f"unknown sampling parameter {name!r}: {meant}")
        if sampling is not None:
            if options:
                raise TypeError(f"{', '.join(options)}: pass either a SamplingParams or single parameters, not both")
            return sampling
        return dataclasses.replace(self.tokenizer.default_sampling, **options)


def _drain(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


async def _drain_async(stream: AsyncStream) -> Completion:
    async for _ in stream:
        pass
    return stream.completion
