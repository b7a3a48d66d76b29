"""Requests that real clients sent (see run.py), sent again: what they rely on must not break between their runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cleaning import FOLDER, clean, load_fixtures
from recorder import parse
from run import REAL
from scripted_agent import DONE, TITLE, make_model
from serving import ServerThread

from onekernel.probe import chat, messages, responses
from onekernel.probe.findings import Findings, at, items
from onekernel.probe.target import EventStream, Target

RECORDED = load_fixtures()
POSTS = [
    pytest.param(request, id=f"{client}-{i}")
    for client, requests in RECORDED.items()
    for i, request in enumerate(request for request in requests if request["method"] == "POST")
]
# What Hermes takes for a server of another kind if it is there.
NOT_OURS = ("/api/v1/models", "/api/tags")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    model = make_model(tmp_path_factory.mktemp("work") / "made.txt")
    with model, ServerThread(model) as server:
        target = Target(server.url, "demo", "not-needed")
        yield target
        target.close()


def check_stream(path: str, body: dict[str, Any], stream: EventStream) -> Findings:
    findings = Findings()
    if path.startswith(chat.PATH):
        chat.check_stream(stream, findings, usage=bool(at(body, "stream_options", "include_usage")))
    elif path.startswith(responses.PATH):
        responses.check_stream(stream, findings)
    else:
        messages.check_stream(stream, findings)
    return findings


def called(stream: EventStream) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of the tool calls in a stream of any of the APIs."""
    found: list[list[str]] = []
    for event in stream.events:
        data = event.data
        for piece in items(at(data, "choices", 0, "delta", "tool_calls")):
            if at(piece, "function", "name"):
                found.append([piece["function"]["name"], ""])
            found[-1][1] += at(piece, "function", "arguments") or ""
        if at(data, "type") == "response.output_item.done" and at(data, "item", "type") == "function_call":
            found.append([data["item"]["name"], data["item"]["arguments"]])
        if at(data, "content_block", "type") == "tool_use":
            found.append([data["content_block"]["name"], ""])
        if at(data, "delta", "type") == "input_json_delta":
            found[-1][1] += data["delta"]["partial_json"]
    return [(name, json.loads(arguments)) for name, arguments in found]


def text(stream: EventStream) -> str:
    parts = []
    for event in stream.events:
        parts += [at(event.data, "choices", 0, "delta", "content") or ""]
        if at(event.data, "type") == "response.output_text.delta":
            parts += [event.data["delta"]]
        if at(event.data, "delta", "type") == "text_delta":
            parts += [event.data["delta"]["text"]]
    return "".join(parts)


def has_result(body: dict[str, Any]) -> bool:
    """Whether the conversation holds the result of a tool."""
    said = json.dumps(body.get("messages", body.get("input")))
    return '"tool_call_id"' in said or '"tool_result"' in said or '"function_call_output"' in said


@pytest.mark.parametrize("request_", POSTS)
def test_the_answer_has_the_form_that_the_client_reads(request_: dict[str, Any], target: Target) -> None:
    path, body = request_["path"], request_["body"]
    stream = target.stream(path, body)
    assert check_stream(path, body, stream).faults == []
    if has_result(body):
        assert text(stream) == DONE
        assert called(stream) == []
    elif body.get("tools"):
        [(_, arguments)] = called(stream)
        assert any("made.txt" in str(value) for value in arguments.values())
    else:
        assert text(stream) == TITLE


@pytest.mark.parametrize("request_", POSTS)
def test_the_same_request_without_a_stream(request_: dict[str, Any], target: Target) -> None:
    path, body = request_["path"], {**request_["body"], "stream": False}
    body.pop("stream_options", None)
    findings = Findings()
    checks = {
        chat.PATH: chat.check_answer,
        responses.PATH: responses.check_answer,
        messages.PATH: messages.check_answer,
    }
    checks[path.partition("?")[0]](target.post(path, body), findings)
    assert findings.faults == []


@pytest.mark.parametrize("client", RECORDED)
def test_the_second_turn_reads_only_what_is_new(client: str, tmp_path: Path) -> None:
    """An agent sends its whole conversation each time: what was read must be found again."""
    posts = [request for request in RECORDED[client] if request["method"] == "POST" and request["body"].get("tools")]
    first, second = posts[0], posts[-1]
    assert has_result(second["body"])
    with make_model(tmp_path / "made.txt") as model, ServerThread(model) as server:
        target = Target(server.url, "demo", "not-needed")
        target.stream(first["path"], first["body"])
        first_prompt, cached = prompt_tokens(target)
        assert cached == 0
        target.stream(second["path"], second["body"])
        both_prompts, cached = prompt_tokens(target)
        target.close()
    assert both_prompts > 2 * first_prompt
    # OpenClaw moves a message that stands last, so its turns share a little less.
    assert cached >= (0.8 if client == "openclaw" else 0.95) * first_prompt


def prompt_tokens(target: Target) -> tuple[int, int]:
    """(tokens of all prompts so far, those of them that were found in the cache)."""
    values = dict(line.rsplit(" ", 1) for line in target.get("/metrics").text.splitlines() if line[:1] != "#")
    read, cached = values["onekernel_prompt_tokens_total"], values["onekernel_prompt_tokens_cached_total"]
    return int(float(read)), int(float(cached))


def test_what_clients_ask_besides(target: Target) -> None:
    gets = {request["path"] for requests in RECORDED.values() for request in requests if request["method"] == "GET"}
    assert {"/v1/models", "/v1/props", *NOT_OURS} <= gets
    for path in gets:
        status = target.get(path).status
        assert status == (404 if path in NOT_OURS else 200), path


def test_every_client_that_is_run_has_its_requests() -> None:
    assert RECORDED.keys() == REAL.keys()
    for name, real in REAL.items():
        assert sum(request["method"] == "POST" for request in RECORDED[name]) == real.posts
        assert json.loads((FOLDER / f"{name}.json").read_text())["client"] == real.package


def test_fixtures_are_small_and_hold_nothing_of_a_machine() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")]
    assert sum(map(len, texts)) < 300_000
    for content in texts:
        for word in ("/root", "/tmp", "home-", "authorization", "api-key", "fc-v"):
            assert word not in content


def test_cleaning_keeps_the_structure_and_nothing_personal() -> None:
    value = {
        "cwd": "/root/x/work",
        "at": "2026-11-24T16:00:00.123Z",
        "n": [1, None, True],
        "id": "call_0123456789abcdef01234567",
        "session": "01a20e72-679b-7410-9e71-360c7e734256",
        "long": "a" * 5000,
    }
    cleaned = clean(value, {"/root/x": "/home/user"})
    assert cleaned["cwd"] == "/home/user/work"
    assert cleaned["at"] == "2026-01-01"
    assert cleaned["n"] == [1, None, True]
    assert cleaned["id"] == "call_0"
    assert cleaned["session"] == "00000000-0000-0000-0000-000000000000"
    assert len(cleaned["long"]) < 200


def test_the_recorder_reads_requests_of_one_connection() -> None:
    first = b'POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"a": 12}'
    second = b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n"
    third = b"GET /c HTTP/1.1\r\nHost: x\r\n\r\n"
    unfinished = b"GET /d HTTP/1.1\r\n"
    requests = parse(first + second + third + unfinished)
    assert [(request["method"], request["path"], request["body"]) for request in requests] == [
        ("POST", "/a", {"a": 12}),
        ("POST", "/b", [1, 2]),
        ("GET", "/c", None),
    ]
