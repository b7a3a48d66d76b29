"""The power sweep: speed and energy under one power limit after another, and the original limit again on every way out.

A power limit holds for everybody who uses the GPU, and stays when a process dies. So it is put back by a `finally`,
for exceptions and ctrl-C. SIGTERM and SIGHUP are turned into an exception first, because they would end the process
without it, and the first signal turns off all others, because they would interrupt the `finally`. A restore that fails
is tried again and then said loudly, with the command that mends it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from onekernel.bench.document import Document, figures
from onekernel.bench.telemetry import Meter
from onekernel.bench.workload import DECODE
from onekernel.errors import BackendError, InvalidRequest

ATTEMPTS = 3
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """A signal asked the process to end; raised in its place so that every `finally` runs."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def parse_range(text: str) -> list[float]:
    """Watts of "150:350:25": from 150 to 350, both included, in steps of 25.

    Raises:
        InvalidRequest: it is not such a range.
    """
    try:
        first, last, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise InvalidRequest(f"power sweep {text!r} is not FIRST:LAST:STEP in watts, such as 150:350:25") from None
    if not 0 < first <= last or not step > 0 or (last - first) / step > 100:
        raise InvalidRequest(f"power sweep {text!r}: 0 < FIRST <= LAST and STEP > 0 are needed, and at most 100 steps")
    watts, limit = [], first
    while limit <= last + 1e-6:
        watts.append(limit)
        limit += step
    return watts


def sweep(
    meter: Meter, watts: Sequence[float], measure: Callable[[], Document], say: Callable[[str], None]
) -> Document:
    """Measure under each limit and return the first document, with all under "power_sweep" and the best named.

    Raises:
        BackendError: the limits cannot be set (no right, or out of the GPU's range); nothing was changed, or the
            original was restored.
    """
    least, most = meter.power_limits()
    outside = [limit for limit in watts if not least <= limit <= most]
    if outside:
        raise BackendError(f"this GPU takes power limits from {least:g} to {most:g} W, not {outside[0]:g} W")
    steps: list[dict[str, Any]] = []
    documents: list[Document] = []
    with restored_limit(meter, say):
        for limit in watts:
            meter.set_power_limit(limit)
            say(f"power limit {limit:g} W")
            documents.append(measure())
            steps.append({"limit_w": limit, "engines": documents[-1]["engines"]})
    found = documents[0]
    found["power_sweep"] = steps
    return found


@contextmanager
def restored_limit(meter: Meter, say: Callable[[str], None]) -> Iterator[float]:
    """The power limit as it was before, on every way out of the block: return, exception, ctrl-C, SIGTERM, SIGHUP."""
    original = meter.power_limit()
    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere no signal arrives
    handlers = {number: signal.signal(number, _end) for number in SIGNALS} if in_main_thread else {}
    try:
        try:
            yield original
        finally:
            # While the limit is put back, nothing may interrupt. A signal that comes before `_ignore_signals` is done
            # has had them ignored by its handler, so the second `finally` is undisturbed in any case.
            try:
                if in_main_thread:
                    _ignore_signals()
            finally:
                try:
                    _restore(meter, original, say)
                finally:
                    for number, handler in handlers.items():
                        signal.signal(number, handler)
    except Terminated as request:
        raise SystemExit(128 + request.number) from None


def _end(number: int, _: FrameType | None) -> None:
    """The handler of all SIGNALS: raises once. Of an impatient user's second signal nothing must come."""
    _ignore_signals()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _restore(meter: Meter, original: float, say: Callable[[str], None]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if meter.power_limit() != original:
                meter.set_power_limit(original)
                say(f"power limit {original:g} W again, as before")
            return
        except BackendError as error:
            if attempt == ATTEMPTS:
                raise BackendError(
                    f"the power limit could not be put back to {original:g} W ({error}): "
                    f"run `nvidia-smi -pl {original:g}`"
                ) from None


def points(document: Document) -> dict[str, list[tuple[float, float, float]]]:
    """Engine title -> (limit in watts, decode tok/s, decode tok/J) of each step that has both."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for step in document.get("power_sweep", []):
        for figure in figures({**document, "engines": step["engines"]}):
            if figure.cell.kind == DECODE and figure.rate and figure.joules_per_token:
                point = (step["limit_w"], figure.rate.median, 1 / figure.joules_per_token)
                found.setdefault(figure.title, []).append(point)
    return found


def sweet_spot(steps: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The step with the most tokens per joule."""
    return max(steps, key=lambda step: step[2])


def describe(document: Document) -> str:
    """A sentence for each engine."""
    lines = []
    for title, steps in points(document).items():
        limit, rate, per_joule = sweet_spot(steps)
        fastest = max(step[1] for step in steps)
        lines.append(
            f"{title}: best at {limit:g} W: {per_joule:.2f} tok/J at {rate:,.0f} tok/s, "
            f"{100 * rate / fastest:.0f} % of the fastest step"
        )
    return "\n".join(lines) or "no step has both speed and energy (was --energy 0 given?)"
