"""The device that runs the model: its name, and the energy that it takes, where the machine tells."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable
from pathlib import Path

from onekernel.errors import OnekernelError

POWERCAP = Path("/sys/class/powercap")
PACKAGES = "intel-rapl:?"  # one a CPU package, on AMD too


def device_name(backend: str) -> str:
    """For people: the name of the GPU, or of the CPU."""
    if backend == "cuda":
        from onekernel.gpu.device import find_gpu

        return str(find_gpu().name)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def find_meter(backend: str, powercap: Path = POWERCAP) -> Callable[[], float] | None:
    """A function that gives joules since now, of the GPU or of the CPU packages; None if nothing tells.

    Args:
        backend: the name of the backend that runs the model.
        powercap: where Linux has the counters of the CPU; only root may read them on most systems.
    """
    return _gpu() if backend == "cuda" else _cpu(powercap)


def _gpu() -> Callable[[], float] | None:
    if importlib.util.find_spec("onekernel.gpu.nvml") is None:
        return None
    try:
        bus_id = importlib.import_module("onekernel.gpu.probe").bus_id()
        energy = importlib.import_module("onekernel.gpu.nvml").Nvml(bus_id).energy
        first = energy()
    except OnekernelError:
        return None
    return lambda: float(energy() - first)


def _cpu(powercap: Path) -> Callable[[], float] | None:
    counters = [Counter(folder) for folder in sorted(powercap.glob(PACKAGES))]
    try:
        for counter in counters:
            counter.joules()
    except (OSError, ValueError):
        return None
    return (lambda: sum(counter.joules() for counter in counters)) if counters else None


class Counter:
    """One of Linux' counters; it begins again at 0 when it is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: int | None = None
        self._sum = 0

    def joules(self) -> float:
        """Since the first call; right if it is called at least once while the counter fills (minutes)."""
        now = self._read("energy_uj")
        if self._last is not None:
            step = now - self._last
            self._sum += step if step >= 0 else step + self._read("max_energy_range_uj")
        self._last = now
        return self._sum / 1e6

    def _read(self, name: str) -> int:
        return int((self._folder / name).read_text())
