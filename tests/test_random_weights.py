"""Random checkpoints: true shapes, the same bytes every time, sane activations, and a tokenizer that covers them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_models import TOKENS, write_small

from onekernel.checkpoint import random_weights
from onekernel.checkpoint.random_weights import config, fingerprint, random_checkpoint, random_tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES
from onekernel.checkpoint.weights import load_weights
from onekernel.errors import InvalidRequest
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State
from onekernel.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("random") / "small")


def test_the_same_seed_writes_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = write_small(tmp_path / "again")
    assert (small / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert fingerprint(small) == fingerprint(again)


def test_the_loader_takes_it_as_a_released_checkpoint(small: Path) -> None:
    shape = Shape.load(small)
    weights = load_weights(small, shape)
    assert weights["layers.0.linear_attn.A_log"].dtype == "F32"
    assert weights["layers.0.mlp.up_proj.weight"].dtype == "BF16"


def test_activations_and_logits_are_of_ordinary_size(small: Path) -> None:
    """Neither so small that every engine looks exact, nor so large that all certainty is in one token."""
    shape = Shape.load(small)
    parameters = Parameters.load(load_weights(small, shape), shape, mtp=False)
    tokens = np.random.default_rng(0).integers(0, TOKENS, 100).tolist()
    logits = model.forward(parameters, State.empty(shape), tokens, all_logits=True)
    assert 1 < logits.std() < 4
    best = np.unique(logits.argmax(-1))
    assert len(best) > 50  # what comes next depends on what came before


def test_decay_rates_reach_from_short_to_long_memories() -> None:
    shape = Shape.from_config(config(SIZES["27b"]))
    rates = np.exp(random_tensor("layers.0.linear_attn.A_log", (4096,), shape, 0))
    step = np.logaddexp(random_tensor("layers.0.linear_attn.dt_bias", (4096,), shape, 0), 0)
    assert 1 <= rates.min() < 2 < 14 < rates.max() <= 16
    assert 0.00099 < step.min() < 0.002 < 0.08 < step.max() < 0.1001


def test_every_id_has_a_text_and_text_encodes_as_before(small: Path) -> None:
    tokenizer = Tokenizer.load(small)
    assert tokenizer.size == TOKENS
    assert tokenizer.decode([8191]) == "<8191>"
    text = "def fibonacci(n):\n    return n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_size_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"random:3b.*random:0\.8b"):
        random_checkpoint("random:3b")


def test_it_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONEKERNEL_CACHE", str(tmp_path))
    written: list[Path] = []

    def write(folder: Path, document: dict[str, object], tokens: int) -> None:
        written.append(folder)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(random_weights, "write_random", write)
    lines: list[str] = []
    assert random_checkpoint("random:0.8B", lines.append) == random_checkpoint("random:0.8b", lines.append)
    assert len(written) == len(lines) == 1
