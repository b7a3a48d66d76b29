"""What the server costs: a backend that yields a token every 0.4 ms, read by one client over HTTP.

    python benchmarks/server_overhead.py [--json FILE]

The backend is 2,500 tokens/s by construction. Reported are ratios, medians of several runs: tokens per second that
reach the client over HTTP against those that reach a Python caller of the same session, and what HTTP adds to the time
to the first token. Server and client are two processes that talk over the loopback interface.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import onekernel
from onekernel.api import Model
from onekernel.backend.fake import FakeBackend, FakeState
from onekernel.engine import Engine
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.text.tokenizer import Tokenizer

DEMO = Path(onekernel.__file__).parent / "demo"
TOKEN_S = 0.0004
SHORT_RUNS = 50  # of two tokens, for the time to the first one
APIS = ("chat", "responses", "messages")


class PacedBackend(FakeBackend):
    """A token every TOKEN_S, by the clock: one that comes late does not delay those after it. As a GPU would, it works
    while the interpreter does other things."""

    name = "paced"

    def generate(
        self,
        state: FakeState,
        tokens: Sequence[int],
        history: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> Generator[SampledToken, None, None]:
        return self._paced(state, tokens, max_tokens)

    def prefill(self, state: FakeState, tokens: Sequence[int]) -> None:
        state.tokens.extend(tokens)

    def _paced(self, state: FakeState, tokens: Sequence[int], count: int) -> Generator[SampledToken, None, None]:
        due = time.perf_counter()
        for _ in range(count):
            due += TOKEN_S
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            state.tokens.extend(tokens)
            tokens = [100 + len(state.tokens) % 500]
            yield SampledToken(tokens[0])


def paced_model() -> Model:
    tokenizer = Tokenizer.load(DEMO)
    return Model("paced", Engine(PacedBackend(tokenizer.size, 32768)), tokenizer, DEMO)


def serve(port: int) -> None:
    """The server's process."""
    from onekernel.server import run
    from onekernel.server.settings import Settings

    settings = Settings(port=port, model_name="paced")
    with run.listen(settings) as listener, paced_model() as model:
        run.run(model, settings, listener, lambda url: print(url, flush=True))


@contextlib.contextmanager
def served() -> Iterator[int]:
    command = [sys.executable, __file__, "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(":", 1)[1])
        process.terminate()


def body_of(api: str, tokens: int) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "count"}]
    match api:
        case "chat":
            return "/v1/chat/completions", {"messages": messages, "max_tokens": tokens, "stream": True}
        case "responses":
            return "/v1/responses", {"input": messages, "max_output_tokens": tokens, "stream": True}
        case _:
            return "/v1/messages", {"messages": messages, "max_tokens": tokens, "stream": True}


MARKS = {"chat": b'"content":"', "responses": b"output_text.delta", "messages": b"text_delta"}


def read_over_http(port: int, api: str, tokens: int) -> tuple[float, float, int]:
    """(seconds to the first text, seconds from there to the end, chunks read) of one stream."""
    path, fields = body_of(api, tokens)
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    started_at = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + body)
        first_at, chunks, seen = 0.0, 0, b""
        while part := connection.recv(1 << 16):
            chunks += 1
            if not first_at:
                seen += part
                if MARKS[api] in seen.replace(b'"content":""', b""):
                    first_at = time.perf_counter()
    ended_at = time.perf_counter()
    return first_at - started_at, ended_at - first_at, chunks


def read_in_python(model: Model, tokens: int) -> tuple[float, float]:
    """The same of a session, without server and text."""
    started_at = time.perf_counter()
    session = model.engine.new_session()
    session.extend(model.tokenizer.encode(model.render([{"role": "user", "content": "count"}])))
    first_at = 0.0
    for _ in session.stream(max_tokens=tokens):
        first_at = first_at or time.perf_counter()
    return first_at - started_at, time.perf_counter() - first_at


def measure(tokens: int, runs: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "tokens": tokens,
        "runs": runs,
        "backend_tokens_per_s": 1 / TOKEN_S,
    }
    with paced_model() as model, served() as port:
        read_over_http(port, "chat", 10)
        python: list[tuple[float, float]] = []
        http: dict[str, list[tuple[float, float, int]]] = {api: [] for api in APIS}
        python_first: list[float] = []
        http_first: dict[str, list[float]] = {api: [] for api in APIS}
        for _ in range(runs):  # in turns: the noise of a shared machine meets all alike
            python.append(read_in_python(model, tokens))
            for api in APIS:
                http[api].append(read_over_http(port, api, tokens))
        for _ in range(SHORT_RUNS):
            python_first.append(read_in_python(model, 2)[0])
            for api in APIS:
                http_first[api].append(read_over_http(port, api, 2)[0])
    python_rate = statistics.median((tokens - 1) / seconds for _, seconds in python)
    python_ttft = statistics.median(python_first)
    result |= {"python_tokens_per_s": python_rate, "python_ttft_ms": 1e3 * python_ttft}
    for api in APIS:
        rate = statistics.median((tokens - 1) / seconds for _, seconds, _ in http[api])
        ttft = statistics.median(http_first[api])
        result[api] = {
            "tokens_per_s": rate,
            "of_the_backend": rate * TOKEN_S,
            "of_python": rate / python_rate,
            "ttft_overhead_ms": 1e3 * (ttft - python_ttft),
            "tokens_per_read": tokens / statistics.median(chunks for _, _, chunks in http[api]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    result = measure(arguments.tokens, arguments.runs)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
