"""What the server costs: tokens per second over HTTP against those that a Python caller of the same engine sees.

    python benchmarks/server_overhead.py [--json FILE]
    python benchmarks/server_overhead.py --backend cuda --checkpoint random:0.8b [--json FILE]

By default the backend is a fake one that yields a token every 0.4 ms: 2,500 tokens/s by construction, whatever the
machine. With a real one, server and Python caller load the same checkpoint each for itself, decode greedily from the
same prompt, and take turns; end tokens end nothing. Reported are ratios, medians of several runs, and what HTTP adds to
the time to the first token. Server and client are two processes that talk over the loopback interface.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
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
REAL_APIS = ("chat", "completions")  # those in which one can ask that end tokens end nothing
MESSAGES = [{"role": "user", "content": "count"}]


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


def load_model(backend: str, checkpoint: str) -> Model:
    if backend == "paced":
        return paced_model()
    from onekernel.checkpoint.random_weights import is_random, random_checkpoint

    folder = str(random_checkpoint(checkpoint, lambda line: None)) if is_random(checkpoint) else checkpoint
    return onekernel.load(folder, backend=backend)


def serve(port: int, backend: str, checkpoint: str) -> None:
    """The server's process."""
    from onekernel.server import run
    from onekernel.server.settings import Settings

    settings = Settings(port=port, model_name="measured")
    with run.listen(settings) as listener, load_model(backend, checkpoint) as model:
        run.run(model, settings, listener, lambda url: print(url, flush=True))


@contextlib.contextmanager
def served(backend: str, checkpoint: str) -> Iterator[subprocess.Popen[str]]:
    """The server's process; `port_of` waits until it serves."""
    command = [sys.executable, __file__, "--serve", "0", "--backend", backend, "--checkpoint", checkpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit("the server did not start: its words are above")
    return int(line.rsplit(":", 1)[1])


def body_of(api: str, tokens: int, prompt: Sequence[int]) -> tuple[str, dict[str, Any]]:
    same: dict[str, Any] = {"stream": True, "temperature": 0}
    openai = {**same, "max_tokens": tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}
    match api:
        case "chat":
            return "/v1/chat/completions", {**openai, "messages": MESSAGES}
        case "completions":
            return "/v1/completions", {**openai, "prompt": list(prompt)}
        case "responses":
            return "/v1/responses", {**same, "input": MESSAGES, "max_output_tokens": tokens}
        case _:
            return "/v1/messages", {**same, "messages": MESSAGES, "max_tokens": tokens}


# What the first event that brings text holds, and what the last but for the usage.
MARKS = {
    "chat": rb'"(content|reasoning_content|reasoning)":"[^"]',
    "completions": rb'"text":"',
    "responses": rb"output_text.delta",
    "messages": rb"text_delta",
}
USAGE = re.compile(rb'"(?:completion|output)_tokens":(\d+)')


def read_over_http(port: int, api: str, tokens: int, prompt: Sequence[int]) -> tuple[float, float, int]:
    """(seconds to the first text, seconds from there to the end, chunks read) of one stream."""
    path, fields = body_of(api, tokens, prompt)
    mark = re.compile(MARKS[api])
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    started_at = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + body)
        first_at, chunks, seen, last = 0.0, 0, b"", b""
        while part := connection.recv(1 << 16):
            chunks += 1
            last = (last + part)[-4096:]
            if not first_at:
                seen += part
                if mark.search(seen):
                    first_at = time.perf_counter()
    ended_at = time.perf_counter()
    made = [int(count) for count in USAGE.findall(last)]
    if not first_at or not made or made[-1] != tokens:
        sys.exit(f"{api}: the server made {made[-1:]} tokens, not {tokens}: {(seen[:500] + last[-500:]).decode()}")
    return first_at - started_at, ended_at - first_at, chunks


def read_in_python(model: Model, tokens: int, prompt: Sequence[int]) -> tuple[float, float]:
    """The same of a session, without server and text."""
    started_at = time.perf_counter()
    session = model.engine.new_session()
    session.extend(prompt)
    first_at, count = 0.0, 0
    for _ in session.stream(max_tokens=tokens):
        count += 1
        first_at = first_at or time.perf_counter()
    ended_at = time.perf_counter()
    assert count == tokens
    return first_at - started_at, ended_at - first_at


def measure(backend: str, checkpoint: str, tokens: int, runs: int, short_runs: int) -> dict[str, Any]:
    apis = APIS if backend == "paced" else REAL_APIS
    with served(backend, checkpoint) as process, load_model(backend, checkpoint) as model:
        port = port_of(process)
        prompt = model.tokenizer.encode(model.render(MESSAGES))
        read_in_python(model, 10, prompt)
        for api in apis:
            read_over_http(port, api, 10, prompt)
        python: list[tuple[float, float]] = []
        http: dict[str, list[tuple[float, float, int]]] = {api: [] for api in apis}
        python_first: list[float] = []
        http_first: dict[str, list[float]] = {api: [] for api in apis}
        for _ in range(runs):  # in turns: the noise of a shared machine meets all alike
            python.append(read_in_python(model, tokens, prompt))
            for api in apis:
                http[api].append(read_over_http(port, api, tokens, prompt))
        for _ in range(short_runs):
            python_first.append(read_in_python(model, 2, prompt)[0])
            for api in apis:
                http_first[api].append(read_over_http(port, api, 2, prompt)[0])
    python_rates = [(tokens - 1) / seconds for _, seconds in python]
    python_rate, python_ttft = statistics.median(python_rates), statistics.median(python_first)
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}",
        "device": device_of(backend),
        "python": platform.python_version(),
        "backend": backend,
        "checkpoint": None if backend == "paced" else checkpoint,
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "runs": runs,
        "python_tokens_per_s": python_rate,
        "python_samples": python_rates,
        "python_ttft_ms": 1e3 * python_ttft,
    }
    if backend == "paced":
        result["backend_tokens_per_s"] = 1 / TOKEN_S
    for api in apis:
        rates = [(tokens - 1) / seconds for _, seconds, _ in http[api]]
        rate, ttft = statistics.median(rates), statistics.median(http_first[api])
        result[api] = {
            "tokens_per_s": rate,
            "samples": rates,
            "of_python": rate / python_rate,
            "ttft_overhead_ms": 1e3 * (ttft - python_ttft),
            "tokens_per_read": tokens / statistics.median(chunks for _, _, chunks in http[api]),
        }
        if backend == "paced":
            result[api]["of_the_backend"] = rate * TOKEN_S
    return result


def device_of(backend: str) -> str:
    """What computes."""
    if backend == "paced":
        return "none: tokens come by the clock"
    from onekernel.server.device import device_name

    return device_name(backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="paced", choices=("paced", "cpu", "cuda"))
    parser.add_argument("--checkpoint", default="demo", metavar="MODEL", help="demo, a folder, or random:0.8b, ...")
    parser.add_argument("--tokens", type=int, default=2000, help="of one stream")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--short-runs", type=int, default=SHORT_RUNS, help="of two tokens, for the first one's time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.backend, arguments.checkpoint)
        return
    result = measure(
        arguments.backend, arguments.checkpoint, arguments.tokens, arguments.runs, max(1, arguments.short_runs)
    )
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
