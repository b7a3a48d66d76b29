"""Run the GPU tests and write what came out to benchmarks/gpu/<gpu>.json, for CI to check against the sources.

    python tests/gpu/run.py --sanitizer --processes 4

Arguments that it does not know go to pytest (-k soak, -x); a report of such a run is for you and not for CI.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import outcomes  # noqa: E402

from onekernel.gpu import source  # noqa: E402
from onekernel.gpu.compile import compiler_version  # noqa: E402
from onekernel.gpu.device import describe, find_gpu  # noqa: E402

REPORTS = ROOT / "benchmarks" / "gpu"


# They take as long as all others together: beside them, in a process of their own.
SOAKS = ("test_soak.py", "test_batch.py::test_many_tokens_of_many_sequences")


class Soaks:
    """pytest over SOAKS in another process. A context manager: on the way out it ends with us."""

    def __init__(self, options: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._record = Path(self._folder.name) / "tests.json"
        environment = {**os.environ, outcomes.FILE: str(self._record), "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
        if inherited := os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] += os.pathsep + inherited
        command = [sys.executable, "-m", "pytest", *(str(HERE / name) for name in SOAKS), "-p", "outcomes", *options]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def wait(self) -> int:
        """pytest's exit status."""
        return self._process.wait()

    def outcomes(self) -> list[dict[str, Any]]:
        """So far."""
        return json.loads(self._record.read_text()) if self._record.exists() else []

    def __enter__(self) -> Soaks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak-tokens", type=int, default=1_000_000, help="tokens of each soak (default 1,000,000)")
    parser.add_argument("--sanitizer", action="store_true", help="run compute-sanitizer's four tools, too")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the GPU")
    parser.add_argument("--output", type=Path, help="file of the report (default benchmarks/gpu/<gpu>.json)")
    arguments, rest = parser.parse_known_args()

    gpu = find_gpu()
    os.environ["ONEKERNEL_SOAK_TOKENS"] = os.environ["ONEKERNEL_BATCH_SOAK"] = str(arguments.soak_tokens)
    found = outcomes.Recorder()
    digest = source.digest()
    # Other versions of PyTorch and Transformers may warn of other things.
    options = ["-q", "-p", "no:cacheprovider", "-W", "default"]
    side_by_side = arguments.processes > 1
    parallel = ["-n", str(arguments.processes), "--dist", "loadgroup", "--no-loadscope-reorder"]
    if side_by_side:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.processes)))
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as stack:
        sanitizer = beside.submit(_sanitize) if arguments.sanitizer else None
        soaks = stack.enter_context(Soaks([*options, *rest])) if side_by_side else None
        apart = [f"--deselect={(HERE / name).relative_to(ROOT)}" for name in SOAKS] if soaks else []
        others = [str(HERE), *options, *(parallel if side_by_side else []), *apart, *rest]
        code = int(pytest.main(others, plugins=[found]))
        if soaks:
            if code != pytest.ExitCode.INTERRUPTED:
                code = soaks.wait() or code
            found.tests = soaks.outcomes() + found.tests
    report: dict[str, Any] = {
        "gpu": gpu.name,
        "compute_capability": ".".join(map(str, gpu.capability)),
        "sm_count": gpu.sm_count,
        "driver": _driver_version(),
        "driver_supports": describe()["driver_supports"].split(" (")[0],
        "nvrtc": compiler_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "kernel_sources": digest,
        "command": " ".join(["python", "tests/gpu/run.py", *sys.argv[1:]]),
        "pytest_arguments": rest,
        "interrupted": code == pytest.ExitCode.INTERRUPTED,
        "summary": Counter(test["outcome"] for test in found.tests),
        "tests": found.tests,
    }
    if sanitizer:
        report["sanitizer"] = sanitizer.result()
        code = code or any(not tool["clean"] for tool in report["sanitizer"].values())
    path = arguments.output or REPORTS / f"{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{dict(report['summary'])} in {path}")
    return int(code)


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _sanitize() -> dict[str, Any]:
    from sanitize import TOOLS, run_tool

    found = {}
    for tool in TOOLS:
        try:
            found[tool] = run_tool(tool)
        except Exception as error:  # the tests' results must not be lost with it
            found[tool] = {"clean": False, "seconds": 0, "says": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    sys.exit(main())
