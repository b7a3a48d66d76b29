"""All checks, one after the other, and the report on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

from onekernel.errors import InvalidRequest
from onekernel.launch.server import ask
from onekernel.probe import basics, chat, messages, responses, timing
from onekernel.probe.findings import Absent, Findings
from onekernel.probe.target import Target

CHECKS: dict[str, Callable[[Target, Findings], None]] = {
    "health": basics.health,
    "models": basics.models,
    "chat": chat.whole,
    "chat stream": chat.streamed,
    "chat limits": chat.limits,
    "chat stop": chat.stops,
    "chat tools": chat.tools,
    "chat tools stream": chat.tools_streamed,
    "chat histories": chat.histories,
    "chat concurrent": chat.concurrent,
    "responses": responses.whole,
    "responses stream": responses.streamed,
    "responses tools": responses.tools,
    "responses histories": responses.histories,
    "messages": messages.whole,
    "messages stream": messages.streamed,
    "messages tools": messages.tools,
    "messages histories": messages.histories,
    "messages count_tokens": messages.count,
    "errors": basics.errors,
    "errors overflow": basics.overflow,
    "keys": basics.keys,
    "ttft": timing.first_token,
    "cancellation": timing.cancellation,
}
# Every client needs these; a server without one of the others only serves fewer clients.
NEEDED = ("models", "chat", "errors", "ttft", "cancellation")


@dataclass(frozen=True)
class Result:
    """Of one check; status is "ok", "fault" or "absent"."""

    name: str
    status: str
    seconds: float
    faults: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    url: str
    model: str
    results: tuple[Result, ...]

    @property
    def faults(self) -> int:
        return sum(len(result.faults) for result in self.results)

    @property
    def exit_code(self) -> int:
        return 1 if self.faults else 0

    @property
    def summary(self) -> str:
        counts = {status: sum(result.status == status for result in self.results) for status in ("ok", "absent")}
        return f"{counts['ok']} checks ok, {self.faults} faults, {counts['absent']} absent"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "faults": self.faults}


def run(
    url: str,
    *,
    key: str | None = None,
    model: str | None = None,
    only: Sequence[str] | None = None,
    timeout_s: float = 60.0,
    begin: Callable[[str, str], None] = lambda url, model: None,
    each: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Check a server.

    Args:
        url: as of `onekernel.launch.server.ask`.
        key: API key.
        model: the id to ask for; None takes the first that the server lists.
        only: beginnings of the names of the checks to do; None does all. What is absent of these is a fault.
        timeout_s: longest silence of the server.
        begin: called with the address and the model before the first check.
        each: called with the result of each check as it ends.

    Raises:
        InvalidRequest: no check begins with a name in `only`.
        OnekernelError: no server answers there, or it lists no model.
    """
    chosen = [name for name in CHECKS if only is None or name.startswith(tuple(only))]
    for beginning in only or ():
        if not any(name.startswith(beginning) for name in chosen):
            raise InvalidRequest(f"no check begins with {beginning!r}: there are {', '.join(CHECKS)}")
    server = ask(url, key, model)
    target = Target(server.url, server.model, key, timeout_s)
    begin(server.url, server.model)
    results = []
    try:
        for name in chosen:
            results.append(_check(name, target, only is not None))
            each(results[-1])
    finally:
        target.close()
    return Report(server.url, server.model, tuple(results))


def _check(name: str, target: Target, wanted: bool) -> Result:
    findings = Findings()
    absent = False
    began = time.perf_counter()
    try:
        CHECKS[name](target, findings)
    except Absent as error:
        if name in NEEDED or (wanted and name != "keys"):
            findings.fault(str(error))
        else:
            absent = True
            findings.note(str(error))
    except httpx2.RequestError as error:
        findings.fault(f"the connection failed ({type(error).__name__}: {error})")
    status = "fault" if findings.faults else "absent" if absent else "ok"
    seconds = round(time.perf_counter() - began, 3)
    return Result(name, status, seconds, tuple(findings.faults), tuple(findings.notes))
