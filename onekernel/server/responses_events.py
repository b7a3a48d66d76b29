"""The events of one answer of /v1/responses, in the order that OpenAI gives them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from onekernel.sampling.params import SampledToken
from onekernel.server.responses_input import INPUT, Tools
from onekernel.server.service import Answer, Batch
from onekernel.text.answer import Event, Thinking
from onekernel.text.tool_calls import CallArguments, CallEnd, CallStart, Text

StreamEvent = dict[str, Any]
Logprobs = Callable[[list[SampledToken]], list[dict[str, Any]]]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseEvents:
    """Turns batches into events, and keeps the response that they describe.

    An answer is a list of items: thinking, messages and calls. One of them is open at a time.
    """

    def __init__(self, echoed: dict[str, Any], tools: Tools, logprobs: Logprobs) -> None:
        """Args:
        echoed: the fields of the request that the response repeats.
        """
        self.response: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            **echoed,
            "output": [],
            "usage": None,
        }
        self._tools = tools
        self._logprobs = logprobs
        self._number = 0
        self._item: dict[str, Any] | None = None  # the open one
        self._text: list[str] = []  # of the open item

    def begin(self) -> Iterator[StreamEvent]:
        yield self._event("response.created", response=self._snapshot())
        yield self.heartbeat()

    def heartbeat(self) -> StreamEvent:
        """Clients count the time between events, so a comment would not do."""
        return self._event("response.in_progress", response=self._snapshot())

    def add(self, batch: Batch) -> Iterator[StreamEvent]:
        tokens = batch.tokens
        for event in batch.events:
            yield from self._add(event, tokens)
            if isinstance(event, Text):
                tokens = []

    def end(self, answer: Answer) -> Iterator[StreamEvent]:
        """Close what is open; completed, or incomplete if a limit cut the answer off."""
        cut = answer.finish_reason == "length"
        yield from self._close("incomplete" if cut else "completed")
        self.response["usage"] = usage(answer)
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        yield self._event(f"response.{self.response['status']}", response=self._snapshot())

    def fail(self, code: str, message: str) -> StreamEvent:
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return self._event("response.failed", response=self._snapshot())

    def _add(self, event: Event, tokens: list[SampledToken]) -> Iterator[StreamEvent]:
        if isinstance(event, Thinking):
            yield from self._open("reasoning")
            yield self._part_event("response.reasoning_text.delta", delta=event.text)
            self._text.append(event.text)
        elif isinstance(event, Text):
            yield from self._open("message")
            logprobs = self._logprobs(tokens)
            yield self._part_event("response.output_text.delta", delta=event.text, logprobs=logprobs)
            self._part()["logprobs"] += logprobs
            self._text.append(event.text)
        elif isinstance(event, CallStart):
            yield from self._close("completed")
            yield from self._open_call(event.name)
        elif isinstance(event, CallArguments):
            self._text.append(event.json)
            if self._kind() == "function_call":
                yield self._item_event("response.function_call_arguments.delta", delta=event.json)
        elif isinstance(event, CallEnd):
            yield from self._close("completed" if event.complete else "incomplete")

    def _open(self, kind: str) -> Iterator[StreamEvent]:
        if self._kind() == kind:
            return
        yield from self._close("completed")
        item: dict[str, Any]
        part: dict[str, Any]
        if kind == "reasoning":
            item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": [], "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._start(item)
        item["content"].append(part)
        yield self._part_event("response.content_part.added", part={**part})

    def _open_call(self, name: str) -> Iterator[StreamEvent]:
        namespace, own_name = self._tools.namespaces.get(name, (None, name))
        item: dict[str, Any] = {"status": "in_progress", "call_id": new_id("call"), "name": own_name}
        if namespace is not None:
            item["namespace"] = namespace
        if name in self._tools.custom:
            item |= {"id": new_id("ctc"), "type": "custom_tool_call", "input": ""}
        else:
            item |= {"id": new_id("fc"), "type": "function_call", "arguments": ""}
        yield from self._start(item)

    def _start(self, item: dict[str, Any]) -> Iterator[StreamEvent]:
        self._item = item
        self._text = []
        self.response["output"].append(item)
        yield self._event(
            "response.output_item.added",
            output_index=self._index(),
            item={**item, "content": []} if "content" in item else {**item},
        )

    def _close(self, status: str) -> Iterator[StreamEvent]:
        item, text = self._item, "".join(self._text)
        if item is None:
            return
        kind = item["type"]
        if kind in ("reasoning", "message"):
            part = item["content"][0]
            part["text"] = text
            if kind == "reasoning":
                yield self._part_event("response.reasoning_text.done", text=text)
            else:
                yield self._part_event("response.output_text.done", text=text, logprobs=part["logprobs"])
            yield self._part_event("response.content_part.done", part={**part})
        elif kind == "function_call":
            item["arguments"] = text
            yield self._item_event("response.function_call_arguments.done", arguments=text, name=item["name"])
        else:
            item["input"] = given = input_of(text)
            yield self._item_event("response.custom_tool_call_input.delta", delta=given)
            yield self._item_event("response.custom_tool_call_input.done", input=given)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._index(), item={**item})
        self._item = None

    def _kind(self) -> str | None:
        return None if self._item is None else self._item["type"]

    def _part(self) -> dict[str, Any]:
        assert self._item is not None
        part: dict[str, Any] = self._item["content"][0]
        return part

    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _part_event(self, kind: str, **fields: Any) -> StreamEvent:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> StreamEvent:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index(), **fields)

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _snapshot(self) -> dict[str, Any]:
        """The response as it is now; events are encoded at once, but tests may keep them."""
        return {**self.response, "output": list(self.response["output"])}


def input_of(arguments: str) -> str:
    """The text that a custom tool is called with, from the arguments of the function that stands for it."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    given = value.get(INPUT) if isinstance(value, dict) else None
    return given if isinstance(given, str) else arguments


def usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.thinking_tokens},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
