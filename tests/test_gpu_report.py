"""The committed reports of GPU runs: of these kernel sources, and without a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onekernel.gpu import source

REPORTS = sorted((Path(__file__).parent.parent / "benchmarks" / "gpu").glob("*.json"))


def complaints(report: dict, digest: str) -> list[str]:
    found = []
    if report["kernel_sources"] != digest:
        found.append("the kernel sources have changed since: run python tests/gpu/run.py on that GPU again")
    if report["pytest_arguments"]:
        found.append(f"it may be a part: {report['command']}")
    found += [f"{test['name']}: {test['outcome']}" for test in report["tests"] if test["outcome"] != "passed"]
    tools = report.get("sanitizer", {})
    found += [f"{tool}: {result['says']}" for tool, result in tools.items() if not result["clean"]]
    if not any("test_soak" in test["name"] for test in report["tests"]):
        found.append("there is no soak")
    return found


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_committed_report_is_of_these_sources_and_without_failure(path: Path) -> None:
    assert complaints(json.loads(path.read_text(encoding="utf-8")), source.digest()) == []


def test_there_is_a_report() -> None:
    assert REPORTS


def test_complaints_are_found() -> None:
    good = {
        "kernel_sources": "abc",
        "command": "python tests/gpu/run.py --sanitizer",
        "pytest_arguments": [],
        "tests": [{"name": "test_soak.py::test_x", "outcome": "passed"}],
        "sanitizer": {"memcheck": {"clean": True, "says": ""}},
    }
    assert complaints(good, "abc") == []
    assert "have changed" in complaints(good, "abd")[0]
    assert "no soak" in complaints({**good, "tests": []}, "abc")[0]
    for outcome in ("failed", "skipped"):
        assert complaints({**good, "tests": [{"name": "test_soak.py::test_x", "outcome": outcome}]}, "abc")
    assert complaints({**good, "sanitizer": {"memcheck": {"clean": False, "says": "1 error"}}}, "abc")
    assert complaints({**good, "pytest_arguments": ["-k", "demo"]}, "abc")
