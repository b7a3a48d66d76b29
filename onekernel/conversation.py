"""Conversation: a chat of several turns that reads only what is new in each turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from onekernel.api import Model
from onekernel.engine import Snapshot
from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SamplingParams
from onekernel.stream import Chunk, Completion


class Conversation:
    """The messages so far and the session that has read them.

    The prompt of each turn is the chat template's rendering of all messages. The template may render an old answer
    differently from how it was generated (it drops the thinking), so three things can happen, cheapest first: the new
    prompt extends what the session holds; it extends what the session held before the last answer, to which the
    session then returns; or it is read from the start.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingParams,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
    ) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.completion: Completion | None = None
        """The last answer."""
        self._model = model
        self._sampling = sampling
        self._thinking = thinking
        self._max_tokens = max_tokens
        self._stop = stop
        self._session = model.engine.new_session()
        self._before_answer: Snapshot | None = None
        self._cancelled = threading.Event()

    def ask(self, text: str) -> Iterator[Chunk]:
        """Stream the answer to `text`. Question and answer, whole or broken off, join the messages.

        A question that cannot be asked (say it does not fit into the context) leaves the conversation as it was.

        Raises:
            InvalidRequest: the question does not fit, or an answer is still running.
            BackendError: the backend failed. What it said before joins the messages.
        """
        started_at = time.perf_counter()
        self._cancelled.clear()
        question = {"role": "user", "content": text}
        self._read([*self.messages, question])
        stream = self._model.continue_session(self._session, self._sampling, self._max_tokens, self._stop, started_at)
        self.messages.append(question)
        if self._cancelled.is_set():  # while the prompt was being read
            stream.cancel()
        try:
            yield from stream
        finally:
            stream.close()
            self.completion = stream.completion
            self.messages.append({"role": "assistant", "content": self.completion.text})

    def cancel(self) -> None:
        """Break the running answer off within one token. Any thread or signal handler may call this."""
        self._cancelled.set()
        self._session.cancel()

    def _read(self, messages: list[dict[str, Any]]) -> None:
        """Bring the session to the prompt of the answer that follows `messages`."""
        encode, render = self._model.tokenizer.encode, self._model.render
        prompt = encode(render(messages, thinking=self._thinking))
        # All turns to come start like this one up to here; what follows (the opening of the answer) may differ.
        stable = encode(render(messages, thinking=self._thinking, add_generation_prompt=False))
        if not _starts_with(prompt, self._session.tokens):
            if self._before_answer is not None and _starts_with(prompt, self._before_answer.tokens):
                self._session.restore(self._before_answer)
            else:
                self._session = self._model.engine.new_session()
        held = len(self._session)
        if held < len(stable) and _starts_with(prompt, stable):
            self._check_fits(len(prompt))
            self._session.extend(stable[held:])
            self._before_answer = self._session.snapshot()
            held = len(stable)
        self._session.extend(prompt[held:])

    def _check_fits(self, length: int) -> None:
        """Before the session changes: raises InvalidRequest if the prompt leaves no room for an answer."""
        limit = self._model.engine.max_context
        if length >= limit:
            raise InvalidRequest(
                f"the conversation of {length} tokens does not fit into the context of {limit}: start a new one"
            )


def _starts_with(tokens: list[int], prefix: list[int] | tuple[int, ...]) -> bool:
    return len(tokens) >= len(prefix) and tokens[: len(prefix)] == list(prefix)
