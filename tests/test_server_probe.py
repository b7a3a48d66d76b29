"""The probe: it finds nothing wrong with a right server, and names every fault that is planted in a wrong one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from small_server import FAULTS, MODEL, running

from onekernel.cli import main
from onekernel.errors import InvalidRequest, OnekernelError
from onekernel.probe import chat, messages, responses
from onekernel.probe.findings import Findings
from onekernel.probe.run import CHECKS, run
from onekernel.probe.target import EventStream, Target

# Faults of one API are looked for with the checks of that API: the others have nothing to do with it.
CHECKS_OF = {
    "chat: buffered": ["ttft"],
    "does not stop": ["cancellation"],
    "does not stop, whole": ["cancellation"],
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


EVENTS = {
    "chat": (chat.PATH, chat.request, chat.check_stream, chat.check_answer),
    "responses": (responses.PATH, responses.request, responses.check_stream, responses.check_answer),
    "messages": (messages.PATH, messages.request, messages.check_stream, messages.check_answer),
}


@pytest.mark.parametrize("api", EVENTS)
def test_no_answer_is_too_strange_to_be_judged(api: str) -> None:
    """Whatever a server puts in the place of whatever it should send: that is a fault, never a crash of the probe."""
    path, request, check_stream, check_answer = EVENTS[api]
    with running() as url:
        target = Target(url, MODEL)
        right = target.stream(path, request(target, **{"stream_options": {"include_usage": True}}))
        whole = target.post(path, request(target))
        target.close()
    events = [right.events[i] for i in (*range(5), *range(-5, 0))]
    strange = (None, True, -1, 1.5, "", "x", [], [[]], {}, {"type": {}}, [{"index": []}])

    def places(value: object) -> Iterator[tuple[object, object]]:
        """(container, key) of all values within."""
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in entries:
            yield value, key
            yield from places(inner)

    def judged(stream: EventStream) -> Findings:
        findings = Findings()
        check_stream(stream, findings)
        return findings

    tried = 0
    for i, event in enumerate(events):
        for j in range(len(list(places(event.data)))):
            for value in strange:
                data = copy.deepcopy(event.data)
                container, key = list(places(data))[j]
                container[key] = value
                changed = [*events[:i], replace(event, data=data), *events[i + 1 :]]
                judged(replace(right, events=changed))
                tried += 1
        for value in strange:
            judged(replace(right, events=[*events[:i], replace(event, data=value), *events[i + 1 :]]))
    for j in range(len(list(places(whole.data)))):
        for value in strange:
            data = copy.deepcopy(whole.data)
            container, key = list(places(data))[j]
            container[key] = value
            check_answer(replace(whole, data=data), Findings())
    assert tried > 500


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
