"""What this machine can do at most, measured in a process of its own: `python -m onekernel.bench.limit cuda|cpu`.

Prints one JSON object: the device, its read bandwidth (bytes/s) and its matrix throughput (FLOP/s), with all samples.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STREAM_BYTES = 1 << 30
MATRIX = 3072  # rows and columns
REPETITIONS = 9


def measure(device: str) -> dict[str, Any]:
    """The document's "limit", with the "device" that it holds for. Raises BackendError: no GPU to use."""
    if device == "cpu":
        return {"device": cpu(), "read_bandwidth": cpu_bandwidth(), "matrix_throughput": cpu_throughput()}
    from onekernel.gpu.device import find_gpu
    from onekernel.gpu.probe import Probe, identify

    described = identify()
    with Probe(find_gpu()) as probe:
        return {
            "device": described,
            "read_bandwidth": probe.read_bandwidth(),
            "matrix_throughput": probe.matrix_throughput(),
        }


def cpu() -> dict[str, Any]:
    """The CPU as a document records it; "cache" in bytes, None if the system does not tell."""
    cache = None
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            cache = max(cache or 0, int(text[:-1]) * 1024)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name, "cpu_count": count, "cache": cache}


def cpu_bandwidth() -> dict[str, Any]:
    """Reading float32 numbers that no cache holds, through NumPy: a matrix times a vector, which uses all cores."""
    columns = 4096
    matrix = np.ones((STREAM_BYTES // 4 // columns, columns), np.float32)
    vector = np.ones(columns, np.float32)
    samples = [matrix.nbytes / seconds for seconds in _timed(lambda: matrix @ vector)]
    return _best(samples, f"NumPy, a float32 matrix of {matrix.nbytes >> 20} MiB times a vector")


def cpu_throughput() -> dict[str, Any]:
    """A float32 matrix product through NumPy."""
    a, b = (np.random.default_rng(seed).standard_normal((MATRIX, MATRIX), np.float32) for seed in range(2))
    samples = [2 * MATRIX**3 / seconds for seconds in _timed(lambda: a @ b)]
    return _best(samples, f"NumPy, float32 matrices of {MATRIX} by {MATRIX}")


def _timed(work: Callable[[], object]) -> list[float]:
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def _best(samples: list[float], kernel: str) -> dict[str, Any]:
    """A limit is the best that was seen: on a shared machine, others only ever take away."""
    return {"value": max(samples), "samples": samples, "kernel": kernel}


if __name__ == "__main__":
    from onekernel.errors import OnekernelError

    try:
        print(json.dumps(measure(sys.argv[1])))
    except OnekernelError as error:
        sys.exit(f"{error}")
