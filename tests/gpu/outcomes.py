"""A pytest plugin that keeps every outcome, with what the test recorded: for run.py, in its process or another.

In another process: `-p outcomes`, with the file for the outcomes in the environment variable ONEKERNEL_GPU_RECORD.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FILE = "ONEKERNEL_GPU_RECORD"


class Recorder:
    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that fails in its fixtures never comes to "call".
        if report.when != "call" and report.outcome == "passed":
            return
        entry: dict[str, Any] = {
            "name": report.nodeid.removeprefix("tests/gpu/").rsplit("@", 1)[0],  # xdist adds its group
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if report.user_properties:
            entry["measured"] = dict(report.user_properties)
        if report.outcome != "passed":
            entry["why"] = str(report.longrepr)[-2000:]
        self.tests.append(entry)


class FileRecorder(Recorder):
    """Writes the file after every test: what came before a cut is not lost."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        super().pytest_runtest_logreport(report)
        self._path.write_text(json.dumps(self.tests))


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(FILE):
        config.pluginmanager.register(FileRecorder(Path(path)))
