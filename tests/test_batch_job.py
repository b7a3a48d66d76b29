"""Batch jobs as a whole: each line once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import WatchedBackend

import onekernel.api
from onekernel import Model
from onekernel.batch import job
from onekernel.batch.answers import Answers
from onekernel.batch.job import Progress
from onekernel.batch.output import Output, OutputFailed
from onekernel.cli import main
from onekernel.engine import Engine
from onekernel.errors import BackendError, InvalidRequest
from onekernel.text.tokenizer import Tokenizer

CHAT = {"method": "POST", "url": "/v1/chat/completions"}
TEXT = {"method": "POST", "url": "/v1/completions"}
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}


@pytest.fixture
def make(text_folder: Path) -> Callable[..., Model]:
    """Models whose next token depends on all that came before."""

    def model(**options: object) -> Model:
        tokenizer = Tokenizer.load(text_folder)
        return Model("fake", Engine(WatchedBackend(tokenizer.size, **options)), tokenizer, text_folder)

    return model


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(*lines: object) -> tuple[Path, Path]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path, tmp_path / "out.jsonl"

    return write


def nothing(_: Progress) -> None:
    pass


def run_job(model: Model, paths: tuple[Path, Path], concurrent: int = 4, report: Any = nothing, **options) -> Progress:
    plan = job.make_plan(paths[0], {"max_tokens": 8, **options})
    with Output(paths[1], "fake", plan.digests) as output:
        return job.run(model, "fake", plan, output, report, concurrent)


def results(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of an output by the lines of the input that they answer; each may be there once."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    by_number = {result["onekernel"]["line"]: result for result in found}
    assert len(by_number) == len(found), "a line was answered twice"
    return by_number


def texts(path: Path) -> dict[int, str]:
    return {number: one["response"]["body"]["choices"][0]["text"] for number, one in results(path).items()}


@pytest.mark.parametrize("concurrent", [1, 5])
def test_plain_prompts_are_continued_as_generate_does(make, files, concurrent) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    paths = files(*prompts)
    progress = run_job(make(), paths, concurrent)
    model = make()
    assert texts(paths[1]) == {
        i: model.generate(prompt, max_tokens=8).text for i, prompt in enumerate(prompts, start=1)
    }
    assert (progress.total, progress.done, progress.failed) == (20, 20, 0)
    tokens = sum(one["response"]["body"]["usage"]["completion_tokens"] for one in results(paths[1]).values())
    assert progress.completion_tokens == tokens


def test_requests_are_answered_in_openais_form(make, files) -> None:
    paths = files(
        {"custom_id": "chat", **CHAT, "body": {**HELLO, "n": 2}},
        {"custom_id": "text", **TEXT, "body": {"prompt": ["a", "b"], "max_tokens": 3, "max_token": 1}},
    )
    assert run_job(make(), paths, concurrent=1).failed == 0
    chat, text = results(paths[1])[1], results(paths[1])[2]
    assert list(chat) == ["id", "custom_id", "response", "error", "onekernel"]
    assert (chat["custom_id"], chat["error"], chat["response"]["status_code"]) == ("chat", None, 200)
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert len(chat["response"]["body"]["choices"]) == 2
    assert chat["response"]["body"]["model"] == "fake"
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["body"]["usage"]["completion_tokens"] == 6
    assert "ignored" not in chat["onekernel"]
    assert text["onekernel"]["ignored"] == ["max_token"]


def test_a_bad_line_gets_an_error_and_the_others_their_answers(make, files) -> None:
    paths = files(
        "fine",
        17,
        {"custom_id": "range", **TEXT, "body": {"prompt": "x", "temperature": -1}},
        {"custom_id": "type", **CHAT, "body": {"messages": "hello"}},
        {"custom_id": "stream", **CHAT, "body": {**HELLO, "stream": True}},
        {"custom_id": "long", **TEXT, "body": {"prompt": "x" * 200}},
        {"custom_id": "half", **TEXT, "body": {"prompt": "\ud800"}},
        {"prompt": ""},
        "fine too",
    )
    progress = run_job(make(max_context=100), paths)
    found = results(paths[1])
    assert sorted(found) == list(range(1, 10))
    assert progress.failed == 7
    assert {number for number, one in found.items() if one["response"] and one["response"]["status_code"] == 200} == {
        1,
        9,
    }
    assert found[2]["response"] is None
    assert found[2]["error"]["code"] == "invalid_line"
    assert found[2]["error"]["message"].startswith("line 2: it is neither a request")
    fields = {number: found[number]["response"]["body"]["error"]["param"] for number in (3, 4, 5)}
    assert fields == {3: "temperature", 4: "messages", 5: "stream"}
    assert found[6]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert "no character" in found[7]["response"]["body"]["error"]["message"]
    assert all(found[number]["response"]["status_code"] == 400 for number in range(3, 9))
    assert sorted(problem.split(":")[0] for problem in progress.problems) == [f"line {n}" for n in range(3, 9)]


def test_a_second_run_does_only_what_is_left(make, files) -> None:
    paths = files(*[f"prompt {i}" for i in range(10)])
    run_job(make(), paths)
    whole = paths[1].read_bytes()
    lines = whole.splitlines(keepends=True)
    paths[1].write_bytes(b"".join(lines[:6]) + lines[6][:40])
    model = make()
    run_job(model, paths)
    assert paths[1].read_bytes().startswith(b"".join(lines[:6]))
    assert sorted(results(paths[1])) == list(range(1, 11))
    assert len(model.engine._backend.seeds) <= 4 * 4  # slices of four requests, not of ten


def test_lines_added_to_the_input_are_answered_without_the_old_ones(make, files) -> None:
    run_job(make(), files("a", "b"))
    paths = files("a", "b", "c")
    before = paths[1].read_bytes()
    run_job(make(), paths)
    assert paths[1].read_bytes().startswith(before)
    assert sorted(results(paths[1])) == [1, 2, 3]


@pytest.mark.parametrize("concurrent", [1, 3])
def test_a_broken_engine_ends_the_job_and_costs_no_line(make, files, concurrent) -> None:
    paths = files(*[f"prompt {i}" for i in range(6)])
    model = make()
    model.close()
    with pytest.raises(BackendError, match="closed"):
        run_job(model, paths, concurrent)
    assert paths[1].read_bytes() == b""
    run_job(make(), paths)
    assert sorted(results(paths[1])) == list(range(1, 7))


def test_a_full_disk_ends_the_job(make, files, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OutputFailed("full")

    monkeypatch.setattr(Output, "add_all", full)
    with pytest.raises(OutputFailed, match="full"):
        run_job(make(), files("a", "b", "c"))


def test_no_more_lines_are_worked_on_at_a_time_than_asked_for(make, files, monkeypatch) -> None:
    running, most = 0, 0
    answer = Answers._answer

    async def watched(self: Answers, line: Any) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(0.002)
            return await answer(self, line)
        finally:
            running -= 1

    monkeypatch.setattr(Answers, "_answer", watched)
    run_job(make(), files(*[f"prompt {i}" for i in range(12)]), concurrent=3)
    assert most == 3


def test_an_input_that_changes_while_the_job_runs_is_noticed(make, files) -> None:
    paths = files("a", "b")
    plan = job.make_plan(paths[0], {})
    files("a", "c")
    with (
        Output(paths[1], "fake", plan.digests) as output,
        pytest.raises(InvalidRequest, match=r"line 2 of .* was changed while the job ran"),
    ):
        job.run(make(), "fake", plan, output, nothing, 1)


def test_an_empty_input_is_refused(files) -> None:
    with pytest.raises(InvalidRequest, match="holds no lines"):
        job.make_plan(files()[0], {})


def test_the_progress_counts_tokens_before_a_line_is_done(make, files) -> None:
    seen: list[Progress] = []
    run_job(make(delay=0.01), files({"prompt": "a", "max_tokens": 60, "ignore_eos": True}), report=seen.append)
    assert [one for one in seen if one.done == 0 and 0 < one.completion_tokens < 60]
    assert (seen[-1].done, seen[-1].completion_tokens) == (1, 60)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], None]:
    def serve(model: Model) -> None:
        monkeypatch.setattr(onekernel.api, "load", lambda *_, **__: model)

    return serve


def test_the_command_answers_tells_what_failed_and_does_not_do_it_twice(
    make, files, loaded, capsys, monkeypatch
) -> None:
    loaded(make())
    first, second = files("a", 3, {"prompt": "b", "temperature": -1})
    arguments = ["batch", str(first), "-o", str(second), "--max-tokens", "4"]
    assert main(arguments) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("onekernel: line 2: it is neither a request")
    assert "\nonekernel: line 3: temperature = -1.0 must be" in errors
    assert "\n3 lines, 2 failed, " in errors
    monkeypatch.setattr(onekernel.api, "load", lambda *_, **__: pytest.fail("loaded"))
    before = second.read_bytes()
    assert main(arguments) == 1
    assert capsys.readouterr().err == "all 3 lines were done before, 2 of them failed\n"
    assert main([*arguments[:-1], "5"]) == 2
    assert "belongs to something else" in capsys.readouterr().err
    assert main([*arguments, "--model", "another"]) == 2
    assert "was made by the model 'demo', not by 'another'" in capsys.readouterr().err
    assert second.read_bytes() == before


def test_an_output_that_is_the_input_is_refused(files, capsys) -> None:
    path, _ = files("a")
    assert main(["batch", str(path), "-o", str(path)]) == 2
    assert "is the input: choose another file" in capsys.readouterr().err
    assert path.read_text() == '"a"\n'


def test_sampling_options_reach_the_plain_prompts(make, files, loaded) -> None:
    loaded(make())
    first, second = files("a")
    flags = ["--stop", "zz", "--logit-bias", "65=100", "--logit-bias", "66=-inf", "--temperature", "0"]
    assert main(["batch", str(first), "-o", str(second), "--max-tokens", "3", *flags]) == 0
    assert texts(second) == {1: make().tokenizer.decode([65] * 3)}


def job_process(paths: tuple[Path, Path], *options: str) -> subprocess.Popen[str]:
    """The real command on the demo model."""
    command = [sys.executable, "-m", "onekernel", "batch", str(paths[0]), "-o", str(paths[1]), "--backend", "cpu"]
    return subprocess.Popen(
        [*command, "--max-tokens", "12", "--temperature", "0", "--max-concurrent", "3", *options],
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


PROMPTS = [f"def function_{i}(a, x," for i in range(30)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_twice_the_output_is_complete_and_has_each_line_once(files) -> None:
    paths = files(*PROMPTS)
    kept = b""
    for count in (3, 8):
        process = job_process(paths)
        wait_for_lines(process, paths[1], count)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed = paths[1].read_bytes()
        assert killed.startswith(kept)
        kept = killed[: killed.rindex(b"\n") + 1]
        assert count <= kept.count(b"\n") < len(PROMPTS)
        with paths[1].open("ab") as file:  # what a kill in the middle of a write leaves
            file.write(b'{"id": "batch_req_0123", "resp')
    process = job_process(paths)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{kept.count(bytes([10]))} of 30 lines were done before: going on" in errors
    assert paths[1].read_bytes().startswith(kept)
    with onekernel.api.load("demo", backend="cpu") as model:
        alone = [model.generate(prompt, max_tokens=12, temperature=0).text for prompt in PROMPTS]
    assert texts(paths[1]) == dict(enumerate(alone, start=1))


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers ctrl-C to the whole console")
def test_ctrl_c_exits_130_and_the_job_goes_on_later(files) -> None:
    paths = files(*PROMPTS)
    process = job_process(paths)
    wait_for_lines(process, paths[1], 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    done = len(results(paths[1]))
    assert 2 <= done < len(PROMPTS)
    assert f"{done} of 30 lines are done: the same command goes on there" in errors
    process = job_process(paths)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert sorted(results(paths[1])) == list(range(1, 31))
