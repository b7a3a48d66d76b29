"""A batch job: the lines of the input go through the same parsing, scheduler and replies as requests to the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onekernel.api import Model
from onekernel.batch.answers import Answers, ignored_fields
from onekernel.batch.lines import Line, read_lines
from onekernel.batch.output import Output, is_failure
from onekernel.errors import InvalidRequest
from onekernel.many import concurrency
from onekernel.server.service import Service
from onekernel.server.settings import Settings

TICK_S = 0.2  # between two reports
ENOUGH_TOLD = 20  # failures that are told one by one


@dataclass(frozen=True)
class Plan:
    """What an input holds, found out before the model is loaded.

    Attributes:
        digests: of the lines, by their number.
        problems: "line N: ..." for the lines that are no requests.
    """

    path: Path
    options: Mapping[str, Any]
    digests: dict[int, str]
    problems: list[str]

    def lines(self, done: set[int]) -> Iterator[Line]:
        """Those not done, read again, so that a large file is never in memory.

        Raises:
            InvalidRequest: the file is not what it was.
        """
        for line in read_lines(self.path, self.options):
            if self.digests.get(line.number) != line.digest:
                raise InvalidRequest(f"line {line.number} of {self.path} was changed while the job ran")
            if line.number not in done:
                yield line


@dataclass
class Progress:
    """Attributes:
    total, done, failed: lines; `done` counts those that failed, and those of earlier runs, too.
    completion_tokens: made by this run so far.
    seconds: that this run has taken.
    problems: "line N: ..." for the first requests that failed in this run.
    """

    total: int
    done: int
    failed: int
    completion_tokens: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


def make_plan(path: Path, options: Mapping[str, Any]) -> Plan:
    """Read the whole input once.

    Args:
        options: see read_lines.

    Raises:
        InvalidRequest: it cannot be read, or is empty.
    """
    digests, problems = {}, []
    for line in read_lines(path, options):
        digests[line.number] = line.digest
        if line.problem is not None:
            problems.append(f"line {line.number}: {line.problem}")
    if not digests:
        raise InvalidRequest(f"the input {path} holds no lines: write one request or prompt a line")
    return Plan(path, options, digests, problems)


def run(
    model: Model,
    name: str,
    plan: Plan,
    output: Output,
    report: Callable[[Progress], None],
    max_concurrent: int | None = None,
) -> Progress:
    """Answer all lines that `output` has no answer to. Ctrl-C ends it within a few tokens (KeyboardInterrupt).

    Args:
        name: of the model, as the answers give it.
        report: called a few times a second, and at the end.
        max_concurrent: lines that are worked on at a time; None: as many as one step of the engine serves.

    Raises:
        BackendError: the engine failed. The lines that it was working on are not answered, and come again next time.
        OutputFailed, InvalidRequest: see Output.add and Plan.lines.
    """
    # A line that asks for several choices submits them all at once: the queue has room for them.
    workers = concurrency(model.engine, max_concurrent)
    waiting = workers * Settings.most_choices
    settings = Settings(model_name=name, most_running=workers, most_waiting=waiting, deterministic=True, patient=True)
    service = Service(model, settings)
    try:
        job = Job(service, output, len(plan.digests))
        asyncio.run(job.run(plan.lines(output.done), workers, report))
        return job.progress()
    finally:
        service.close()


class Job:
    """One run over what is left of an input."""

    def __init__(self, service: Service, output: Output, total: int) -> None:
        self._answers = Answers(service)
        self._output = output
        self._total = total
        self._started_at = time.perf_counter()
        self._problems: list[str] = []
        self._unwritten: list[tuple[int, dict[str, Any], Sequence[str]]] = []
        self._writing = asyncio.Lock()

    def progress(self) -> Progress:
        return Progress(
            self._total,
            len(self._output.done),
            self._output.failed,
            self._answers.completion_tokens,
            time.perf_counter() - self._started_at,
            self._problems,
        )

    async def run(self, lines: Iterator[Line], workers: int, report: Callable[[Progress], None]) -> None:
        """Each worker takes the next line when it has written its last one."""
        pending = {asyncio.ensure_future(self._work(lines)) for _ in range(workers)}
        try:
            while pending:
                ended, pending = await asyncio.wait(pending, timeout=TICK_S, return_when=asyncio.FIRST_EXCEPTION)
                report(self.progress())
                errors = [error for worker in ended if (error := worker.exception()) is not None]
                if errors:
                    raise errors[0]
        finally:
            for worker in pending:
                worker.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _work(self, lines: Iterable[Line]) -> None:
        for line in lines:
            await asyncio.sleep(0)  # lines that need no answer must not keep the report waiting
            result = await self._answers.result(line)
            await self._write(line.number, result, () if line.problem else ignored_fields(line))
            if is_failure(result) and line.problem is None and len(self._problems) < ENOUGH_TOLD:
                self._problems.append(f"line {line.number}: {result['response']['body']['error']['message']}")

    async def _write(self, number: int, result: dict[str, Any], ignored: Sequence[str]) -> None:
        """Returns when the line is on the disk. Lines that are done while others are being written go together.

        A thread waits for the disk; `asyncio.run` does not return before it has ended, so the output is open till then.
        """
        self._unwritten.append((number, result, ignored))
        async with self._writing:
            if together := self._unwritten:
                self._unwritten = []
                await asyncio.to_thread(self._output.add_all, together)
