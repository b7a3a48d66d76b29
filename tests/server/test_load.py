"""Many clients at once, clients that misbehave, and the end of the process under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerThread

import onekernel

ROOT = Path(onekernel.__file__).parent.parent
STREAMS = 200
TOKENS = 5
PROMPTS = [f"def function_{i}(" for i in range(10)]


class Heard:
    """What one stream brought."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.done = False
        self.error: Any = None
        self.broken: Exception | None = None

    def line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error")
            for choice in event.get("choices", []):
                self.text += choice.get("text", "")
                self.finish_reason = choice["finish_reason"] or self.finish_reason


async def stream(client: httpx.AsyncClient, url: str, prompt: str, tokens: int, heard: Heard) -> None:
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                heard.error = json.loads(await answer.aread())["error"]
                return
            async for line in answer.aiter_lines():
                heard.line(line)
    except httpx.HTTPError as error:
        heard.broken = error


def stream_many(url: str, prompts: list[str], tokens: int, meanwhile: Callable[[], None] | None = None) -> list[Heard]:
    async def work() -> list[Heard]:
        heard = [Heard() for _ in prompts]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            tasks = [stream(client, url, prompt, tokens, one) for prompt, one in zip(prompts, heard, strict=True)]
            other = asyncio.to_thread(meanwhile) if meanwhile else asyncio.sleep(0)
            await asyncio.gather(*tasks, other)
        return heard

    return asyncio.run(work())


def test_many_streams_lose_and_repeat_nothing() -> None:
    with onekernel.load("demo", backend="cpu") as model:
        expected = {prompt: model.generate(prompt, max_tokens=TOKENS, temperature=0).text for prompt in PROMPTS}
        with ServerThread(model, most_running=STREAMS) as server:
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(STREAMS)]
            for prompt, heard in zip(prompts, stream_many(server.url, prompts, TOKENS), strict=True):
                assert heard.broken is None
                assert heard.error is None
                assert heard.text == expected[prompt]
                assert heard.done
                assert heard.finish_reason in ("length", "stop")


def test_a_full_queue_answers_429_and_loses_nobody(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("x", delay=0.01, most_running=2, most_waiting=3)
    heard = stream_many(server.url, ["p"] * 12, 20)
    refused = [one for one in heard if one.error is not None]
    assert len(refused) == 12 - 5
    assert all(one.error["type"] == "rate_limit_error" for one in refused)
    assert sum(one.done for one in heard) == 5
    answer = httpx.get(f"{server.url}/ready")
    assert answer.status_code == 200


def test_the_field_priority_decides_who_starts_first(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("word " * 500, delay=0.002, most_running=1)
    order: list[str] = []
    fields = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}

    def ask(name: str, body: dict[str, Any]) -> None:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        assert httpx.post(f"{server.url}{path}", json={**fields, **body}).status_code == 200
        order.append(name)

    running = threading.Thread(target=ask, args=("running", {"prompt": "p", "max_tokens": 150}))
    running.start()
    wait_for(lambda: server.service.scheduler.running == 1)
    threads = []
    messages = [{"role": "user", "content": "x"}]
    for name, body in (
        ("plain", {"prompt": "p"}),
        ("urgent", {"prompt": "p", "priority": -1}),
        ("urgent chat", {"messages": messages, "priority": -2}),
    ):
        threads.append(threading.Thread(target=ask, args=(name, body)))
        threads[-1].start()
        wait_for(lambda: server.service.scheduler.waiting == len(threads))
    for thread in (running, *threads):
        thread.join()
    assert order == ["running", "urgent chat", "urgent", "plain"]


def test_retry_after_is_sent(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("x", delay=0.05, most_running=1, most_waiting=0)
    body = {"prompt": "p", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body):
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert httpx.get(f"{server.url}/ready").status_code == 503


def test_clients_that_never_read_or_never_finish_stop_nobody(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("word " * 30)
    fields = {"prompt": "p", "max_tokens": 200, "stream": True, "ignore_eos": True}
    body = json.dumps(fields).encode()
    whole = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    bad = []
    try:
        for i in range(100):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(whole if i % 2 else whole[: 20 + i])  # never read, or never complete
            bad.append(connection)
        started_at = time.perf_counter()
        [heard] = stream_many(server.url, ["p"], 5)
        assert heard.done
        assert time.perf_counter() - started_at < 10
    finally:
        for connection in bad:
            connection.close()


def test_clients_that_leave_free_the_engine(scripted: Callable[..., ServerThread]) -> None:
    """Streaming or not: the generation ends when nobody waits for it any more."""
    server = scripted("word " * 5000, delay=0.002)
    for streaming in (True, False):
        body = json.dumps({"prompt": "p", "max_tokens": 20_000, "stream": streaming, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head + body)
        wait_for(lambda: server.service.scheduler.running == 1)
        connection.close()
        wait_for(lambda: server.service.scheduler.running == 0)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def process(port: int, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`onekernel serve` as its users start it."""
    command = [sys.executable, "-m", "onekernel", "serve", "--backend", "cpu", "--port", str(port), *options]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().split()[-1]
        finally:
            server.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_ends_every_stream_cleanly() -> None:
    with process(0, "--grace", "1", "--max-running", "4") as (server, url):

        def terminate() -> None:
            time.sleep(1.0)
            server.send_signal(signal.SIGTERM)

        heard = stream_many(url, PROMPTS, 3000, terminate)
        assert server.wait(20) == 0
    for one in heard:
        assert one.broken is None, one.broken
        assert one.done != (one.error is not None), "a stream must end either well or with an error"
    assert any(one.error for one in heard)
    assert all("shutting down" in one.error["message"] for one in heard if one.error)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_after_a_kill_nobody_believes_to_have_a_whole_answer() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with process(port, "--max-running", "4") as (server, url):

        def kill() -> None:
            time.sleep(1.0)
            server.kill()

        heard = stream_many(url, PROMPTS, 3000, kill)
    assert all(one.done != (one.broken is not None) for one in heard)
    assert any(one.broken is not None for one in heard)
    with process(port) as (server, url):  # at once again on the same port
        assert all(one.done for one in stream_many(url, PROMPTS[:2], 3))


def test_two_servers_live_in_one_process(scripted: Callable[..., ServerThread]) -> None:
    """No state outside of the application: it can be embedded more than once."""
    one, two = scripted("one"), scripted("two")
    messages = [{"role": "user", "content": "x"}]

    def ask(server: ServerThread) -> str:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages}).json()
        return str(answer["choices"][0]["message"]["content"])

    assert (ask(one), ask(two)) == ("one", "two")
    before = threading.active_count()
    assert before < 40
