"""What is made of measurements: tables of docs/gpu.md and docs/server.md, the timeline's picture, random models."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode_tables  # noqa: E402
import decode_timeline  # noqa: E402
import random_decoder  # noqa: E402
import server_tables  # noqa: E402

from onekernel.bench.ceiling import decode_bytes  # noqa: E402
from onekernel.checkpoint.sizes import SIZES  # noqa: E402
from onekernel.gpu import parameters  # noqa: E402
from onekernel.gpu.layout import MARKS  # noqa: E402

MEASURED = sorted((ROOT / "benchmarks" / "decode").glob("*-speed.json"))
TIMELINES = sorted((ROOT / "benchmarks" / "decode").glob("*-timeline.json"))


def entry(size: str, context: int, rate: float, **more: Any) -> dict[str, Any]:
    """Five samples around `rate` tokens/s, 1 % slower by wall time; figures that nobody measured."""
    samples = [
        {"device_s": 100 / rate * factor, "wall_s": 100 / rate * factor / 0.99, "launches": 1}
        for factor in (0.99, 0.995, 1.0, 1.005, 1.01)
    ]
    return {"size": size, "context": context, "count": 100, "samples": samples, **more}


def document(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "repetitions": 5,
        "problems": [],
        "limit": {"device": {"name": "Imaginary GPU"}, "read_bandwidth": {"value": 4e12}},
        "entries": list(entries),
    }


def cells(text: str, start: str) -> list[str]:
    [row] = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_table_shows_medians_shares_and_the_cost_of_context() -> None:
    half = 0.5 * 4e12 / decode_bytes(SIZES["0.8b"], 520 + 50).total
    text = decode_tables.tables(document(entry("0.8b", 520, half), entry("0.8b", 1904, 0.96 * half)))
    context, device, spread, wall, gap, share, against, launches = cells(text, "520")
    assert (context, device, share, against) == ("520", f"{half:,.0f}", "50 %", "100 %")
    assert (gap, wall, spread, launches) == ("-1.0 %", f"{0.99 * half:,.0f}", "0.5", "0.0100")
    assert cells(text, "1,904")[6] == "96 %"


def test_energy_and_sizes_have_their_places() -> None:
    energy = {"count": 5000, "joules": 1000.0, "watts": 100.0, "seconds": 10.0}
    text = decode_tables.tables(
        document(entry("0.8b", 520, 1000, energy=energy), entry("0.8b", 0, 1000), entry("27b", 520, 40))
    )
    assert "5.00 tok/J, 100 W over 10 s" in text
    assert cells(text, "27B")[2] == "40.0"
    assert cells(text, "0.8B")[2] == "1,000"


def test_what_could_not_be_measured_is_told() -> None:
    found = document(entry("0.8b", 520, 1000))
    found["problems"] = [{"size": "27b", "why": "the GPU has no memory left"}]
    assert "27b: the GPU has no memory left" in decode_tables.tables(found)


def test_tables_go_between_the_markers_and_nowhere_else() -> None:
    found = document(entry("0.8b", 520, 1000))
    text = f"before\n{decode_tables.BEGIN}\nold\n{decode_tables.END}\nafter\n"
    new = decode_tables.replace(text, found)
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert decode_tables.replace(new, found) == new
    with pytest.raises(SystemExit, match="no place for the tables"):
        decode_tables.replace("nothing", found)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_document_shows_the_committed_measurements(path: Path) -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert decode_tables.replace(text, json.loads(path.read_text(encoding="utf-8"))) == text


@pytest.mark.parametrize("path", TIMELINES, ids=lambda path: path.stem)
def test_picture_is_that_of_the_committed_timeline(path: Path) -> None:
    picture = ROOT / "docs" / "decode-timeline.svg"
    assert picture.read_text(encoding="utf-8") == decode_timeline.draw(json.loads(path.read_text(encoding="utf-8")))


def test_server_document_shows_the_committed_measurements() -> None:
    files = sorted((ROOT / "benchmarks" / "server").glob("*.json"))
    table = server_tables.table([json.loads(path.read_text(encoding="utf-8")) for path in files])
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert f"{server_tables.BEGIN}\n\n{table}\n\n{server_tables.END}" in text


def words(per_layer: int = 1000) -> list[int]:
    """What a block leaves: two marks a layer, two in the head, and a rest of an earlier token behind."""
    kind, clock = {name: i for i, name in enumerate(MARKS)}, 7_000_000
    found = [clock << 16 | kind["TOKEN"]]
    for layer in range(24):
        for name in ("MULTIPLIED", "RECEIVED"):
            clock += per_layer // 2
            found.append(clock << 16 | layer << 8 | kind[name])
    found.append(clock + 100 << 16 | 24 << 8 | kind["HEAD"])
    found.append(clock + 5000 << 16 | 24 << 8 | kind["TOKEN"])
    return [*found, found[1], 0, 0]


def test_marks_of_a_block_begin_at_zero_and_end_with_the_token() -> None:
    marks = decode_timeline.marks_of(words())
    assert marks[0][0] == 0
    assert marks[-1] == (24 * 1000 + 5000, 24, MARKS.index("TOKEN"))
    found = decode_timeline.means([marks, marks], "0.8b")
    assert found["delta-net layer"] == {"MULTIPLIED": 500.0, "RECEIVED": 500.0}
    assert found["attention layer"] == found["delta-net layer"]
    assert found["head"] == {"HEAD": 100.0, "TOKEN": 4900.0}
    with pytest.raises(SystemExit, match="no marks"):
        decode_timeline.marks_of([0, 0])


def test_picture_is_well_formed_and_shows_every_span() -> None:
    marks = [list(mark) for mark in decode_timeline.marks_of(words())]
    found = {
        "size": "0.8b",
        "context": 776,
        "token_s": 29e-6,
        "clocks_per_us": 1000.0,
        "blocks": 3,
        "device": {"name": "Imaginary <GPU>"},
        "commit": {"hash": None},
        "rows": [{"block": block, "marks": marks} for block in range(3)],
    }
    picture = decode_timeline.draw(found)
    ElementTree.fromstring(picture)
    assert "Imaginary &lt;GPU&gt;: 29 µs" in picture
    spans = sum(len(re.findall("M", path)) for path in re.findall(r'<path d="([^"]*)"', picture))
    assert spans == 3 * (len(marks) - 1) + 3 * 8  # the whole token, and two spans of each of four layers


@pytest.mark.parametrize("size", ["0.8b", "2b", "4b"])
def test_random_model_has_all_that_is_not_on_the_tape(size: str) -> None:
    packed = parameters.pack(random_decoder.small_tensors(SIZES[size], 0), SIZES[size])
    assert np.isfinite(packed).all()


def test_random_numbers_are_bf16_and_finite() -> None:
    bits = random_decoder.bf16(10_000, 0.02, 0)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.02, rel=0.05)
