"""What the machine did while an engine was measured: clocks, power, temperature, throttling; joules of a window."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from onekernel.bench.statistics import median
from onekernel.errors import BackendError

INTERVAL = 0.05  # seconds between two looks
LEAST_WINDOW = 10.0  # seconds of an energy window: the counter steps every few hundredths of a second
SETTLED = 2.0  # seconds without work before idle power counts


class Meter(Protocol):
    """What of gpu.nvml.Nvml is used here and by the power sweep; tests have a fake one."""

    def energy(self) -> float: ...
    def power(self) -> float: ...
    def power_limit(self) -> float: ...
    def power_limits(self) -> tuple[float, float]: ...
    def set_power_limit(self, watts: float) -> None: ...
    def clocks(self) -> tuple[int, int]: ...
    def reasons(self) -> list[str]: ...
    def temperature(self) -> int: ...


class Watch:
    """Looks at the GPU from a thread of its own while the `with` block runs; `summary` afterwards."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._clocks: list[tuple[int, int]] = []
        self._power: list[float] = []
        self._temperature: list[int] = []
        self._reasons: dict[str, int] = {}
        self._problem = ""

    def __enter__(self) -> Watch:
        if self._meter is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        assert self._meter is not None
        while True:
            try:
                clocks, power, heat = self._meter.clocks(), self._meter.power(), self._meter.temperature()
                reasons = self._meter.reasons()
            except BackendError as error:  # a GPU need not tell everything; the measurement goes on
                self._problem = str(error)
                return
            self._clocks.append(clocks)
            self._power.append(power)
            self._temperature.append(heat)
            for reason in reasons:
                self._reasons[reason] = self._reasons.get(reason, 0) + 1
            if self._stop.wait(INTERVAL):
                return

    def summary(self) -> dict[str, Any]:
        """For the document. On the CPU: the load average, and the frequency if the system tells it."""
        if self._meter is None:
            return {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "cpu_mhz": _cpu_mhz()}
        if not self._clocks:
            return {"problem": self._problem or "too short to look"}
        sm = [clock for clock, _ in self._clocks]
        return {
            "looks": len(sm),
            "sm_mhz": {"median": median(sm), "least": min(sm), "most": max(sm)},
            "memory_mhz": median([clock for _, clock in self._clocks]),
            "power_w": {"median": median(self._power), "most": max(self._power)},
            "temperature_c": max(self._temperature),
            "reasons": {word: count / len(sm) for word, count in self._reasons.items()},  # share of the looks
            **({"problem": self._problem} if self._problem else {}),
        }


def _cpu_mhz() -> float | None:
    """Of the fastest core, now."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    found = [float(line.split(":")[1]) for line in path.read_text().splitlines() if line.startswith("cpu MHz")]
    return max(found, default=None)


def joules(meter: Meter, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` between two looks at the energy counter.

    Returns what `work` returns with "joules", "seconds" (between the looks) and "watts" beside it.
    """
    begin, before = time.perf_counter(), meter.energy()
    result = work()
    after, end = meter.energy(), time.perf_counter()
    seconds = end - begin
    return {**result, "joules": after - before, "seconds": seconds, "watts": (after - before) / seconds}


def idle_power(meter: Meter, seconds: float = LEAST_WINDOW, settled: float = SETTLED) -> dict[str, Any]:
    """Watts with nothing running, by the same counter; "clocks_mhz" tells how deep the GPU slept."""
    time.sleep(settled)

    def nothing() -> dict[str, Any]:
        time.sleep(seconds)
        return {}

    found = joules(meter, nothing)
    return {"watts": found["watts"], "seconds": found["seconds"], "sm_mhz": meter.clocks()[0]}
