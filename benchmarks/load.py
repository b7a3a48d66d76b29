"""How a server does under load: Poisson arrivals over HTTP, and what a long prompt does to running streams.

    python benchmarks/load.py                                  # onekernel serve, the demo model on the CPU
    python benchmarks/load.py --model Qwen/Qwen3.5-0.8B --backend cuda --clients 64 --rate 20 --requests 640
    python benchmarks/load.py --url http://127.0.0.1:8000      # a server that runs already, onekernel's or another

Requests go to /v1/completions as token ids and stream; their end tokens are ignored, so each has its full length. They
arrive at random times (Poisson, at --rate a second) and are sent by at most --clients clients: one that finds them
all busy waits, and its time to the first token counts from its arrival. With --rate 0 each client asks again as soon
as it has its answer. Then --streams long answers run, and --admissions prompts of --long-prompt tokens come one after
the other: the gaps between the tokens of a running stream are compared with those before.

All times are of the client, in seconds unless they say ms. Load goes to this machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_IDS = (100, 1000)  # that prompts are made of: every tokenizer has them
MARK = b"data: {"
STREAM_TOKENS = 100_000  # of a stream that runs until it is broken off; servers cut it to what fits
START_S = 120.0  # for all streams to have begun
TIMEOUT_S = 600.0


class LoadError(Exception):
    """The server did something that makes the figures worthless, or cannot be reached."""


@dataclass
class Heard:
    """Attributes:
    arrived_at: when the request should be sent.
    times: when events with text came.
    ended_at: of a complete answer.
    refused: with the status 429.
    """

    arrived_at: float
    times: list[float] = field(default_factory=list)
    ended_at: float | None = None
    refused: bool = False


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    model: str

    async def ask(self, prompt: Sequence[int], tokens: int, heard: Heard, enough: asyncio.Event | None = None) -> None:
        """Send one request and note what comes, until it ends or `enough` is set. Raises LoadError."""
        fields = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        body = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            status = int((await reader.readline()).split()[1])
            if status == 429:
                heard.refused = True
                return
            if status != 200:
                raise LoadError(f"status {status}: {(await reader.read(2000)).decode(errors='replace')}")
            await self._read(reader, heard, enough)
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, heard: Heard, enough: asyncio.Event | None) -> None:
        seen = b""
        while part := await asyncio.wait_for(reader.read(1 << 16), TIMEOUT_S):
            now = time.perf_counter()
            seen += part
            heard.times += [now] * seen.count(MARK)
            if b'"error"' in seen:
                raise LoadError(f"an error in a stream: {seen[-2000:].decode(errors='replace')}")
            if b"data: [DONE]" in seen:
                heard.ended_at = now
                return
            seen = seen[seen.rindex(MARK) + len(MARK) :] if MARK in seen else seen
            if enough is not None and enough.is_set():
                return
        raise LoadError("a stream ended before its time")


def prompt_of(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(*TOKEN_IDS) for _ in range(tokens)]


async def poisson(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The first part."""
    rng = random.Random(options.seed)
    free = asyncio.Semaphore(options.clients)
    heard: list[Heard] = []
    sizes: list[tuple[int, int]] = []

    async def one(mine: Heard, prompt: list[int], tokens: int) -> None:
        async with free:
            if not options.rate:
                mine.arrived_at = time.perf_counter()
            await server.ask(prompt, tokens, mine)

    started_at = due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(options.requests):
            if options.rate:
                due += rng.expovariate(options.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            prompt, tokens = prompt_of(rng, rng.randint(*options.prompt)), rng.randint(*options.output)
            heard.append(Heard(due))
            sizes.append((len(prompt), tokens))
            group.create_task(one(heard[-1], prompt, tokens))
    seconds = time.perf_counter() - started_at
    done = [(mine, *size) for mine, size in zip(heard, sizes, strict=True) if mine.ended_at is not None]
    gaps = [later - earlier for mine, *_ in done for earlier, later in zip(mine.times, mine.times[1:], strict=False)]
    return {
        "requests": len(heard),
        "answered": len(done),
        "refused": sum(mine.refused for mine in heard),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "prompt_tokens_per_s": sum(prompt for _, prompt, _ in done) / seconds,
        "output_tokens_per_s": sum(tokens for *_, tokens in done) / seconds,
        "ttft_ms": spread([mine.times[0] - mine.arrived_at for mine, *_ in done]),
        "between_tokens_ms": spread(gaps),
        "whole_answer_ms": spread([(mine.ended_at or 0.0) - mine.arrived_at for mine, *_ in done]),
    }


async def admissions(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The second part."""
    rng = random.Random(options.seed + 1)
    enough = asyncio.Event()
    streams = [Heard(time.perf_counter()) for _ in range(options.streams)]
    windows: list[tuple[float, float]] = []
    ttft: list[float] = []
    async with asyncio.TaskGroup() as group:
        for mine in streams:
            group.create_task(server.ask(prompt_of(rng, 16), STREAM_TOKENS, mine, enough))
        started_at = time.perf_counter()
        while not all(len(mine.times) > 20 for mine in streams):
            if time.perf_counter() - started_at > START_S:
                raise LoadError(f"{options.streams} streams did not all bring 20 tokens in {START_S:g} s")
            await asyncio.sleep(0.01)
        quiet_from = time.perf_counter()
        await asyncio.sleep(options.quiet)
        quiet = (quiet_from, time.perf_counter())
        for _ in range(options.admissions):
            newcomer = Heard(time.perf_counter())
            await server.ask(prompt_of(rng, options.long_prompt), 1, newcomer)
            if newcomer.refused or not newcomer.times:
                raise LoadError("a long prompt was refused: is the context large enough?")
            windows.append((newcomer.arrived_at, newcomer.times[0]))
            ttft.append(newcomer.times[0] - newcomer.arrived_at)
            await asyncio.sleep(options.quiet / 4)
        if any(mine.ended_at is not None for mine in streams):
            raise LoadError("a running stream came to its end: take fewer admissions, or a larger context")
        enough.set()
    return {
        "streams": options.streams,
        "prompt_tokens": options.long_prompt,
        "admissions": options.admissions,
        "ttft_ms": spread(ttft),
        "between_tokens_before_ms": spread(gaps_within(streams, [quiet])),
        "between_tokens_meanwhile_ms": spread(gaps_within(streams, windows)),
        "longest_stall_ms": spread([max(gaps_within(streams, [window]), default=0.0) for window in windows]),
    }


def gaps_within(streams: Sequence[Heard], windows: Sequence[tuple[float, float]]) -> list[float]:
    """Times between tokens that overlap one of the windows."""
    return [
        later - earlier
        for mine in streams
        for earlier, later in zip(mine.times, mine.times[1:], strict=False)
        if any(earlier < end and later > start for start, end in windows)
    ]


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p99 and the largest, in ms; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    parts = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(1e3 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3) for name, part in parts.items()
    }


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(the URL of a server, the command that started it: none if it runs already)."""
    if options.url is not None:
        yield options.url, []
        return
    command = [sys.executable, "-m", "onekernel", "serve", "--port", "0", "--model", options.model]
    command += ["--backend", options.backend, *options.serve]
    # On the CPU threads of BLAS that wait for each other lose seconds when this process takes their core.
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise LoadError("the server did not start")
            yield line.split()[-1], ["onekernel", *command[3:]]
        finally:
            process.terminate()


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK:
        raise LoadError(f"--url {url}: load goes to this machine only: run this on the machine of the server")
    server = Server(parts.hostname, parts.port or 80, options.model)
    rng = random.Random(options.seed - 1)
    for tokens in (16, 600):  # warm-up: everything is compiled, and the scheduler knows how long things take
        await asyncio.gather(*(server.ask(prompt_of(rng, tokens), 8, Heard(0.0)) for _ in range(3)))
    result: dict[str, Any] = {"load": await poisson(server, options)}
    if options.long_prompt:
        result["admission"] = await admissions(server, options)
    return result


def interval(text: str) -> tuple[int, int]:
    """ "100" or "50:200"."""
    least, _, most = text.partition(":")
    found = (int(least), int(most or least))
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--url", help="a server on this machine; without it one is started")
    made.add_argument("--model", default="demo", help="to serve, and the name in the requests (default demo)")
    made.add_argument("--backend", default="cpu", help="of the server that is started (default cpu)")
    made.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="further options of `onekernel serve`; last"
    )
    made.add_argument("--clients", type=int, default=64, metavar="N", help="requests under way at most (default 64)")
    made.add_argument("--rate", type=float, default=4.0, metavar="R", help="arrivals a second; 0: at once (default 4)")
    made.add_argument("--requests", type=int, default=64, metavar="N", help="in all (default 64)")
    made.add_argument("--prompt", type=interval, default=(128, 128), metavar="A[:B]", help="tokens (default 128)")
    made.add_argument("--output", type=interval, default=(64, 64), metavar="A[:B]", help="tokens (default 64)")
    made.add_argument("--long-prompt", type=int, default=4096, metavar="N", help="tokens; 0: skip that part")
    made.add_argument("--streams", type=int, default=4, metavar="N", help="that run meanwhile (default 4)")
    made.add_argument("--admissions", type=int, default=5, metavar="N", help="of long prompts (default 5)")
    made.add_argument("--quiet", type=float, default=2.0, metavar="S", help="measured before the first of them")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result, too (format: docs/benchmarks.md)")
    return made


def first_of(error: BaseException) -> BaseException:
    """The first error in groups of groups."""
    return first_of(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    found: dict[str, Any] = {}
    command: list[str] = []
    try:
        with served(options) as (url, command):
            found = asyncio.run(measure(url, options))
    except* (LoadError, OSError) as group:
        print(f"load: {first_of(group)}", file=sys.stderr)
    if not found:
        return 1
    names = ("clients", "rate", "requests", "prompt", "output", "seed")
    result = {
        "format": "onekernel-load",
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cpu_count": os.cpu_count()},
        "server": command or ["a server that ran already"],
        "model": options.model,
        "options": {name: getattr(options, name) for name in names},
        **found,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
