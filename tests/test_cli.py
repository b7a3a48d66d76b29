"""The command line as a user meets it: output, exit codes, one-line errors, ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import onekernel.api
from onekernel import Model
from onekernel.checkpoint import hub
from onekernel.cli import VERBS, main, options
from onekernel.errors import CheckpointError

MakeModel = Callable[..., Model]
PROMPT = "once "


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[tuple[str, str, int | None]]]:
    """Makes `load` hand out a model, and record what it was asked for."""

    def serve(model: Model) -> list[tuple[str, str, int | None]]:
        asked: list[tuple[str, str, int | None]] = []

        def load(name: str, *, backend: str, max_context: int | None, report: object) -> Model:
            asked.append((name, backend, max_context))
            return model

        monkeypatch.setattr(onekernel.api, "load", load)
        return asked

    return serve


def test_generate_streams_the_text_and_reports_on_stderr(make_model, loaded, capsys) -> None:
    asked = loaded(make_model("upon a time", prompt=PROMPT))
    assert main(["generate", PROMPT]) == 0
    output, errors = capsys.readouterr()
    assert output == "upon a time\n"
    assert errors.startswith("12 tokens, first after ")
    assert errors.endswith("stop, fake\n")
    assert asked == [("demo", "auto", None)]


def test_generate_reads_the_prompt_from_stdin_and_prints_json(make_model, loaded, capsys, monkeypatch) -> None:
    loaded(make_model("upon a time", prompt=PROMPT))
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", "-", "--json", "--stop", "a t", "--logprobs", "1", "--max-tokens", "9"]) == 0
    output, errors = capsys.readouterr()
    result = json.loads(output)
    assert errors == ""
    assert result["text"] == "upon "
    assert result["finish_reason"] == "stop"
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 8}
    assert result["backend"] == "fake"
    assert len(result["logprobs"]) == len(result["tokens"]) == 8


def test_every_sampling_flag_reaches_the_parameters(make_model, loaded, capsys, monkeypatch) -> None:
    model = make_model("upon", prompt=PROMPT)
    loaded(model)
    seen = {}
    stream = model.stream

    def spy(prompt, **arguments):
        seen.update(arguments)
        return stream(prompt, **arguments)

    monkeypatch.setattr(model, "stream", spy)
    flags = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 0.2, "seed": 4}
    flags |= {"frequency_penalty": 0.3, "repetition_penalty": 1.1, "logprobs": 0}
    assert set(flags) == {name for name, *_ in options.SAMPLING}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", PROMPT, "--json", *words, "--logit-bias", "3=-inf", "--logit-bias", "4=1.5"]) == 0
    assert {name: seen[name] for name in flags} == flags
    assert seen["logit_bias"] == {3: float("-inf"), 4: 1.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate", "x"], "unknown verb 'genrate': did you mean 'generate'?"),
        (["xyzzy"], f"unknown verb 'xyzzy': the verbs are {', '.join(VERBS)}"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["generate", "x", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (["generate", "x", "--logit-bias", "7"], "argument --logit-bias: '7' is not ID=X, a token id and a number"),
        (["generate", "x", "--temprature", "1"], "unknown option --temprature: did you mean '--temperature'?"),
        (["generate", "x", "--max-token=3"], "unknown option --max-token: did you mean '--max-tokens'?"),
        (["generate", "two", "words"], "one argument too many: 'words' (quote a text that holds spaces)"),
        (["chat", "--logprobs", "3"], "unknown option --logprobs"),
        (["chat", "--json"], "unknown option --json\n"),  # and not: did you mean '--stop'?
        (["--verison"], "unknown option --verison: did you mean '--version'?"),
        (["generate", "x", "--max-tokens", "0"], "argument --max-tokens: '0' is not a number of at least 1"),
        (["chat", "--max-context", "few"], "argument --max-context: 'few' is not a number of at least 1"),
        (["generate", "x", "--stop", ""], "argument --stop: the text to stop at is empty"),
        (["generate", "x", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    output, errors = capsys.readouterr()
    assert exit_info.value.code == 2
    assert output == ""
    assert errors.startswith(f"onekernel: {message}")
    assert "--help" in errors


def test_no_verb_prints_the_help_and_exits_2(capsys) -> None:
    assert main([]) == 2
    errors = capsys.readouterr().err
    assert all(f"  {verb} " in errors for verb in VERBS)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_has_examples_and_exits_0(verb, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"] if verb is None else [verb, "--help"])
    assert exit_info.value.code == 0
    assert f"onekernel {verb or 'generate'}" in capsys.readouterr().out.split("examples:")[1]


def test_an_invalid_value_exits_2_and_a_failure_exits_1(make_model, loaded, capsys, monkeypatch) -> None:
    loaded(make_model("upon", prompt=PROMPT))
    assert main(["generate", PROMPT, "--top-p", "2"]) == 2
    assert capsys.readouterr().err == "onekernel: top_p = 2.0 must be greater than 0 and at most 1\n"

    def fail(*_, **__):
        raise CheckpointError("the file is broken")

    monkeypatch.setattr(onekernel.api, "load", fail)
    assert main(["generate", PROMPT]) == 1
    assert capsys.readouterr().err == "onekernel: the file is broken\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--top-p", "2"], "top_p = 2.0 must be greater than 0 and at most 1"),
        (["chat", "--seed", "-1"], "seed = -1 must be an integer between 0 and 2**64 - 1"),
        (["generate", ""], "the prompt is empty: give a text to continue"),
        (["generate", "x", "--logprobs", "3"], "--logprobs is shown with --json only: add it"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_is_loaded(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(onekernel.api, "load", lambda *_, **__: pytest.fail("loaded"))
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"onekernel: {message}\n"


def test_ctrl_c_exits_130(capsys, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(onekernel.api, "load", interrupt)
    assert main(["generate", PROMPT]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_chat_answers_line_by_line_and_leaves_at_the_end(make_model, loaded, capsys, monkeypatch) -> None:
    loaded(make_model(["hello", "fine"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nhow are you?\n"))
    assert main(["chat", "--system", "be nice", "--no-thinking"]) == 0
    output, errors = capsys.readouterr()
    assert output == "hello\nfine\n"
    assert errors.count("first after") == 2


def test_chat_leaves_at_exit_and_survives_a_question_that_does_not_fit(make_model, loaded, capsys, monkeypatch) -> None:
    loaded(make_model("hello", max_context=100))
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200 + "\nhi\n/exit\nnever asked\n"))
    assert main(["chat"]) == 0
    output, errors = capsys.readouterr()
    assert output == "hello\n"
    assert "does not fit into the context of 100" in errors


class InterruptingOutput(io.StringIO):
    """Presses ctrl-C when the answer has come to a certain text."""

    def __init__(self, at: str, times: int) -> None:
        super().__init__()
        self.at, self.times = at, times

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.times and self.getvalue().endswith(self.at):
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            self.times = 0
        return count


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers ctrl-C to the whole console")
@pytest.mark.parametrize(("presses", "code", "answers"), [(1, 0, 2), (2, 130, 0)])
def test_ctrl_c_stops_the_answer_and_a_second_one_the_program(
    make_model, loaded, monkeypatch, presses, code, answers
) -> None:
    loaded(make_model(["hello and more " * 20, "fine"]))
    output = InterruptingOutput("and", presses)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nso?\n"))
    monkeypatch.setattr("sys.stdout", output)
    assert main(["chat"]) == code
    if presses == 1:
        first, second = output.getvalue().splitlines()
        assert first in ("hello and", "hello and ")
        assert second == "fine"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_doctor_says_what_would_run_and_why(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["backend"] in ("cpu", "cuda")
    assert facts["backend_reason"]
    assert isinstance(facts["gpu"], dict)
    assert main(["doctor"]) == 0
    assert f"{facts['backend']}: {facts['backend_reason']}" in capsys.readouterr().out


def test_doctor_says_what_fits_beside_a_model(capsys) -> None:
    assert main(["doctor", "--model", "demo", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["memory_needed"] > model["full_sequence_bytes"] > model["sequence_bytes"] > 2**20
    assert model["sequences_that_fit"] > 1
    assert main(["doctor", "--model", "demo"]) == 0
    output = capsys.readouterr().out
    assert " MiB with 4,096 tokens; " in output
    assert " MiB with 32,768 tokens\n" in output
    assert main(["doctor", "--model", "nobody/has-this"]) == 1
    assert "is not on this machine" in capsys.readouterr().err


def onekernel_process(*arguments: str, **keywords) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "onekernel", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, onekernel.cli\nprint([m for m in ('numpy', 'rich', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    fastest = 9.0
    for _ in range(3):
        start = time.perf_counter()
        output, _ = onekernel_process("--help").communicate()
        fastest = min(fastest, time.perf_counter() - start)
        assert output.startswith("usage: onekernel VERB")
    assert fastest < 0.3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_quiet(unbuffered: str) -> None:
    process = onekernel_process("doctor", "--json", env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 1


def test_text_that_the_terminal_cannot_show_is_no_crash(random_folder: Path) -> None:
    """Random weights answer with bytes that are no text; here they would be U+FFFD."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ("generate", "x", "--model", str(random_folder), "--max-tokens", "20", "--backend", "cpu")
    output, errors = onekernel_process(*arguments, env=environment).communicate()
    assert "?" in output
    assert "Traceback" not in errors
    assert "20 tokens" in errors


def test_input_that_is_not_utf_8_is_refused(random_folder: Path) -> None:
    arguments = ("generate", "-", "--model", str(random_folder), "--backend", "cpu")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    with subprocess.Popen(
        [sys.executable, "-m", "onekernel", *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        _, errors = process.communicate(b"caf\xe9")
    assert process.returncode == 2
    assert b"at character 3, which is no character (half of a surrogate pair, or input that was not UTF-8)" in errors
    assert b"Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers ctrl-C to the whole console")
def test_ctrl_c_ends_a_generation_and_keeps_what_was_printed() -> None:
    process = onekernel_process("generate", "def f(", "--max-tokens", "20000", "--backend", "cpu")
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"onekernel {onekernel.__version__}\n"


def test_models_lists_what_is_here_and_what_can_be_pulled(capsys, monkeypatch) -> None:
    here = [hub.LocalModel("demo", Path("somewhere"), 2**30, True)]
    here.append(hub.LocalModel("Qwen/Qwen3.5-2B", Path("elsewhere"), 2**29, False))
    monkeypatch.setattr(hub, "list_models", lambda: here)
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["demo", "1.00", "GiB", "somewhere"]
    assert lines[1].endswith("elsewhere  (incomplete: onekernel pull Qwen/Qwen3.5-2B)")
    assert lines[2].endswith("not here: onekernel pull Qwen/Qwen3.5-0.8B")
    assert len(lines) == 2 + len(hub.KNOWN_MODELS) - 1
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["local"]] == ["demo", "Qwen/Qwen3.5-2B"]
    assert {"name": "Qwen/Qwen3.5-0.8B", "parameters": hub.KNOWN_MODELS["Qwen/Qwen3.5-0.8B"]} in listed["known"]


def test_pull_prints_the_folder(capsys, tmp_path) -> None:
    assert main(["pull", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert main(["pull", "qwen3.5"]) == 1
    assert capsys.readouterr().err.startswith("onekernel: there is no model 'qwen3.5'")


def test_the_whole_program_from_a_folder_of_files(random_folder: Path) -> None:
    process = onekernel_process("generate", "--model", str(random_folder), "--max-tokens", "5", "--json", "def f():")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output)["usage"] == {"prompt_tokens": 8, "completion_tokens": 5}
    assert errors.startswith("loading ")
    assert len(errors.splitlines()) == 1
