"""Perplexity against the definition, and the verb as its user meets it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

import onekernel
from onekernel import Model
from onekernel.cli import main
from onekernel.engine import perplexity as module
from onekernel.engine.perplexity import log_probabilities, perplexity
from onekernel.errors import InvalidRequest

TOKENS = np.random.default_rng(0).integers(0, 258, 50).tolist()


@pytest.fixture(scope="module")
def random_model(random_folder: Path) -> Model:
    return onekernel.load(str(random_folder), backend="cpu")


def by_definition(model: Model, tokens: list[int]) -> np.ndarray:
    """Each probability on its own, from a prompt of exactly the tokens before."""
    result = []
    for i in range(1, len(tokens)):
        session = model.engine.new_session()
        session.extend(tokens[:i])
        logits = session.logits().astype(np.float64)
        result.append(logits[tokens[i]] - np.logaddexp.reduce(logits))
    return np.array(result)


@pytest.mark.parametrize("at_once", [7, 128])
def test_log_probabilities_follow_the_definition_across_slices(random_model, monkeypatch, at_once) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    ours = log_probabilities(random_model.engine, TOKENS)
    np.testing.assert_allclose(ours, by_definition(random_model, TOKENS), atol=2e-4)


def test_windows_start_afresh_and_a_single_token_is_left_out(random_model) -> None:
    result = perplexity(random_model.engine, TOKENS[:41], window=20)
    parts = [by_definition(random_model, TOKENS[start : start + 20]) for start in (0, 20)]
    assert (result.tokens, result.windows) == (38, 2)
    assert result.value == pytest.approx(np.exp(-np.concatenate(parts).mean()), rel=1e-5)


@pytest.mark.parametrize(("tokens", "window"), [([1], 10), ([], 10), ([1, 2], 1), ([1, 2], 513)])
def test_what_cannot_be_measured_is_refused(random_model, tokens, window) -> None:
    with pytest.raises(InvalidRequest):
        perplexity(random_model.engine, tokens, window)


def test_the_verb_prints_the_number_of_the_function(random_folder, tmp_path, capsys, monkeypatch) -> None:
    text = "once upon a time there was a test\n" * 3
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    arguments = ["perplexity", "--model", str(random_folder), "--backend", "cpu", "--context", "40"]
    assert main([*arguments, "--json", str(path)]) == 0
    record = json.loads(capsys.readouterr().out)
    with onekernel.load(str(random_folder), backend="cpu") as model:
        expected = perplexity(model.engine, model.tokenizer.encode(text), 40)
    assert record["perplexity"] == pytest.approx(expected.value)
    assert (record["tokens"], record["windows"], record["backend"]) == (expected.tokens, expected.windows, "cpu")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main([*arguments, "-"]) == 0
    assert capsys.readouterr().out == f"perplexity {expected.value:.4f}\n"


def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(tmp_path, capsys) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, words in (("nothing", "cannot be read"), ("bytes", "is not UTF-8")):
        assert main(["perplexity", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
