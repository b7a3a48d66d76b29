"""Chat completions: the form of answers and streams, and the checks that ask for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from onekernel.probe import tool
from onekernel.probe.findings import Findings, at, is_count, items, shown
from onekernel.probe.target import Answer, EventStream, Target

PATH = "/v1/chat/completions"
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
QUESTION = "Say hello, then count from one to ten."
TOOLS = [
    {
        "type": "function",
        "function": {"name": tool.NAME, "description": tool.DESCRIPTION, "parameters": tool.SCHEMA},
    }
]
AT_ONCE = 4  # streams of the check for concurrency


def request(target: Target, question: str = QUESTION, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": target.model, "messages": messages, "max_tokens": 48, "temperature": 0, **more}


# ---- the form


def check_answer(answer: Answer, findings: Findings) -> None:
    """A whole answer that is not streamed."""
    if not findings.require(answer.status == 200, f"status {answer.status} instead of 200: {shown(answer.text)}"):
        return
    data = answer.data
    if not findings.require(isinstance(data, dict), f"the answer is not a JSON object: {shown(answer.text)}"):
        return
    findings.require("application/json" in answer.content_type, f"content-type is {answer.content_type!r}, not JSON")
    _check_top(data, "chat.completion", findings)
    if not findings.require(len(items(data.get("choices"))) == 1, "there is not exactly one choice"):
        return
    choice = data["choices"][0]
    findings.require(at(choice, "index") == 0, "the choice has no index 0")
    message = at(choice, "message")
    findings.require(at(message, "role") == "assistant", f"the role of the answer is {shown(at(message, 'role'))}")
    content = at(message, "content")
    findings.require(content is None or isinstance(content, str), f"the content is {shown(content)}, not a string")
    if not items(at(message, "tool_calls")):
        findings.require(content or reasoning(message), "the answer is empty")
    reason = at(choice, "finish_reason")
    findings.require(reason in FINISH_REASONS, f"finish_reason is {shown(reason)}")
    check_usage(data.get("usage"), findings)


def check_stream(stream: EventStream, findings: Findings, *, usage: bool = True) -> None:
    """A whole stream; `usage` tells whether stream_options.include_usage was asked for."""
    if not opened(stream, findings):
        return
    texts = [event.text for event in stream.events]
    findings.require(texts[-1:] == ["[DONE]"], "the stream does not end with [DONE]")
    findings.require(texts.count("[DONE]") <= 1, "[DONE] comes more than once")
    chunks = [event.data for event in stream.events if event.text != "[DONE]"]
    for event, chunk in zip(stream.events, chunks, strict=False):
        findings.require(isinstance(chunk, dict), f"an event is not a JSON object: {shown(event.text)}")
    chunks = [chunk for chunk in chunks if isinstance(chunk, dict)]
    findings.require(not any("error" in chunk for chunk in chunks), "the stream holds an error")
    for chunk in chunks:
        _check_top(chunk, "chat.completion.chunk", findings)
        findings.require(isinstance(chunk.get("choices"), list), "a chunk has no list of choices")
    findings.require(len({shown(chunk.get("id")) for chunk in chunks}) <= 1, "the id differs from chunk to chunk")
    _check_deltas(chunks, findings)
    with_usage = [chunk for chunk in chunks if chunk.get("usage")]
    if usage and findings.require(with_usage, "usage is missing, though stream_options.include_usage asked for it"):
        findings.require(with_usage[-1] is chunks[-1], "the chunk with the usage is not the last one")
        findings.require(with_usage[-1].get("choices") == [], "the chunk with the usage has choices that are not []")
        check_usage(with_usage[-1]["usage"], findings)


def opened(stream: EventStream, findings: Findings) -> bool:
    """Whether it is a stream of events at all; what holds for those of every API."""
    if not findings.require(stream.status == 200, f"status {stream.status} instead of 200: {shown(stream.text)}"):
        return False
    is_stream = "text/event-stream" in stream.content_type
    findings.require(is_stream, f"content-type is {stream.content_type!r}, not text/event-stream")
    findings.require(stream.broken is None, f"the connection broke within the stream ({stream.broken})")
    for line in stream.strange_lines[:1]:
        findings.fault(f"a line that is not a server-sent event: {shown(line)}")
    return findings.require(stream.events, "the stream has no event")


def _check_top(data: dict[str, Any], kind: str, findings: Findings) -> None:
    findings.require(data.get("object") == kind, f"object is {shown(data.get('object'))}, not {kind!r}")
    for name in ("id", "model"):
        findings.require(isinstance(data.get(name), str) and data[name], f"{name} is missing")
    findings.require(is_count(data.get("created")), "created is not a time in seconds")


def _check_deltas(chunks: list[dict[str, Any]], findings: Findings) -> None:
    choices = [choice for chunk in chunks for choice in items(chunk.get("choices"))]
    deltas = [at(choice, "delta") for choice in choices]
    findings.require(all(isinstance(delta, dict) for delta in deltas), "a choice of a chunk has no delta")
    findings.require(at(deltas, 0, "role") == "assistant", "the first delta does not give the role 'assistant'")
    reasons = [at(choice, "finish_reason") for choice in choices]
    given = [reason for reason in reasons if reason is not None]
    findings.require(given, "finish_reason is never given")
    findings.require(len(given) <= 1, "finish_reason is given more than once")
    for reason in given:
        findings.require(reason in FINISH_REASONS, f"finish_reason is {shown(reason)}")
    if given and reasons[-1] is None:
        findings.fault("deltas come after the finish_reason")
    text = stream_text(chunks)
    findings.require(text or stream_calls(chunks), "the stream brings neither text nor a tool call")


def check_usage(usage: Any, findings: Findings) -> None:
    if not findings.require(isinstance(usage, dict), "usage is missing"):
        return
    prompt, completion, total = (usage.get(f"{kind}_tokens") for kind in ("prompt", "completion", "total"))
    if findings.require(all(map(is_count, (prompt, completion, total))), f"usage is not counts: {shown(usage)}"):
        findings.require(prompt + completion == total, f"usage does not add up: {prompt} + {completion} != {total}")
        findings.require(prompt > 0, "usage counts no tokens of the prompt")
        findings.require(completion > 0, "usage counts no tokens of the answer")


def reasoning(message: Any) -> str:
    """The thinking in a message or delta: servers name it in two ways."""
    return at(message, "reasoning_content") or at(message, "reasoning") or ""


def stream_text(chunks: list[Any]) -> str:
    """All text of a stream, thinking first."""
    deltas = [at(choice, "delta") for chunk in chunks for choice in items(at(chunk, "choices"))]
    parts = [reasoning(delta) for delta in deltas] + [at(delta, "content") or "" for delta in deltas]
    return "".join(part for part in parts if isinstance(part, str))


def stream_calls(chunks: list[Any]) -> list[Any]:
    """All pieces of tool calls of a stream."""
    deltas = [at(choice, "delta") for chunk in chunks for choice in items(at(chunk, "choices"))]
    return [piece for delta in deltas for piece in items(at(delta, "tool_calls"))]


# ---- the checks


def whole(target: Target, findings: Findings) -> None:
    check_answer(target.need(PATH, request(target)), findings)


def streamed(target: Target, findings: Findings) -> None:
    stream = target.stream(PATH, request(target, stream_options={"include_usage": True}))
    check_stream(stream, findings)


def limits(target: Target, findings: Findings) -> None:
    """max_tokens is kept to; one beyond the context is cut to what there is room for, as agents always ask for much."""
    answer = target.need(PATH, request(target, max_tokens=3))
    check_answer(answer, findings)
    made = at(answer.data, "usage", "completion_tokens")
    if is_count(made):
        findings.require(made <= 3, f"{made} tokens were made, though max_tokens was 3")
        reason = at(answer.data, "choices", 0, "finish_reason")
        findings.require(
            made < 3 or reason == "length", f"finish_reason is {shown(reason)} at max_tokens, not 'length'"
        )
    stream = target.stream(PATH, request(target, max_tokens=10_000_000), most_events=2)
    findings.require(stream.status == 200, f"max_tokens beyond the context is refused: {shown(stream.text)}")


def stops(target: Target, findings: Findings) -> None:
    """A stop string never appears in the answer."""
    text = at(target.need(PATH, request(target)).data, "choices", 0, "message", "content")
    if not isinstance(text, str) or len(text) < 4:
        findings.note("not checked: the answer is too short to choose a stop string of it")
        return
    stop = text[len(text) // 2 :][:2]
    for key in (stop, [stop]):
        answer = target.post(PATH, request(target, stop=key))
        if findings.require(answer.status == 200, f"stop = {shown(key)} is refused: {shown(answer.text)}"):
            content = at(answer.data, "choices", 0, "message", "content")
            findings.require(stop not in (content or ""), "the answer holds the stop string")
    chunks = [event.data for event in target.stream(PATH, request(target, stop=stop)).events]
    findings.require(stop not in stream_text(chunks), "the stream holds the stop string")


def _required(target: Target) -> dict[str, Any]:
    # One call only: a small model would call again and again until max_tokens.
    return request(
        target,
        tool.QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=tool.MAX_TOKENS,
    )


def tools(target: Target, findings: Findings) -> None:
    """A call that is required comes, whole and in pieces, and its result is taken back."""
    body = _required(target)
    answer = target.need(PATH, body)
    check_answer(answer, findings)
    message = at(answer.data, "choices", 0, "message")
    calls = items(at(message, "tool_calls"))
    if findings.require(calls, "tool_choice 'required' brought no tool call"):
        for call in calls:
            findings.require(isinstance(at(call, "id"), str) and call["id"], "a tool call has no id")
            findings.require(at(call, "type") == "function", "the type of a tool call is not 'function'")
            tool.check_name(at(call, "function", "name"), findings)
            tool.check_arguments(at(call, "function", "arguments"), findings)
        reason = at(answer.data, "choices", 0, "finish_reason")
        findings.require(reason == "tool_calls", f"finish_reason is {shown(reason)} with a tool call, not 'tool_calls'")
        results = [{"role": "tool", "tool_call_id": at(call, "id"), "content": "Snow."} for call in calls]
        back = request(target, tool.QUESTION, tools=TOOLS)
        back["messages"] += [{**message, "role": "assistant"}, *results]
        returned = target.post(PATH, back)
        findings.require(returned.status == 200, f"the result of a tool call is refused: {shown(returned.text)}")


def tools_streamed(target: Target, findings: Findings) -> None:
    body = _required(target)
    stream = target.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    check_stream(stream, findings)
    pieces = stream_calls([event.data for event in stream.events])
    if not findings.require(pieces, "tool_choice 'required' brought no tool call"):
        return
    calls: dict[Any, list[Any]] = {}
    for piece in pieces:
        index = at(piece, "index")
        if not findings.require(is_count(index), "a piece of a tool call has no index"):
            return
        calls.setdefault(index, []).append(piece)
    for parts in calls.values():
        first = parts[0]
        findings.require(isinstance(at(first, "id"), str) and first["id"], "the first piece of a tool call has no id")
        tool.check_name(at(first, "function", "name"), findings)
        arguments = [at(part, "function", "arguments") for part in parts]
        given = [piece for piece in arguments if piece is not None]
        if findings.require(
            all(isinstance(piece, str) for piece in given), "a piece of tool arguments is not a string"
        ):
            tool.check_arguments("".join(given), findings)
    reasons = [at(event.data, "choices", 0, "finish_reason") for event in stream.events]
    findings.require("tool_calls" in reasons, "finish_reason is not 'tool_calls' after a tool call")


def histories(target: Target, findings: Findings) -> None:
    """What agents send back: other roles, system messages in between, lists of parts, calls that were malformed."""
    parts = [{"type": "text", "text": "Hello."}]
    call = {"id": "call_1", "type": "function", "function": {"name": tool.NAME, "arguments": '{"city": "Os'}}
    conversations = {
        "the role 'developer'": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello."}],
        "content as a list of parts": [{"role": "user", "content": parts}],
        "a system message after others": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "system", "content": "Answer in English."},
            {"role": "user", "content": "Hello?"},
        ],
        "a tool call with broken arguments in the history": [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "invalid JSON"},
        ],
    }
    for name, messages in conversations.items():
        answer = target.need(PATH, request(target, max_tokens=4, tools=TOOLS, messages=messages))
        findings.require(answer.status == 200, f"{name} is refused: status {answer.status}, {shown(answer.text)}")


def concurrent(target: Target, findings: Findings) -> None:
    """Several streams at once, each whole."""
    body = request(target, stream_options={"include_usage": True})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        streams = list(pool.map(lambda _: target.stream(PATH, body), range(AT_ONCE)))
    for stream in streams:
        if stream.status == 429:
            findings.note(f"fewer than {AT_ONCE} requests at once: the others got 429")
        else:
            check_stream(stream, findings)
    ids = [at(stream.events, 0) and stream.events[0].data for stream in streams if stream.status == 200]
    names = [shown(at(chunk, "id")) for chunk in ids]
    findings.require(len(set(names)) == len(names), "two answers have the same id")
