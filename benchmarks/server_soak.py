"""Does the server stay as it is: 10,000 requests, 1,000 connections that misbehave, 200 streams at once.

    python benchmarks/server_soak.py [--requests 10000] [--connections 1000] [--streams 200] [--json FILE]

The server is a process of its own (`onekernel serve`, the demo model on the CPU). Its resident memory is sampled while
conversations of random lengths pass, streaming and not, some of them broken off. Then connections are opened that send
a request and never read, or send one byte a second, and the latency of a good client is compared with and without them.
At last many streams run at once. When the first of them ends, their shares are compared: Jain's index is 1 if all are
equal, and 1/n if one has everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
CACHE_MIB = 32
SAMPLES = 20
WORDS = (
    "def",
    "class",
    "import",
    "return",
    "for",
    "in",
    "if",
    "yield",
    "list",
    "dict",
    "number",
    "file",
    "path",
    "open",
)


@contextlib.contextmanager
def served(most_running: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "onekernel", "serve", "--backend", "cpu", "--port", "0"]
    command += ["--cache-mib", str(CACHE_MIB), "--max-running", str(most_running)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().rsplit(":", 1)[1])
        process.terminate()


def resident_mib(process: subprocess.Popen[str]) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * PAGE / 2**20


def request(path: str, fields: dict[str, Any], close: bool = True) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return (head + ("Connection: close\r\n\r\n" if close else "\r\n")).encode() + body


async def exchange(port: int, data: bytes, break_off: bool = False) -> bytes:
    """What comes back; of a request to be broken off only the first part."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await (reader.read(200) if break_off else reader.read())
    finally:
        writer.close()


def random_request(chance: random.Random) -> tuple[bytes, bool]:
    """A conversation that others share a beginning with, through one of the APIs; whether it is broken off."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
    fields: dict[str, Any] = {"stream": chance.random() < 0.6, "temperature": 1.0}
    messages = [{"role": "system", "content": f"You are number {chance.randint(1, 20)}."}]
    messages.append({"role": "user", "content": text})
    match chance.choice(("chat", "messages", "responses", "completions")):
        case "chat":
            path, more = "/v1/chat/completions", {"messages": messages, "max_tokens": 4}
        case "messages":
            path, more = "/v1/messages", {"messages": messages, "max_tokens": 4}
        case "responses":
            path, more = "/v1/responses", {"input": messages, "max_output_tokens": 4}
        case _:
            path, more = "/v1/completions", {"prompt": text, "max_tokens": 4}
    return request(path, {**fields, **more}), chance.random() < 0.05


async def many_requests(process: subprocess.Popen[str], port: int, count: int) -> dict[str, Any]:
    chance = random.Random(0)
    memory: list[float] = []
    statuses: dict[str, int] = {}
    left = count

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if left % (count // SAMPLES) == 0:
                memory.append(resident_mib(process))
            data, break_off = random_request(chance)
            answer = await exchange(port, data, break_off)
            status = answer[9:12].decode() or "none"
            statuses[status] = statuses.get(status, 0) + 1

    started_at = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(8)))
    half = memory[len(memory) // 2 :]
    return {
        "requests": count,
        "statuses": statuses,
        "requests_per_s": count / (time.perf_counter() - started_at),
        "resident_mib": [round(value, 1) for value in memory],
        "growth_of_second_half_mib": round(half[-1] - half[0], 1),
    }


async def latency(port: int, count: int = 40) -> float:
    """Median seconds of a short answer."""
    data = request("/v1/completions", {"prompt": "import os", "max_tokens": 4})
    seconds = []
    for _ in range(count):
        started_at = time.perf_counter()
        answer = await exchange(port, data)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


async def misbehaving(port: int, count: int) -> dict[str, Any]:
    before = await latency(port)
    sockets: list[socket.socket] = []
    never_read = request("/v1/completions", {"prompt": "x", "max_tokens": 4, "stream": True}, close=False)

    async def drip() -> None:
        """One byte a second on every second connection."""
        for at in range(20, len(never_read)):
            await asyncio.sleep(1)
            for connection in sockets[::2]:
                with contextlib.suppress(OSError):
                    connection.send(never_read[at : at + 1])

    for i in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setblocking(False)
        connection.send(never_read if i % 2 else never_read[:20])
        sockets.append(connection)
    dripping = asyncio.ensure_future(drip())
    # The never-read ones have to be answered first: their tokens are work like any other.
    await asyncio.sleep(20)
    with_them = await latency(port)
    dripping.cancel()
    for connection in sockets:
        connection.close()
    return {
        "connections": count,
        "latency_ms": 1e3 * before,
        "latency_beside_them_ms": 1e3 * with_them,
        "ratio": with_them / before,
    }


async def shares(port: int, count: int) -> dict[str, Any]:
    """Streams of equal length that begin together."""
    tokens = [0] * count
    at_first_end: list[int] = []

    async def one(index: int) -> None:
        fields = {"prompt": f"number {index} ", "max_tokens": 40, "stream": True, "ignore_eos": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/v1/completions", {**fields, "logprobs": 0}))  # a list of the tokens in each chunk
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
                tokens[index] += len(logprobs["tokens"]) if logprobs else 0
            elif line.startswith(b"data: [DONE]") and not at_first_end:
                at_first_end.extend(tokens)
        writer.close()

    started_at = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(count)))
    jain = sum(at_first_end) ** 2 / (count * sum(share**2 for share in at_first_end))
    return {
        "streams": count,
        "tokens_each": sorted(set(tokens)),
        "tokens_per_s": sum(tokens) / (time.perf_counter() - started_at),
        "least_when_the_first_ended": min(at_first_end),
        "jains_index": round(jain, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=1_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}"}
    with served(8) as (process, port):
        result["soak"] = asyncio.run(many_requests(process, port, arguments.requests))
        result["misbehaving"] = asyncio.run(misbehaving(port, arguments.connections))
        result["resident_mib_at_the_end"] = round(resident_mib(process), 1)
        process.terminate()
        result["exit_code"] = process.wait(30)
    with served(arguments.streams) as (process, port):
        result["shares"] = asyncio.run(shares(port, arguments.streams))
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
