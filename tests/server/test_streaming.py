"""Streams that must not look dead, and streams that end before their answer does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from serving import ServerThread
from test_load import wait_for

MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4000}),
    "completions": ("/v1/completions", {"prompt": "hi", "max_tokens": 4000, "ignore_eos": True}),
    "responses": ("/v1/responses", {"input": MESSAGES}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4000}),
}


def blocks(text: str) -> list[str]:
    return text.removesuffix("\n\n").split("\n\n")


def data_of(block: str) -> Any:
    return json.loads(block.split("data: ", 1)[1])


@pytest.mark.parametrize(
    ("api", "is_heartbeat"),
    [
        ("chat", lambda block: block.startswith(": ")),
        ("responses", lambda block: block.startswith("event: response.in_progress")),
        ("messages", lambda block: block.startswith("event: ping")),
    ],
)
def test_silence_is_filled_in_the_way_of_each_api(
    scripted: Callable[..., ServerThread], api: str, is_heartbeat: Callable[[str], bool]
) -> None:
    server = scripted("slow", delay=0.35, heartbeat_s=0.1)
    path, fields = REQUESTS[api]
    text = httpx.post(server.url + path, json={**fields, "stream": True}, timeout=60).text
    assert sum(map(is_heartbeat, blocks(text))) >= 3


@pytest.mark.parametrize("api", REQUESTS)
def test_a_stream_that_is_cut_off_says_so_in_the_form_of_its_api(
    scripted: Callable[..., ServerThread], api: str
) -> None:
    server = scripted("word " * 2000, delay=0.002, grace_s=0.3)
    path, fields = REQUESTS[api]
    texts: list[str] = []

    def read() -> None:
        texts.append(httpx.post(server.url + path, json={**fields, "stream": True}, timeout=60).text)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: server.service.scheduler.running == 1)
    server.stop()
    reader.join(20)
    last = blocks(texts[0])[-1]
    if api == "messages":
        assert last.startswith("event: error")
        assert data_of(last)["error"]["type"] == "overloaded_error"
    elif api == "responses":
        assert last.startswith("event: response.failed")
        assert data_of(last)["response"]["status"] == "failed"
    else:
        assert data_of(last)["error"]["code"] == "shutting_down"
        assert "[DONE]" not in texts[0]
    assert "not complete" in last


def test_an_answer_that_is_cut_off_is_no_answer(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("word " * 2000, delay=0.002, grace_s=0.3)
    answers: list[httpx.Response] = []
    path, fields = REQUESTS["chat"]
    reader = threading.Thread(target=lambda: answers.append(httpx.post(server.url + path, json=fields, timeout=60)))
    reader.start()
    wait_for(lambda: server.service.scheduler.running == 1)
    server.stop()
    reader.join(20)
    assert answers[0].status_code == 503
    assert answers[0].headers["retry-after"]
