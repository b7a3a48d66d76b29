"""The card of the demo model says what its files say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import Shape
from onekernel.reference.parameters import parameter_count

SCRIPT = Path(__file__).parent.parent / "tools" / "demo_card.py"
REPORT: dict[str, Any] = {
    "steps": 1234,
    "tokens": 60_000_000,
    "seconds": 432.0,
    "gpu": "NVIDIA H200",
    "torch": "2.13.0",
    "heldout_loss": 2.3456,
    "heldout_mtp_loss": 3.21,
    "samples": ["def first():\n    pass\n", "ask ```python\n```", "third", "fourth"],
    "history": [],
    "smallest_margins": [0.5],
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder(), tmp_path / "demo"))


def test_the_shipped_card_is_up_to_date() -> None:
    result = run("--check")
    assert result.returncode == 0, result.stderr


def test_the_figures_of_the_shipped_training_stand_in_the_card() -> None:
    card = (demo_folder() / "README.md").read_text(encoding="utf-8")
    shape = Shape.load(demo_folder())
    assert f"| parameters | {parameter_count(shape):,}, " in card
    path = demo_folder() / "training.json"
    if not path.is_file():
        assert "The figures of this training run were not recorded." in card
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    assert f"**{report['heldout_loss']:.3f}**" in card
    assert f"{report['steps']:,} steps" in card
    assert report["samples"][0].rstrip("\n") in card


def test_a_training_run_fills_the_card(folder: Path) -> None:
    (folder / "training.json").write_text(json.dumps(REPORT), encoding="utf-8")
    assert run("--folder", folder, "--check").returncode == 1
    before = (folder / "README.md").read_text(encoding="utf-8")
    assert run("--folder", folder).returncode == 0
    assert run("--folder", folder, "--check").returncode == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "1,234 steps, 60 million tokens, 7.2 minutes on one NVIDIA H200 with PyTorch 2.13.0." in card
    assert "**2.346** (perplexity 10.4)" in card
    assert "the token after the next, 3.210." in card
    assert "```text\ndef first():\n    pass\n```" in card
    assert "````text\nask ```python\n```\n````" in card
    assert "fourth" not in card
    assert card.split("<!-- written")[0] == before.split("<!-- written")[0]
    assert card.split("<!-- /written")[1] == before.split("<!-- /written")[1]
    assert run("--folder", folder).returncode == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == card


def test_a_changed_figure_is_noticed(folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("| hidden, ", "| hiden, "), encoding="utf-8")
    result = run("--folder", folder, "--check")
    assert result.returncode == 1
    assert "is out of date: run python tools/demo_card.py" in result.stderr


def test_a_card_without_marks_is_not_touched(folder: Path) -> None:
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert run("--folder", folder).returncode == 1
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
