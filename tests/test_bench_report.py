"""The page, the tables and the README: what they show, what they escape, and that a browser draws them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import xml.dom.minidom
import zlib
from pathlib import Path

import pytest
from bench_documents import document, engine

from onekernel.bench import document as documents
from onekernel.bench.report import page
from onekernel.bench.tables import BEGIN, END, notes, readme_tables, replace_tables, rows_of
from onekernel.errors import InvalidRequest

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def made_up() -> documents.Document:
    return document(
        engine("onekernel", 250_000, 2400, joules=0.2),
        engine("torch", 40_000, 700, joules=0.5),
        engine("cheat", 39_000, 2900, verdict="wrong"),
        {"name": "vllm", "title": "vllm", "status": "skipped", "reason": "vLLM is not installed", "measurements": []},
    )


def test_the_documents_of_these_tests_are_valid() -> None:
    assert documents.check(made_up()) == ""


def test_the_page_is_one_file_that_loads_nothing() -> None:
    text = page([("result.json", made_up())])
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "url(http" not in text


def test_names_from_documents_cannot_become_markup() -> None:
    text = page([("<b>.json", made_up())])
    assert "<made up>" not in text
    assert "&lt;made up&gt;" in text
    assert "<b>" not in text


def test_every_chart_is_well_formed() -> None:
    charts = re.findall(r"<svg.*?</svg>", page([("result.json", made_up())]), re.DOTALL)
    assert len(charts) >= 4  # prefill, decode, joules, context
    for chart in charts:
        xml.dom.minidom.parseString(chart)


def test_the_page_says_which_engine_is_wrong_and_which_was_skipped() -> None:
    text = page([("result.json", made_up())])
    assert "WRONG" in text
    assert "vLLM is not installed" in text
    assert "limit" in text


def test_a_bar_is_as_long_as_its_share_of_the_limit() -> None:
    found = made_up()
    figure = next(f for f in documents.figures(found) if f.engine == "onekernel" and f.cell.name == "tg128@520")
    chart = re.search(
        r'<svg[^>]*aria-label="Decode after 520 tokens, tokens per second".*?</svg>', page([("r", found)]), re.S
    )
    assert chart is not None
    start = 310
    bar = re.search(rf'<rect x="{start}" [^>]*width="([\d.]+)"[^>]*><title>onekernel', chart[0])
    line = re.search(r'<line x1="([\d.]+)"[^>]*class="limit"', chart[0])
    assert bar is not None
    assert line is not None
    assert float(bar[1]) / (float(line[1]) - start) == pytest.approx(figure.share, abs=0.005)


def test_the_rate_is_tokens_over_seconds_of_the_same_number_of_steps() -> None:
    """128 tokens over the time of 128 steps: not one token more."""
    found = document(engine("onekernel", 1000, 100))
    sample = found["engines"][0]["measurements"][2]["samples"][2]
    figure = next(f for f in documents.figures(found) if f.cell.name == "tg128@520")
    assert figure.rate is not None
    assert figure.rate.median == pytest.approx(128 / sample["wall_s"])


def test_the_limit_stands_beside_every_cell_and_skipped_engines_say_why() -> None:
    _, rows = rows_of(made_up())
    assert sum(row[0] == "limit" for row in rows) == 6
    assert rows[-1][-1] == "vLLM is not installed"


def test_no_share_is_given_where_the_weights_fit_into_a_cache() -> None:
    found = made_up()
    found["limit"]["device"]["cache"] = 2 << 30
    assert all(figure.share is None for figure in documents.figures(found))
    assert any("cache" in line for line in notes(found))
    assert "limit" not in {row[0] for row in rows_of(found)[1]}


def test_the_readme_shows_no_speed_of_a_wrong_engine() -> None:
    table = readme_tables([("result.json", made_up())])
    row = next(line for line in table.splitlines() if "cheat" in line)
    assert "2,900" not in row
    assert "wrong" in row
    assert table.index("onekernel <made up>") < table.index("torch <made up>")


def test_only_what_stands_between_the_markers_changes() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    replaced = replace_tables(text, [("result.json", made_up())])
    assert replaced.startswith(f"before\n{BEGIN}\n\n")
    assert replaced.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in replaced
    assert replace_tables(replaced, [("result.json", made_up())]) == replaced


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no place for the tables"):
        replace_tables("nothing here", [("result.json", made_up())])


def test_the_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    """`onekernel bench report benchmarks/results/*.json --readme README.md` mends this."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_tables(text, [(path.name, documents.read(path)) for path in RESULTS]) == text


def test_the_committed_page_shows_the_committed_results() -> None:
    """`onekernel bench report benchmarks/results/*.json --html benchmarks/results/report.html` mends this."""
    committed = (ROOT / "benchmarks" / "results" / "report.html").read_text(encoding="utf-8")
    assert committed == page([(path.name, documents.read(path)) for path in RESULTS])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_are_whole(path: Path) -> None:
    found = documents.read(path)
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]["hash"] or "")
    for figure in documents.figures(found):
        assert figure.seconds.count >= 5, figure.cell.name
        assert figure.agreement["verdict"] != "not checked" or figure.engine == "llama-bench"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.pop("limit"), "limit is missing"),
        (lambda d: d["engines"][0].pop("title"), r"engines\[0\]\.title is missing"),
        (lambda d: d["engines"][0]["measurements"][0].update(kind="magic"), "kind = 'magic'"),
        (lambda d: d["engines"][0]["measurements"][0]["samples"][0].update(wall_s=-1.0), "wall_s = -1.0"),
        (lambda d: d["checkpoint"].update(config={"model_type": "qwen3_5_text"}), "checkpoint.config"),
    ],
)
def test_a_damaged_document_is_refused_by_field(change, problem: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = made_up()
    change(found)
    path = tmp_path / "result.json"
    documents.write(found, path)
    with pytest.raises(InvalidRequest, match=problem):
        documents.read(path)


def colours_of(png: bytes) -> set[bytes]:
    """The distinct pixels of an 8-bit PNG. Filters are undone only as far as rows that use none or 'sub' and 'up'."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8
    size = {2: 3, 6: 4}[kind]
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    raw, row, found = zlib.decompress(data), bytearray(width * size), set()
    for y in range(height):
        start = y * (width * size + 1)
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + width * size])
        for i in range(len(line)):
            left, up = (line[i - size] if i >= size else 0), row[i]
            corner = row[i - size] if i >= size else 0
            if method == 1:
                line[i] = (line[i] + left) & 255
            elif method == 2:
                line[i] = (line[i] + up) & 255
            elif method == 3:
                line[i] = (line[i] + (left + up) // 2) & 255
            elif method == 4:
                guess = left + up - corner
                best = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
                line[i] = (line[i] + best[2]) & 255
        row = line
        found |= {bytes(line[i : i + 3]) for i in range(0, len(line), size)}
    return found


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    """A screenshot of the real thing: bars in our colour, hatching and the limit in red, text in black on white."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    (tmp_path / "report.html").write_text(page([("result.json", made_up())]), encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=800,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", f"file://{tmp_path / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert shot.is_file(), done.stderr.decode()[-500:]
    colours = colours_of(shot.read_bytes())
    assert {b"\xff\xff\xff", bytes.fromhex("2f6fde"), bytes.fromhex("c0392b"), bytes.fromhex("8a94a6")} <= colours


def test_a_cold_start_shows_its_parts_and_a_prompt_its_first_token() -> None:
    found = document(engine("onekernel", 52_000, 100))
    sample = {"wall_s": 3.0, "start_s": 0.5, "load_s": 2.0, "first_s": 0.5, "again_s": 0.1}
    cold = {"kind": "cold_start", "context": 64, "count": 1, "kernel_cache": "empty", "samples": [sample] * 5}
    found["engines"][0]["measurements"].append(cold)
    header, rows = rows_of(found)
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1][1:] == ["cold64, compiling", "", "0.0", "3.00 s", "", "", "", "", rows[-1][-1]]
    assert rows[-1][-1] == "start 0.50, load 2.00, first 0.50, again 0.10 s"
    assert next(row for row in rows if row[1] == "pp520" and row[0] != "limit")[4] == "10.0 ms"


def test_figures_of_a_busy_machine_say_so() -> None:
    quiet, busy = (document(engine("onekernel", 1000, 100)) for _ in range(2))
    for found, load in ((quiet, 2.1), (busy, 9.7)):
        found["machine"]["cpu_count"] = 2
        found["engines"][0]["measurements"][0]["telemetry"] = {"load_average": load}
    assert not any("Other programs" in line for line in notes(quiet))
    assert any("load average 10 on 2 cores" in line for line in notes(busy))
    assert "Other programs" in readme_tables([("busy.json", busy)])
