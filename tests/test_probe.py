"""The probe: it finds nothing wrong with a right server, and names every fault that is planted in a wrong one."""

from __future__ import annotations

import json

import pytest
from small_server import FAULTS, MODEL, running

from onekernel.cli import main
from onekernel.errors import InvalidRequest, OnekernelError
from onekernel.probe.run import CHECKS, run

# Faults of one API are looked for with the checks of that API: the others have nothing to do with it.
CHECKS_OF = {
    "chat: buffered": ["ttft"],
    "does not stop": ["cancellation"],
    "does not stop, no metrics": ["cancellation"],
}


def checks_of(fault: str) -> list[str]:
    return CHECKS_OF.get(fault, [fault.partition(":")[0]])


def test_a_right_server_has_no_faults(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as url:
        report = run(url)
    assert [(result.name, result.faults) for result in report.results if result.faults] == []
    absent = [result.name for result in report.results if result.status == "absent"]
    assert absent == ["keys"]
    assert [result.name for result in report.results] == list(CHECKS)
    assert report.exit_code == 0


def test_a_right_server_with_a_key_has_no_faults() -> None:
    with running(key="good") as url:
        report = run(url, key="good", only=["keys", "chat stream"])
    assert report.faults == 0
    assert all(result.status == "ok" for result in report.results)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str) -> None:
    with running(fault, key="good" if fault.startswith("keys") else None) as url:
        report = run(url, key="good" if fault.startswith("keys") else None, only=checks_of(fault))
    sentences = [sentence for result in report.results for sentence in result.faults]
    assert any(FAULTS[fault] in sentence for sentence in sentences), sentences
    assert report.exit_code == 1


def test_the_table_names_check_and_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with running("chat: no [DONE]") as url:
        assert main(["probe", "--url", url, "--only", "chat stream,models"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{url}, model {MODEL}"
    assert lines[1].startswith("ok      models ")
    assert lines[1].endswith("context 2000; /v1/models/ID answers 404")
    assert lines[2].startswith("FAULT   chat stream ")
    assert lines[3].strip() == "the stream does not end with [DONE]"
    assert lines[4] == "1 checks ok, 1 faults, 0 absent"


def test_json_holds_all_results(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as url:
        assert main(["probe", "--url", url, "--only", "health,ttft", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == MODEL
    assert report["faults"] == 0
    assert [result["name"] for result in report["results"]] == ["health", "ttft"]
    assert any("TTFT" in note for note in report["results"][1]["notes"])


def test_no_server_at_all_is_said() -> None:
    with pytest.raises(OnekernelError, match="no server answers at http"):
        run("http://127.0.0.1:1")


def test_a_check_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no check begins with 'chats'"):
        run("http://127.0.0.1:1", only=["chats"])
