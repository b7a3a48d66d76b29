"""The output of a batch job: it survives a kill at any byte, and is never written over something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onekernel.batch.output import Output, OutputFailed
from onekernel.errors import InvalidRequest

DIGESTS = {1: "d1", 2: "d2", 4: "d4"}
GOOD = {"id": "batch_req_1", "response": {"status_code": 200, "body": {"text": "é"}}, "error": None}
BAD = {"id": "batch_req_2", "response": None, "error": {"message": "no"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An output with the answers to lines 2 and 1."""
    file = tmp_path / "out.jsonl"
    with Output(file, "demo", DIGESTS) as output:
        output.add(2, GOOD)
        output.add(1, BAD, ["typo"])
    return file


def test_what_was_written_is_done_the_next_time(path) -> None:
    with Output(path, "demo", DIGESTS) as output:
        assert output.done == {1, 2}
        assert output.failed == 1
        output.add(4, GOOD)
        assert output.done == {1, 2, 4}
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["onekernel"]["line"] for line in lines] == [2, 1, 4]
    assert lines[1]["onekernel"] == {"line": 1, "sha256": "d1", "model": "demo", "ignored": ["typo"]}


def test_a_kill_at_any_byte_costs_at_most_the_line_that_was_being_written(path) -> None:
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Output(path, "demo", DIGESTS) as output:
            assert output.done == ({2} if length >= first else set())
        assert path.read_bytes() == (whole[:first] if length >= first else b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"my thesis", "its last line is none that onekernel wrote"),
        (b"my thesis\n", "its line 1 is none that onekernel wrote"),
        (b'{"id": "batch_req_x", "response": null}\n', "its line 1 is none"),
        (b'{"id": "batch_req_x", "response": null}', "its last line is none"),
        (b'{"id": "batch_req_x", "onekernel": 3}\n', "its line 1 is none"),
        (b"[]\n", "its line 1 is none"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content, reason) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"belongs to something else: {reason}.*Choose another file"):
        Output(file, "demo", DIGESTS)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("model", "digests", "reason"),
    [
        ("other", DIGESTS, "its line 1 was made by the model 'demo', not by 'other'"),
        ("demo", {**DIGESTS, 2: "changed"}, "its line 1 answers line 2 of another input"),
        ("demo", {2: "d2"}, "its line 2 answers line 1 of another input"),
    ],
)
def test_the_output_of_another_job_is_left_as_it_is(path, model, digests, reason) -> None:
    path.write_bytes(path.read_bytes() + b'{"id": "batch_req_')  # not even its broken line is dropped
    before = path.read_bytes()
    with pytest.raises(InvalidRequest, match=reason):
        Output(path, model, digests)
    assert path.read_bytes() == before


def test_a_line_answered_twice_is_told(path) -> None:
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InvalidRequest, match="it answers line 2 twice"):
        Output(path, "demo", DIGESTS)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_two_processes_cannot_write_one_output(path) -> None:
    code = "from onekernel.batch.output import *\nimport sys\nOutput(Path(sys.argv[1]), 'demo', {1: 'd1', 2: 'd2'})"
    with Output(path, "demo", DIGESTS):
        found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "another process is writing the output" in found.stderr
    Output(path, "demo", DIGESTS).close()  # the lock is gone


def test_a_full_disk_is_told_and_what_it_cut_off_is_dropped_the_next_time(path, monkeypatch) -> None:
    whole, write, rounds = path.read_bytes(), os.write, iter([10])

    def fill(file: int, data: memoryview) -> int:
        for room in rounds:
            return write(file, data[:room])
        raise OSError(28, "No space left on device")

    with Output(path, "demo", DIGESTS) as output:
        monkeypatch.setattr(os, "write", fill)
        with pytest.raises(OutputFailed, match="cannot be written: No space left on device"):
            output.add(4, GOOD)
        monkeypatch.undo()
        assert output.done == {1, 2}
    assert len(path.read_bytes()) == len(whole) + 10
    with Output(path, "demo", DIGESTS) as output:
        assert output.done == {1, 2}
    assert path.read_bytes() == whole


def test_each_line_is_on_the_disk_before_it_counts_as_done(path, monkeypatch) -> None:
    with Output(path, "demo", DIGESTS) as output:
        synced: list[tuple[bytes, set[int]]] = []
        monkeypatch.setattr(os, "fsync", lambda _: synced.append((path.read_bytes(), set(output.done))))
        output.add(4, GOOD)
        assert synced == [(path.read_bytes(), {1, 2})]


def test_half_a_surrogate_pair_is_written_as_json_has_it(tmp_path) -> None:
    file = tmp_path / "out.jsonl"
    with Output(file, "demo", DIGESTS) as output:
        output.add(1, {**GOOD, "custom_id": "\ud800"})
    assert json.loads(file.read_bytes())["custom_id"] == "\ud800"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other devices")
def test_a_device_is_no_output() -> None:
    with pytest.raises(InvalidRequest, match="is no regular file"):
        Output(Path(os.devnull), "demo", DIGESTS)


def test_a_folder_is_no_output(tmp_path) -> None:
    with pytest.raises(OutputFailed, match="cannot be opened"):
        Output(tmp_path, "demo", DIGESTS)
