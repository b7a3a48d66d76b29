"""OpenAI's Responses API: the form of answers and streams, and the checks that ask for them."""

from __future__ import annotations

from typing import Any

from onekernel.probe import tool
from onekernel.probe.chat import opened
from onekernel.probe.findings import Findings, at, is_count, items, shown
from onekernel.probe.target import Answer, Event, EventStream, Target

PATH = "/v1/responses"
QUESTION = "Say hello, then count from one to ten."
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": tool.NAME, "description": tool.DESCRIPTION, "parameters": tool.SCHEMA}
]
LAST = ("response.completed", "response.incomplete", "response.failed")
# Within an item, an event may come only after the one that opens what it belongs to.
OPENED_BY = {
    "response.output_text.delta": "response.content_part.added",
    "response.output_text.done": "response.content_part.added",
    "response.content_part.done": "response.content_part.added",
    "response.content_part.added": "response.output_item.added",
    "response.function_call_arguments.delta": "response.output_item.added",
    "response.function_call_arguments.done": "response.output_item.added",
    "response.output_item.done": "response.output_item.added",
}


def request(target: Target, question: Any = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": target.model, "input": question, "max_output_tokens": 48, "temperature": 0, **more}


# ---- the form


def check_answer(answer: Answer, findings: Findings) -> None:
    if not findings.require(answer.status == 200, f"status {answer.status} instead of 200: {shown(answer.text)}"):
        return
    findings.require("application/json" in answer.content_type, f"content-type is {answer.content_type!r}, not JSON")
    check_response(answer.data, findings)


def check_response(response: Any, findings: Findings) -> None:
    """A whole response object."""
    if not findings.require(isinstance(response, dict), f"the response is {shown(response)}, not an object"):
        return
    findings.require(response.get("object") == "response", f"object is {shown(response.get('object'))}")
    findings.require(isinstance(response.get("id"), str) and response["id"], "the response has no id")
    findings.require(
        is_count(response.get("created_at")) or isinstance(response.get("created_at"), float), "no created_at"
    )
    status = response.get("status")
    findings.require(status in ("completed", "incomplete"), f"status of the response is {shown(status)}")
    if status == "incomplete":
        findings.require(at(response, "incomplete_details", "reason"), "an incomplete response gives no reason")
    output = response.get("output")
    if findings.require(isinstance(output, list) and output, "the response has no output"):
        for item in output:
            check_item(item, findings)
    _check_usage(response.get("usage"), findings)


def check_item(item: Any, findings: Findings) -> None:
    """One finished item of the output."""
    kind = at(item, "type")
    if kind == "message":
        findings.require(at(item, "role") == "assistant", "a message of the output has not the role 'assistant'")
        for part in items(at(item, "content")):
            if at(part, "type") == "output_text":
                findings.require(isinstance(at(part, "text"), str), "an output_text has no text")
    elif kind == "function_call":
        findings.require(isinstance(at(item, "call_id"), str) and item["call_id"], "a function_call has no call_id")
        findings.require(isinstance(at(item, "name"), str) and item["name"], "a function_call has no name")
    else:
        findings.require(isinstance(kind, str), f"an item of the output has no type: {shown(item)}")


def check_stream(stream: EventStream, findings: Findings) -> None:
    """A whole stream: names, numbers and order of the events, and that the pieces are the whole."""
    if not opened(stream, findings):
        return
    events = [event for event in stream.events if event.text != "[DONE]"]
    for event in events:
        if not findings.require(isinstance(event.data, dict), f"an event is not a JSON object: {shown(event.text)}"):
            return
        kind = event.data.get("type")
        findings.require(event.name == kind, f"the event {shown(event.name)} holds the type {shown(kind)}")
    kinds = [event.data.get("type") for event in events]
    findings.require("error" not in kinds, "the stream holds an error")
    findings.require(kinds[:1] == ["response.created"], f"the first event is {shown(kinds[:1])}, not response.created")
    findings.require(kinds[-1] in LAST, f"the stream does not end with response.completed, but with {kinds[-1]!r}")
    findings.require(sum(kind in LAST for kind in kinds) == 1, "the response is not completed exactly once")
    numbers = [event.data.get("sequence_number") for event in events]
    findings.require(numbers == list(range(len(numbers))), "sequence_number does not count the events from 0")
    _check_order(events, findings)
    _check_pieces(events, findings)
    last = events[-1].data
    if kinds[-1] in LAST[:2]:
        check_response(last.get("response"), findings)
        done = [event.data.get("item") for event in events if event.data.get("type") == "response.output_item.done"]
        findings.require(done, "response.output_item.done never comes")
        whole = items(at(last, "response", "output"))
        same = [at(item, "id") for item in whole] == [at(item, "id") for item in done]
        findings.require(same, "the output of the last event is not the items that were done")
    ids = {shown(at(event.data, "response", "id")) for event in events if "response" in event.data}
    findings.require(len(ids) <= 1, "the id of the response changes within the stream")


def _check_order(events: list[Event], findings: Findings) -> None:
    open_items: dict[str, set[str]] = {}  # output_index -> kinds of events that came for it
    for event in events:
        kind, index = str(event.data.get("type")), shown(event.data.get("output_index"))
        if kind in LAST:
            unfinished = [i for i, seen in open_items.items() if "response.output_item.done" not in seen]
            findings.require(not unfinished, "an item was added and is never done")
        elif kind in OPENED_BY or kind == "response.output_item.added":
            seen = open_items.setdefault(index, set())
            if "response.output_item.done" in seen:
                findings.fault(f"{kind} comes after response.output_item.done of its item")
            opener = OPENED_BY.get(kind)
            findings.require(opener is None or opener in seen, f"{kind} comes before {opener}")
            seen.add(kind)


def _check_pieces(events: list[Event], findings: Findings) -> None:
    for delta, done, whole in (
        ("response.output_text.delta", "response.output_text.done", "text"),
        ("response.function_call_arguments.delta", "response.function_call_arguments.done", "arguments"),
    ):
        pieces: dict[str, str] = {}
        for event in events:
            data = event.data
            place = shown((data.get("output_index"), data.get("content_index")))
            if data.get("type") == delta:
                piece = data.get("delta")
                if findings.require(isinstance(piece, str), f"the delta of {delta} is not a string"):
                    pieces[place] = pieces.get(place, "") + piece
            elif data.get("type") == done:
                same = pieces.get(place, "") == data.get(whole)
                findings.require(same, f"{done} does not hold what the deltas brought")


def _check_usage(usage: Any, findings: Findings) -> None:
    if not findings.require(isinstance(usage, dict), "usage is missing"):
        return
    given, made, total = usage.get("input_tokens"), usage.get("output_tokens"), usage.get("total_tokens")
    if findings.require(all(map(is_count, (given, made, total))), f"usage is not counts: {shown(usage)}"):
        findings.require(given + made == total, f"usage does not add up: {given} + {made} != {total}")
    for kind, detail in (("input", "cached_tokens"), ("output", "reasoning_tokens")):
        count = at(usage, f"{kind}_tokens_details", detail)
        findings.require(is_count(count), f"usage has no {kind}_tokens_details.{detail}")


# ---- the checks


def whole(target: Target, findings: Findings) -> None:
    check_answer(target.need(PATH, request(target)), findings)


def streamed(target: Target, findings: Findings) -> None:
    check_stream(target.stream(PATH, request(target)), findings)


def tools(target: Target, findings: Findings) -> None:
    """A call that is required comes, whole and in pieces, and its result is taken back, as text and as a list."""
    body = request(
        target,
        tool.QUESTION,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=tool.MAX_TOKENS,
    )
    answer = target.need(PATH, body)
    check_answer(answer, findings)
    output = items(at(answer.data, "output"))
    _check_calls(output, findings)
    for result in ("Snow.", [{"type": "input_text", "text": "Snow."}]):
        calls = [item for item in output if at(item, "type") == "function_call"]
        results = [{"type": "function_call_output", "call_id": at(call, "call_id"), "output": result} for call in calls]
        back = [{"type": "message", "role": "user", "content": tool.QUESTION}, *output, *results]
        returned = target.post(PATH, request(target, back, tools=TOOLS))
        kind = "a string" if isinstance(result, str) else "a list"
        findings.require(returned.status == 200, f"a result as {kind} is refused: {shown(returned.text)}")
    stream = target.stream(PATH, body)
    check_stream(stream, findings)
    done = [event.data for event in stream.events if at(event.data, "type") == "response.output_item.done"]
    _check_calls([at(data, "item") for data in done], findings)


def _check_calls(output: list[Any], findings: Findings) -> None:
    calls = [item for item in output if at(item, "type") == "function_call"]
    findings.require(calls, "tool_choice 'required' brought no function_call")
    for call in calls:
        tool.check_name(at(call, "name"), findings)
        tool.check_arguments(at(call, "arguments"), findings)


def histories(target: Target, findings: Findings) -> None:
    """What Codex sends: items of the role 'developer', reasoning, tools of other kinds, and an empty warm-up."""
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}
    developer = {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}
    thought = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "They greet."}],
        "encrypted_content": None,
    }
    reply = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]}
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /[^x]+/"}
    other_tools = [
        *TOOLS,
        {"type": "web_search", "external_web_access": True},
        {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar},
        {"type": "namespace", "name": "agents", "description": "Others.", "tools": [{**TOOLS[0], "name": "spawn"}]},
    ]
    bodies = {
        "the role 'developer'": request(target, [developer, message]),
        "instructions": request(target, [message], instructions="Be brief."),
        "a reasoning item in the history": request(target, [message, thought, reply, message]),
        "tools of other kinds": request(target, [message], tools=other_tools),
        "store: false, include and prompt_cache_key": request(
            target, [message], store=False, include=["reasoning.encrypted_content"], prompt_cache_key="probe"
        ),
        "an empty input (a warm-up)": request(target, ""),
    }
    for name, body in bodies.items():
        answer = target.need(PATH, {**body, "max_output_tokens": 16})
        findings.require(answer.status == 200, f"{name} is refused: status {answer.status}, {shown(answer.text)}")
