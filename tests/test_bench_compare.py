"""Two documents: real changes are told from noise, and what makes them incomparable is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_documents import document, engine

from onekernel.bench.compare import compare, differences
from onekernel.cli import main


def line_of(lines: list[str], cell: str) -> str:
    return next(line for line in lines if cell in line)


def test_a_faster_engine_is_faster_and_the_rest_is_noise() -> None:
    before = document(engine("onekernel", 1000, 100))
    after = document(engine("onekernel", 1001, 120))
    lines = compare(before, after)
    assert line_of(lines, "tg128@520").endswith("FASTER")
    assert "+20.0 %" in line_of(lines, "tg128@520")
    assert line_of(lines, "pp520").endswith("within noise")
    assert line_of(compare(after, before), "tg128@520").endswith("SLOWER")


def test_the_threshold_decides_what_counts() -> None:
    before, after = document(engine("onekernel", 1000, 100)), document(engine("onekernel", 1000, 104))
    assert line_of(compare(before, after), "tg128@520").endswith("FASTER")
    assert line_of(compare(before, after, 0.05), "tg128@520").endswith("within noise")


def test_a_faster_but_wrong_engine_is_no_progress() -> None:
    after = document(engine("onekernel", 1000, 200, verdict="wrong"))
    assert "wrong in the second" in line_of(compare(document(engine("onekernel", 1000, 100)), after), "tg128@520")


def test_what_only_one_has_is_listed() -> None:
    lines = compare(document(engine("a", 1000, 100)), document(engine("b", 1000, 100)))
    assert any(line.startswith("a ") and line.endswith("only in the first") for line in lines)
    assert any(line.startswith("b ") and line.endswith("only in the second") for line in lines)


def test_another_machine_or_model_is_said() -> None:
    first, second = document(), document()
    assert differences(first, second) == []
    second["limit"]["device"]["name"] = "Another GPU"
    second["checkpoint"]["fingerprint"] = "g"
    second["limit"]["read_bandwidth"]["value"] *= 0.9
    assert len(differences(first, second)) == 3


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("before", 100), ("after", 150)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document(engine("onekernel", 1000, rate))))
    assert main(["bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 0
    assert "FASTER" in capsys.readouterr().out
    assert main(["bench", "compare", str(tmp_path / "before.json")]) == 2
    assert "two files" in capsys.readouterr().err
    assert main(["bench", "compare", "absent.json", str(tmp_path / "before.json")]) == 2
    assert "absent.json does not exist" in capsys.readouterr().err


def test_cold_starts_with_and_without_compilation_are_not_mixed_up() -> None:
    def starts(warm: float, empty: float) -> dict[str, Any]:
        found = engine("onekernel", 1000, 100)
        found["measurements"] = [
            {
                "kind": "cold_start",
                "context": 64,
                "count": 1,
                "kernel_cache": cache,
                "samples": [{"wall_s": seconds + i / 1000, "start_s": 0.1, "load_s": 0.2} for i in range(5)],
            }
            for cache, seconds in (("warm", warm), ("empty", empty))
        ]
        return document(found)

    lines = compare(starts(1.0, 9.0), starts(1.0, 6.0))
    assert line_of(lines, "cold64 ").endswith("within noise")
    assert line_of(lines, "cold64, compiling").endswith("FASTER")  # fewer seconds
