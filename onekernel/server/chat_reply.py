"""The answer of /v1/chat/completions: whole, or in chunks as they are made."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from onekernel.errors import OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.server.errors import as_request_error, openai_body
from onekernel.server.logprobs import entries
from onekernel.server.merge import merged
from onekernel.server.service import Answer, Batch, Service
from onekernel.server.streaming import data
from onekernel.text.answer import Thinking
from onekernel.text.tool_calls import CallArguments, CallStart, Text

FINISH = {"stop": "stop", "stop_string": "stop", "tool_calls": "tool_calls", "length": "length"}
HEARTBEAT = b": heartbeat\n\n"


class Reply:
    """What goes back to the client, whole or in chunks."""

    def __init__(self, service: Service, answers: list[Answer], *, logprobs: bool, include_usage: bool) -> None:
        self._service = service
        self._answers = answers
        self._with_logprobs = logprobs
        self._include_usage = include_usage
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        calls = [CallNumbers() for _ in self._answers]
        for index in range(len(self._answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        try:
            async for index, batch in merged(self._answers):
                if batch is None:
                    reason = FINISH.get(self._answers[index].finish_reason, "stop")
                    yield self._chunk(index, {}, finish_reason=reason)
                elif batch.heartbeat:
                    yield HEARTBEAT
                else:
                    yield self._deltas(index, batch, calls[index])
            if self._include_usage:
                yield data({**self._head(), "choices": [], "usage": usage(self._answers)})
            yield b"data: [DONE]\n\n"
        except OnekernelError as error:
            yield data(openai_body(as_request_error(error)))

    async def whole(self) -> dict[str, Any]:
        collected = [Collected() for _ in self._answers]
        tokens: list[list[SampledToken]] = [[] for _ in self._answers]
        async for index, batch in merged(self._answers):
            if batch is not None:
                collected[index].add(batch)
                tokens[index] += batch.tokens
        choices = []
        for i, answer in enumerate(self._answers):
            choices.append(
                {
                    "index": i,
                    "message": collected[i].message(),
                    "logprobs": self._logprobs(tokens[i][: answer.completion_tokens]),
                    "finish_reason": FINISH.get(answer.finish_reason, "stop"),
                }
            )
        head = {**self._common, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": usage(self._answers)}

    def _deltas(self, index: int, batch: Batch, calls: CallNumbers) -> bytes:
        """One chunk an event; tokens without text of their own (parts of a tag) make none, but for their logprobs."""
        chunks = []
        logprobs = self._logprobs(batch.tokens)
        for event in batch.events:
            delta = _delta(event, calls)
            if delta is not None:
                chunks.append(self._chunk(index, delta, logprobs=logprobs))
                logprobs = None
        if logprobs is not None and logprobs["content"]:
            chunks.append(self._chunk(index, {}, logprobs=logprobs))
        return b"".join(chunks)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return data({**self._head(), "choices": [choice]})

    def _head(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk"}

    def _logprobs(self, tokens: list[SampledToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": entries(self._service.model.tokenizer, tokens), "refusal": None}


class CallNumbers:
    """Counts the calls of one choice, and names them."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, name: str) -> dict[str, Any]:
        self.count += 1
        return {
            "index": self.count - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }


def _delta(event: object, calls: CallNumbers) -> dict[str, Any] | None:
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, Thinking):
        return {"reasoning_content": event.text}
    if isinstance(event, CallStart):
        return {"tool_calls": [calls.next(event.name)]}
    if isinstance(event, CallArguments):
        return {"tool_calls": [{"index": calls.count - 1, "function": {"arguments": event.json}}]}
    return None


class Collected:
    """The parts of one whole message."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._numbers = CallNumbers()

    def add(self, batch: Batch) -> None:
        for event in batch.events:
            if isinstance(event, Text):
                self._texts.append(event.text)
            elif isinstance(event, Thinking):
                self._thinking.append(event.text)
            elif isinstance(event, CallStart):
                call = self._numbers.next(event.name)
                del call["index"]
                self._calls.append(call)
            elif isinstance(event, CallArguments):
                self._calls[-1]["function"]["arguments"] += event.json

    def message(self) -> dict[str, Any]:
        content = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self._calls else "")}
        message["refusal"] = None
        if self._thinking:
            message["reasoning_content"] = "".join(self._thinking)
        if self._calls:
            message["tool_calls"] = self._calls
        return message


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Of all choices; they share the prompt, so it counts once."""
    prompt = answers[0].prompt_tokens
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.thinking_tokens for answer in answers)},
    }
