"""The committed reports of GPU runs: of these kernel sources, and without a failure.

benchmarks/gpu_pending.json names what a committed run did not carry out: a list of {reason, explanation, tests,
sanitizer, not_run}. It excuses a test or a tool of that name with that very error, and nothing else. In `not_run`, a
name may end with "*".
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from onekernel.gpu import source

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
REPORTS = sorted((BENCHMARKS / "gpu").glob("*.json"))


def reasons(pending: Sequence[dict], kind: str, name: str) -> list[str]:
    """The errors that are excused for a test or a tool."""
    return [entry["reason"] for entry in pending if any(matches(name, known) for known in entry.get(kind, []))]


def matches(name: str, known: str) -> bool:
    return name == known or (known.endswith("*") and name.startswith(known[:-1]))


def all_tests() -> list[str]:
    """The names of all GPU tests, as reports have them."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True)
    return [line.removeprefix("tests/gpu/") for line in done.stdout.splitlines() if "::" in line]


def complaints(report: dict, digest: str, pending: Sequence[dict] = (), tests: Sequence[str] = ()) -> list[str]:
    found = []
    run = {test["name"] for test in report["tests"]}
    missing = [name for name in tests if name not in run]
    found += [f"{name} has not run" for name in missing if not reasons(pending, "not_run", name)]
    for known in (known for entry in pending for known in entry.get("not_run", []) if known.endswith("*")):
        if tests and not any(matches(name, known) for name in missing):
            found.append(f"{known} has run: it is pending no longer")
    if report["kernel_sources"] != digest:
        found.append("the kernel sources have changed since: run python tests/gpu/run.py on that GPU again")
    if any(not argument.startswith(("--durations", "--tb")) for argument in report["pytest_arguments"]):
        found.append(f"it may be a part: {report['command']}")
    for test in report["tests"]:
        excuses = reasons(pending, "tests", test["name"])
        if test["outcome"] != "passed" and not any(reason in test["why"] for reason in excuses):
            found.append(f"{test['name']}: {test['outcome']}")
        elif test["outcome"] == "passed" and (excuses or any(test["name"] in e.get("not_run", []) for e in pending)):
            found.append(f"{test['name']} passed: it is pending no longer")
    for tool, result in report.get("sanitizer", {}).items():
        excuses = reasons(pending, "sanitizer", tool)
        said = f"{result['says']} {result.get('details', '')}"
        if not result["clean"] and not any(reason in said for reason in excuses):
            found.append(f"{tool}: {result['says']}")
    if report.get("interrupted"):
        found.append("the run was interrupted")
    if not any("test_soak" in test["name"] for test in report["tests"]):
        found.append("there is no soak")
    return found


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_committed_report_is_of_these_sources_and_without_failure(path: Path) -> None:
    pending = json.loads((BENCHMARKS / "gpu_pending.json").read_text(encoding="utf-8"))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert complaints(report, source.digest(), pending.get(path.stem, []), all_tests()) == []


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
    assert complaints(good, "abc", tests=["test_soak.py::test_x"]) == []
    assert complaints(good, "abc", tests=["test_soak.py::test_y[1]"]) == ["test_soak.py::test_y[1] has not run"]
    assert (
        complaints(good, "abc", [{"reason": "", "not_run": ["test_soak.py::test_y*"]}], ["test_soak.py::test_y[1]"])
        == []
    )
    assert "have changed" in complaints(good, "abd")[0]
    assert "no soak" in complaints({**good, "tests": []}, "abc")[0]
    for outcome in ("failed", "skipped"):
        assert complaints({**good, "tests": [{"name": "test_soak.py::test_x", "outcome": outcome}]}, "abc")
    assert complaints({**good, "sanitizer": {"memcheck": {"clean": False, "says": "1 error"}}}, "abc")
    assert complaints({**good, "pytest_arguments": ["-k", "demo"]}, "abc")
    assert complaints({**good, "interrupted": True}, "abc")


def test_pending_excuses_one_error_of_one_test() -> None:
    pending = [{"reason": "NameError: greedy", "tests": ["test_soak.py::test_x"], "sanitizer": ["memcheck"]}]

    def run(name: str, why: str, outcome: str = "failed") -> dict:
        test = {"name": name, "outcome": outcome, "why": why}
        return {"kernel_sources": "abc", "command": "", "pytest_arguments": [], "tests": [test]}

    assert complaints(run("test_soak.py::test_x", "E  NameError: greedy"), "abc", pending) == []
    assert complaints(run("test_soak.py::test_x", "AssertionError"), "abc", pending)
    assert complaints(run("test_soak.py::test_y", "E  NameError: greedy"), "abc", pending)
    assert "no longer" in complaints(run("test_soak.py::test_x", "", "passed"), "abc", pending)[0]
    not_run = [{"reason": "", "not_run": ["test_soak.py::test_x"]}]
    assert "no longer" in complaints(run("test_soak.py::test_x", "", "passed"), "abc", not_run)[0]
    tool = {"clean": False, "says": "1 error", "details": "out of bounds"}
    assert complaints(
        {**run("test_soak.py::test_x", "NameError: greedy"), "sanitizer": {"memcheck": tool}}, "abc", pending
    )
