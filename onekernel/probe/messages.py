"""Anthropic's Messages API: the form of answers and streams, and the checks that ask for them."""

from __future__ import annotations

import json
from typing import Any

from onekernel.probe import tool
from onekernel.probe.chat import opened
from onekernel.probe.findings import Absent, Findings, at, is_count, items, shown
from onekernel.probe.target import Answer, Event, EventStream, Target

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
QUESTION = "Say hello, then count from one to ten."
TOOLS: list[dict[str, Any]] = [
    {"name": tool.NAME, "description": tool.DESCRIPTION, "input_schema": tool.SCHEMA},
]
STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal")
DELTAS = {
    "text": ("text_delta",),
    "thinking": ("thinking_delta", "signature_delta"),
    "tool_use": ("input_json_delta",),
}


def request(target: Target, question: Any = QUESTION, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": target.model, "messages": messages, "max_tokens": 48, "temperature": 0, **more}


# ---- the form


def check_answer(answer: Answer, findings: Findings) -> None:
    """A whole answer that is not streamed."""
    if not findings.require(answer.status == 200, f"status {answer.status} instead of 200: {shown(answer.text)}"):
        return
    findings.require("application/json" in answer.content_type, f"content-type is {answer.content_type!r}, not JSON")
    message = answer.data
    if not findings.require(isinstance(message, dict), f"the answer is not a JSON object: {shown(answer.text)}"):
        return
    _check_head(message, findings)
    reason = message.get("stop_reason")
    findings.require(reason in STOP_REASONS, f"stop_reason is {shown(reason)}")
    if findings.require(isinstance(message.get("content"), list) and message["content"], "the answer has no content"):
        for block in message["content"]:
            kind = at(block, "type")
            findings.require(kind in tuple(DELTAS), f"a block of the content has the type {shown(kind)}")
    _check_usage(message.get("usage"), findings)


def check_stream(stream: EventStream, findings: Findings) -> None:
    """A whole stream: names and order of the events, and that each block is opened, filled and closed."""
    if not opened(stream, findings):
        return
    for event in stream.events:
        if not findings.require(isinstance(event.data, dict), f"an event is not a JSON object: {shown(event.text)}"):
            return
        kind = event.data.get("type")
        findings.require(event.name == kind, f"the event {shown(event.name)} holds the type {shown(kind)}")
    # Pings may come anywhere.
    events = [event for event in stream.events if event.data.get("type") != "ping"]
    kinds = [event.data.get("type") for event in events]
    findings.require("error" not in kinds, "the stream holds an error")
    if findings.require(kinds[:1] == ["message_start"], f"the first event is {shown(kinds[:1])}, not message_start"):
        message = events[0].data.get("message")
        _check_head(message, findings)
        findings.require(at(message, "content") == [], "message_start has content already")
        _check_usage(at(message, "usage"), findings, made=False)
    findings.require(kinds[-1:] == ["message_stop"], f"the stream ends with {shown(kinds[-1:])}, not message_stop")
    findings.require(kinds.count("message_stop") <= 1, "message_stop comes more than once")
    ends = [event.data for event in events if event.data.get("type") == "message_delta"]
    if findings.require(ends, "message_delta never comes"):
        findings.require(kinds[-2:-1] == ["message_delta"], "message_delta is not the last event before message_stop")
        reason = at(ends[-1], "delta", "stop_reason")
        findings.require(reason in STOP_REASONS, f"stop_reason is {shown(reason)}")
        findings.require(is_count(at(ends[-1], "usage", "output_tokens")), "usage is missing in message_delta")
    _check_blocks(events, findings)


def _check_blocks(events: list[Event], findings: Findings) -> None:
    started, kind, is_open = 0, None, False
    for event in events:
        data = event.data
        name, index = str(data.get("type")), data.get("index")
        if name == "content_block_start":
            findings.require(not is_open, "a block starts before the one before has stopped")
            findings.require(index == started, f"the index of a block is {shown(index)} instead of {started}")
            kind, is_open, started = at(data, "content_block", "type"), True, started + 1
            findings.require(kind in tuple(DELTAS), f"a block has the type {shown(kind)}")
            if kind == "tool_use":
                named = at(data, "content_block", "id") and at(data, "content_block", "name")
                findings.require(named, "a tool_use block has no id or no name")
        elif name in ("content_block_delta", "content_block_stop"):
            if not findings.require(is_open, f"{name} comes before content_block_start"):
                continue
            findings.require(index == started - 1, f"{name} has the index of another block")
            delta = at(data, "delta", "type")
            if name == "content_block_stop":
                is_open = False
            else:
                findings.require(delta in DELTAS.get(str(kind), ()), f"a block of {kind!r} gets a {shown(delta)}")
        elif name in ("message_delta", "message_stop"):
            findings.require(not is_open, "content_block_stop is missing")
            is_open = False
    findings.require(started, "the stream has no content block")


def _check_head(message: Any, findings: Findings) -> None:
    findings.require(at(message, "type") == "message", f"the type is {shown(at(message, 'type'))}, not 'message'")
    findings.require(at(message, "role") == "assistant", f"the role is {shown(at(message, 'role'))}, not 'assistant'")
    for name in ("id", "model"):
        findings.require(isinstance(at(message, name), str) and at(message, name), f"{name} is missing")


def _check_usage(usage: Any, findings: Findings, *, made: bool = True) -> None:
    if not findings.require(isinstance(usage, dict), "usage is missing"):
        return
    for name in ("input_tokens", "output_tokens"):
        findings.require(is_count(usage.get(name)), f"usage has no {name}")
    if made:
        findings.require(usage.get("output_tokens"), "usage counts no tokens of the answer")


# ---- the checks


def whole(target: Target, findings: Findings) -> None:
    answer = target.need(PATH, request(target))
    check_answer(answer, findings)
    made = at(target.post(PATH, request(target, max_tokens=3)).data, "usage", "output_tokens")
    findings.require(not is_count(made) or made <= 3, f"{made} tokens were made, though max_tokens was 3")


def streamed(target: Target, findings: Findings) -> None:
    check_stream(target.stream(PATH, request(target)), findings)


def tools(target: Target, findings: Findings) -> None:
    """A call that is required comes, whole and in pieces, and its result is taken back."""
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = request(target, tool.QUESTION, tools=TOOLS, tool_choice=choice, max_tokens=tool.MAX_TOKENS)
    answer = target.need(PATH, body)
    check_answer(answer, findings)
    content = items(at(answer.data, "content"))
    calls = [block for block in content if at(block, "type") == "tool_use"]
    if findings.require(calls, "tool_choice 'any' brought no tool_use"):
        for call in calls:
            tool.check_name(at(call, "name"), findings)
            tool.check_value(at(call, "input"), findings)
        reason = at(answer.data, "stop_reason")
        findings.require(reason == "tool_use", f"stop_reason is {shown(reason)} with a tool call, not 'tool_use'")
        results = [{"type": "tool_result", "tool_use_id": at(call, "id"), "content": "Snow."} for call in calls]
        back = request(target, tool.QUESTION, tools=TOOLS)
        back["messages"] += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
        returned = target.post(PATH, back)
        findings.require(returned.status == 200, f"the result of a tool call is refused: {shown(returned.text)}")
    stream = target.stream(PATH, body)
    check_stream(stream, findings)
    _check_streamed_calls([event.data for event in stream.events], findings)


def _check_streamed_calls(events: list[Any], findings: Findings) -> None:
    pieces: dict[str, str] = {}
    for event in events:
        index = shown(at(event, "index"))
        if at(event, "content_block", "type") == "tool_use":
            tool.check_name(at(event, "content_block", "name"), findings)
            pieces[index] = ""
        elif index in pieces and at(event, "type") == "content_block_delta":
            piece = at(event, "delta", "partial_json")
            if findings.require(isinstance(piece, str), "the partial_json of a delta is not a string"):
                pieces[index] += piece
    findings.require(pieces, "tool_choice 'any' brought no tool_use in the stream")
    for text in pieces.values():
        tool.check_arguments(text, findings)
    reasons = [at(event, "delta", "stop_reason") for event in events]
    findings.require("tool_use" in reasons, "stop_reason is not 'tool_use' after a tool call in the stream")


def histories(target: Target, findings: Findings) -> None:
    """What Claude Code sends: system as blocks, marks for the cache, system messages in between, fields of betas."""
    marked = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    said = [{"type": "text", "text": "Hello."}]
    bodies = {
        "system as blocks with cache_control": request(target, system=[marked]),
        "a system message after others": request(
            target,
            messages=[
                {"role": "user", "content": said},
                {"role": "system", "content": "Answer in English."},
                {"role": "assistant", "content": said},
                {"role": "user", "content": said},
            ],
        ),
        "adaptive thinking, effort and context management": request(
            target,
            thinking={"type": "adaptive", "display": "omitted"},
            output_config={"effort": "high"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            metadata={"user_id": json.dumps({"session_id": "probe"})},
        ),
        "a thinking block in the history": request(
            target,
            messages=[
                {"role": "user", "content": "Hello."},
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "They greet.", "signature": "x"}, *said],
                },
                {"role": "user", "content": "Hello?"},
            ],
        ),
    }
    for name, body in bodies.items():
        answer = target.need(f"{PATH}?beta=true", {**body, "max_tokens": 4})
        findings.require(answer.status == 200, f"{name} is refused: status {answer.status}, {shown(answer.text)}")


def count(target: Target, findings: Findings) -> None:
    """The count is what the same request is said to have used."""
    body = request(target)
    answer = target.post(COUNT_PATH, {"model": body["model"], "messages": body["messages"]})
    if answer.status in (404, 405, 501):
        raise Absent(f"POST {COUNT_PATH} answers {answer.status}")
    findings.require(answer.status == 200, f"status {answer.status} instead of 200: {shown(answer.text)}")
    counted = at(answer.data, "input_tokens")
    if findings.require(is_count(counted) and counted > 0, f"input_tokens is {shown(counted)}"):
        usage = at(target.post(PATH, body).data, "usage")
        kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        used = sum(at(usage, kind) or 0 for kind in kinds)
        findings.require(used == counted, f"count_tokens counts {counted}, but the request used {used}")
