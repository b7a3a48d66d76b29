"""Whatever a model writes, and in whatever pieces: the events of an answer follow the rules of their API."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

from anthropic.types import RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from serving import DEMO

from onekernel.sampling.params import SampledToken
from onekernel.server.messages_events import MessageEvents
from onekernel.server.responses_events import ResponseEvents
from onekernel.server.responses_input import Tools
from onekernel.server.service import Batch
from onekernel.text.answer import AnswerParser
from onekernel.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(DEMO)
FUNCTION: Any = {
    "type": "function",
    "name": "run",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}, "n": {"type": "integer"}}},
}
CUSTOM: Any = {"type": "custom", "name": "patch", "description": "x"}
PARTS = [
    "some text ", "é🙂", "\n\n", "<think>", "</think>", "<tool_call>\n", "<function=run>\n", "<function=patch>\n",
    "<parameter=cmd>\n", "<parameter=input>\n", "<parameter=n>\n", "7", "\n</parameter>\n", "</function>\n",
    "</tool_call>",
    "<tool_call>\n<function=run>\n<parameter=cmd>\nls\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=patch>\n<parameter=input>\n+x\n</parameter>\n</function>\n</tool_call>",
]  # fmt: skip
RESPONSE: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
texts = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


def batches(text: str, thinking: bool, seed: int, tools: Tools) -> tuple[list[Batch], AnswerParser]:
    """The text as it would come from a model: token by token, some of them together."""
    parser = AnswerParser(TOKENIZER, thinking=thinking, tools=tools.functions)
    tokens = [SampledToken(token) for token in TOKENIZER.encode(text)]
    made, chance = [], random.Random(seed)
    while tokens:
        size = chance.randint(1, 5)
        made.append(Batch(parser.push(tokens[:size]), tokens[:size]))
        tokens = tokens[size:]
    made.append(Batch(parser.flush()))
    return made, parser


def answer(parser: AnswerParser, reason: str) -> Any:
    """What the events ask of an answer at its end."""
    return SimpleNamespace(
        finish_reason=reason,
        stop_string=None,
        prompt_tokens=5,
        cached_tokens=2,
        completion_tokens=parser.tokens,
        thinking_tokens=parser.thinking_tokens,
    )


def tools_of_request() -> Tools:
    tools = Tools()
    tools.add(FUNCTION, "tools[0]")
    tools.add(CUSTOM, "tools[1]")
    return tools


@settings(max_examples=150, deadline=None)
@given(texts, st.booleans(), st.integers(), st.sampled_from(["stop", "length", "tool_calls"]))
def test_responses(text: str, thinking: bool, seed: int, reason: str) -> None:
    tools = tools_of_request()
    echoed = {"model": "m", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [FUNCTION, CUSTOM]}
    made, parser = batches(text, thinking, seed, tools)
    maker = ResponseEvents(echoed, tools, lambda _: [])
    events = [json.loads(json.dumps(event)) for event in maker.begin()]
    for batch in made:
        events += [json.loads(json.dumps(event)) for event in maker.add(batch)]
    events += [json.loads(json.dumps(event)) for event in maker.end(answer(parser, reason))]
    for event in events:
        RESPONSE.validate_python(event, strict=False)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == ("response.incomplete" if reason == "length" else "response.completed")
    open_item: dict[str, Any] | None = None
    done: list[Any] = []
    deltas = ""
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_item is None
            open_item, deltas = event["item"], ""
            assert event["output_index"] == len(done)
        elif kind == "response.output_item.done":
            assert open_item is not None
            assert event["item"]["id"] == open_item["id"]
            item = event["item"]
            given_out = item.get("arguments", item.get("input"))
            assert deltas == (item["content"][0]["text"] if given_out is None else given_out)
            done.append(item)
            open_item = None
        else:
            assert open_item is not None, kind
            assert event["item_id"] == open_item["id"]
            assert event["output_index"] == len(done)
            deltas += event.get("delta", "")
    assert open_item is None
    assert events[-1]["response"]["output"] == done


@settings(max_examples=150, deadline=None)
@given(texts, st.booleans(), st.integers(), st.sampled_from(["stop", "length", "tool_calls"]))
def test_messages(text: str, thinking: bool, seed: int, reason: str) -> None:
    made, parser = batches(text, thinking, seed, tools_of_request())
    maker = MessageEvents("m", True)
    final = answer(parser, reason)
    events: list[dict[str, Any]] = [json.loads(json.dumps(maker.begin(final)))]
    for batch in made:
        events += [json.loads(json.dumps(event)) for event in maker.add(batch)]
    events += [json.loads(json.dumps(event)) for event in maker.end(final)]
    for event in events:
        MESSAGE.validate_python(event)
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    opened = 0
    is_open = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == opened
            is_open, opened = True, opened + 1
        else:
            assert is_open
            assert event["index"] == opened - 1
            is_open = event["type"] != "content_block_stop"
    assert not is_open
    assert len(maker.message["content"]) == opened
