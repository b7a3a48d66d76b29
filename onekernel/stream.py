"""Stream: the tokens of a session turned into text as they are made, and the Completion that stands at the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from onekernel.engine import Session
from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.text.detokenizer import IncrementalDetokenizer
from onekernel.text.stop import StopStrings
from onekernel.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """What one token added. The text may be empty (half a character, or the start of a stop string, is held back)."""

    text: str
    tokens: tuple[SampledToken, ...]  # one, or none in the last chunk, which brings the text that was held back


@dataclass(frozen=True)
class Usage:
    """Counts of tokens; the end token counts as generated."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """The whole answer to one request."""

    text: str  # without end tokens and stop strings
    tokens: tuple[int, ...]  # as generated, with the end token
    finish_reason: str  # "stop" (end token or stop string), "length" or "cancelled"
    usage: Usage
    ttft_s: float | None  # seconds from the request to the first token; None without a token
    decode_tokens_per_s: float | None  # rate after the first token; None with fewer than two tokens
    logprobs: tuple[SampledToken, ...] | None  # one a token, if SamplingParams.logprobs asked for them


class Stream:
    """One answer: iterate over its chunks once; `completion` holds what has been made so far, in the end all of it.

    The stream holds the model from the first chunk until the loop over it is left, or until `close`.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        max_tokens: int | None,
        stop_strings: tuple[str, ...],
        stop_tokens: frozenset[int],
        started_at: float,
    ) -> None:
        self._session = session
        self._with_logprobs = sampling.logprobs is not None
        self._stop_tokens = stop_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop_strings = StopStrings(stop_strings)
        self._started_at, self._first_at, self._last_at = started_at, 0.0, 0.0
        self._prompt_tokens = len(session)
        self._tokens: list[SampledToken] = []
        self._text: list[str] = []
        self._stopped = False
        self._started = False
        self._sampled = session.stream(sampling, max_tokens, stop_tokens)

    def __iter__(self) -> Iterator[Chunk]:
        if self._started:
            raise InvalidRequest("the stream was iterated over before: ask the model for a new one")
        self._started = True
        return self._chunks()

    def _chunks(self) -> Iterator[Chunk]:
        # A generator that nothing else refers to: when a loop over it is left, it is closed at once.
        with closing(self._sampled):
            for token in self._sampled:
                self._last_at = time.perf_counter()
                if not self._tokens:
                    self._first_at = self._last_at
                self._tokens.append(token)
                new = "" if token.id in self._stop_tokens else self._detokenizer.push(token.id)
                text, self._stopped = self._stop_strings.push(new)
                self._text.append(text)
                yield Chunk(text, (token,))
                if self._stopped:
                    return
        text, self._stopped = self._stop_strings.push(self._detokenizer.flush())
        if not self._stopped:
            text += self._stop_strings.flush()
        if text:
            self._text.append(text)
            yield Chunk(text, ())

    def cancel(self) -> None:
        """End the stream within one token. Any thread may call this."""
        self._session.cancel()

    def close(self) -> None:
        """End the stream now and let the next one have the model."""
        self._sampled.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """The answer as far as it has been made; final once the iterator has ended or was closed."""
        count = len(self._tokens)
        seconds = self._last_at - self._first_at
        return Completion(
            text="".join(self._text),
            tokens=tuple(token.id for token in self._tokens),
            finish_reason="stop" if self._stopped else self._session.finish_reason or "cancelled",
            usage=Usage(self._prompt_tokens, count),
            ttft_s=self._first_at - self._started_at if count else None,
            decode_tokens_per_s=(count - 1) / seconds if count > 1 and seconds > 0 else None,
            logprobs=tuple(self._tokens) if self._with_logprobs else None,
        )


class AsyncStream:
    """The same for asyncio: `async for chunk in stream:`, then `stream.completion`.

    A thread of its own generates, so the event loop is never blocked. Leaving the loop early, or cancelling the task,
    stops the generation within one token.
    """

    def __init__(self, open_stream: Callable[[], Stream]) -> None:
        self._open_stream = open_stream
        self._stream: Stream | None = None
        self._cancelled = threading.Event()
        self._started = False

    def cancel(self) -> None:
        """End the stream within one token; the chunks made so far still arrive."""
        self._cancelled.set()
        if self._stream is not None:
            self._stream.cancel()

    @property
    def completion(self) -> Completion:
        """As `Stream.completion`."""
        if self._stream is None:
            raise InvalidRequest("the stream has not started: iterate over it first")
        return self._stream.completion

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        if self._started:
            raise InvalidRequest("the stream was iterated over before: ask the model for a new one")
        self._started = True
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue()  # None: no more

        def work() -> None:
            try:
                with self._open_stream() as stream:
                    self._stream = stream
                    if self._cancelled.is_set():
                        stream.cancel()
                    for chunk in stream:
                        loop.call_soon_threadsafe(queue.put_nowait, chunk)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onekernel-stream")
        done = loop.run_in_executor(worker, work)
        worker.shutdown(wait=False)
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
        finally:
            self.cancel()
            await asyncio.shield(done)  # raises what `work` raised
