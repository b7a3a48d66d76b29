"""EngineProcess: an engine in a process of its own, asked over pipes. It is ended on every way out."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.bench.protocol import VERSION, Unavailable
from onekernel.errors import OnekernelError

LAST_WORDS = 4  # lines of stderr in the message of a failure


class EngineFailed(OnekernelError):
    """An engine's process failed or did not answer in time; the message says what it said last."""


class EngineProcess:
    """Start a worker (protocol.serve) and ask it. Use as a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        timeout: float = 900,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Args:
            command: the worker's command line.
            timeout: seconds that one answer may take.
            environment: variables to set in the worker.
            log: a file to which what the worker writes to stderr is appended; None keeps it only while it runs.

        Raises:
            EngineFailed: it did not start.
        """
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile("w+b") if log is None else log.open("a+b")  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory(prefix="onekernel-bench-")
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self.started_at = time.perf_counter()
        try:
            hello = self._read()
            if hello.get("ready") != VERSION:
                raise EngineFailed(f"{command[-1]} speaks another protocol: {hello}")
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - self.started_at
        self.python = hello["python"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            Unavailable: the engine cannot run here.
            EngineFailed: it failed, ended, or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(f"the process ended: {self.last_words()}") from None
        answer = self._read()
        if "ok" in answer:
            result: dict[str, Any] = answer["ok"]
            return result
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        raise EngineFailed(f"{do}: {answer.get('error', answer)}")

    def logits(self, tokens: Sequence[int]) -> np.ndarray | list[int | None]:
        """Teacher-forced logits, float32 [len(tokens), vocab], or the most probable ids (see Adapter.logits)."""
        path = Path(self._folder.name) / "logits.npy"
        answer = self.ask("logits", tokens=list(tokens), path=str(path))
        if "best" in answer:
            best: list[int | None] = answer["best"]
            return best
        array: np.ndarray = np.load(path)
        path.unlink()
        return array

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self.timeout):
                raise EngineFailed(f"no answer within {self.timeout:g} s: {self.last_words()}")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineFailed(f"the process ended with code {code}: {self.last_words()}")
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def alive(self) -> bool:
        """Whether the process can be asked again."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The last lines that the process wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-LAST_WORDS:]) or "it said nothing"

    def close(self) -> None:
        """Ask it to end, and end it if it does not. Safe to call twice."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps({"do": "quit"}) + "\n")
                self._process.stdin.flush()
                self._process.wait(10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()
        self._folder.cleanup()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def own_python(module: str) -> list[str]:
    """The command line of a worker that is a module of this package."""
    return [sys.executable, "-m", module]
