"""The events of one answer of /v1/messages, in the order that Anthropic gives them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from onekernel.server.service import Answer, Batch
from onekernel.text.answer import Event, Thinking
from onekernel.text.tool_calls import CallArguments, CallEnd, CallStart, Text

StreamEvent = dict[str, Any]
STOP_REASONS = {"stop": "end_turn", "stop_string": "stop_sequence", "tool_calls": "tool_use", "length": "max_tokens"}
PING: StreamEvent = {"type": "ping"}


class MessageEvents:
    """Turns batches into events, and keeps the message that they describe.

    A message is a list of blocks: thinking, text and tool uses. One of them is open at a time.
    """

    def __init__(self, model: str, show_thinking: bool) -> None:
        """Args:
        show_thinking: whether the text of the thinking is given out; its block is there in any case.
        """
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }
        self._show_thinking = show_thinking
        self._block: dict[str, Any] | None = None  # the open one
        self._text: list[str] = []  # of the open block

    def begin(self, answer: Answer) -> StreamEvent:
        """When the first batch is there: then it is known how much of the prompt was in the cache."""
        self.message["usage"] = {**usage(answer), "output_tokens": 0}
        return {"type": "message_start", "message": {**self.message, "content": []}}

    def add(self, batch: Batch) -> Iterator[StreamEvent]:
        for event in batch.events:
            yield from self._add(event)

    def end(self, answer: Answer) -> Iterator[StreamEvent]:
        yield from self._close()
        reason = STOP_REASONS.get(answer.finish_reason, "end_turn")
        self.message |= {"stop_reason": reason, "stop_sequence": answer.stop_string, "usage": usage(answer)}
        delta = {"stop_reason": reason, "stop_sequence": answer.stop_string}
        yield {"type": "message_delta", "delta": delta, "usage": usage(answer)}
        yield {"type": "message_stop"}

    def _add(self, event: Event) -> Iterator[StreamEvent]:
        if isinstance(event, Thinking):
            yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
            self._text.append(event.text)
            if self._show_thinking:
                yield self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, Text):
            yield from self._open({"type": "text", "text": ""})
            self._text.append(event.text)
            yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, CallStart):
            yield from self._close()
            name = event.name
            yield from self._open(
                {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
            )
        elif isinstance(event, CallArguments):
            self._text.append(event.json)
            yield self._delta({"type": "input_json_delta", "partial_json": event.json})
        elif isinstance(event, CallEnd):
            yield from self._close()

    def _open(self, block: dict[str, Any]) -> Iterator[StreamEvent]:
        if self._block is not None:
            if self._block["type"] == block["type"]:
                return
            yield from self._close()
        self._block, self._text = block, []
        self.message["content"].append(block)
        yield {"type": "content_block_start", "index": self._index(), "content_block": {**block}}

    def _close(self) -> Iterator[StreamEvent]:
        block, text = self._block, "".join(self._text)
        if block is None:
            return
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            block["thinking"] = text if self._show_thinking else ""
            # Clients send it back with the block, and need it to be there.
            block["signature"] = "onekernel"
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        else:
            block["input"] = _object(text)
        yield {"type": "content_block_stop", "index": self._index()}
        self._block = None

    def _delta(self, delta: dict[str, Any]) -> StreamEvent:
        return {"type": "content_block_delta", "index": self._index(), "delta": delta}

    def _index(self) -> int:
        return len(self.message["content"]) - 1


def usage(answer: Answer) -> dict[str, Any]:
    """Anthropic's input_tokens are those that were read, without those from the cache."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"thinking_tokens": answer.thinking_tokens},
    }


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; nothing of a call that was cut off: nobody should run it."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
