"""The probe finds nothing wrong with our own server: what it asks of others holds here first."""

from __future__ import annotations

from onekernel.probe.run import run


def test_the_probe_finds_no_fault_in_our_server(demo) -> None:
    report = run(demo.url)
    assert [(result.name, result.faults) for result in report.results if result.faults] == []
    assert [result.name for result in report.results if result.status == "absent"] == ["keys"]


def test_the_probe_finds_no_fault_in_our_server_with_keys(scripted) -> None:
    server = scripted("one two three four five six seven eight", keys=("good",))
    report = run(server.url, key="good", only=["keys", "models", "chat stream", "messages stream", "responses stream"])
    assert [(result.name, result.faults) for result in report.results if result.faults] == []
    assert all(result.status == "ok" for result in report.results)
