"""onekernel bench: measure this engine and others against the limit of the machine; report and compare results."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from onekernel.bench.run import Plan
    from onekernel.bench.telemetry import Meter
    from onekernel.bench.workload import Cell

SUMMARY = "measure speed and energy, beside other engines and the machine's limit"
EXAMPLES = (
    "onekernel bench",
    "onekernel bench --checkpoint random:0.8b --suite standard,context --output result.json",
    "onekernel bench --engines onekernel,transformers,torch-compiled,llama.cpp",
    "onekernel bench --engines url --url http://localhost:8000/v1",
    "onekernel bench report benchmarks/results/*.json --html report.html",
    "onekernel bench compare before.json after.json",
)
SUITES = (
    "standard (pp520, tg128), context (tg128 after 0 to 131,072 tokens), prompt and ttft (prompts of 16 to 32,768 "
    "tokens), cold (from the start of the process to the first token)"
)
REFRESH = 4  # a second
FILE_WIDTH = 180  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="run", choices=("run", "report", "compare"), help="run by default")
    parser.add_argument("files", nargs="*", metavar="FILE", help="results to report or to compare")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--checkpoint",
        "--model",
        default="demo",
        metavar="MODEL",
        help="demo (the default), a folder, a hub name, or random:0.8b, 2b, 4b, 9b, 27b: true shapes, random weights",
    )
    run.add_argument("--backend", default="auto", choices=("auto", "cpu", "cuda"), help="the device to measure on")
    run.add_argument("--suite", default="standard", metavar="A,B", help=SUITES)
    run.add_argument("--engines", metavar="A,B", help="which to measure; those that are not installed say so")
    run.add_argument("--repetitions", type=int, default=5, metavar="N", help="samples of each figure; at least 5")
    run.add_argument("--warm-ups", type=int, default=2, metavar="N", help="untimed passes before them; at least 1")
    run.add_argument("--energy", type=float, default=10.0, metavar="S", help="seconds of an energy window; 0: none")
    run.add_argument("--energy-of", default="prefill,decode", metavar="A,B", help="which figures get such a window")
    run.add_argument(
        "--gate-tokens", type=int, default=192, metavar="N", help="tokens of the correctness gate; 0: none"
    )
    run.add_argument("--output", type=Path, metavar="FILE", help="where the JSON document goes")
    run.add_argument("--logs", type=Path, metavar="FOLDER", help="where to keep what the engines' processes write")
    run.add_argument("--url", metavar="URL", help="of an OpenAI-compatible server, for the engine url")
    run.add_argument("--url-model", metavar="NAME", help="the model's name there; the first that it lists by default")
    run.add_argument("--llama-bench", metavar="PATH", help="a llama-bench binary, for the engine llama-bench")
    run.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="the interpreter of an engine with an environment of its own; may be repeated",
    )
    run.add_argument(
        "--power-sweep",
        metavar="A:B:STEP",
        help="set power limits (watts) one after another, and restore; needs root, and affects all who use the GPU",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    report.add_argument("--readme", type=Path, metavar="FILE", help="write the tables between the markers of a README")
    compare = parser.add_argument_group("compare")
    compare.add_argument("--threshold", type=float, default=1.0, metavar="PERCENT", help="changes up to this are noise")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "report":
        return _report(arguments)
    if arguments.action == "compare":
        return _compare(arguments)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from onekernel.bench import document as documents
    from onekernel.errors import InvalidRequest

    if arguments.files:
        raise InvalidRequest(f"{arguments.files[0]!r}: a run takes no files; did you mean report or compare?")
    plan, meter = _plan(arguments), None
    if plan.device == "cuda":
        meter = _meter()
    if arguments.power_sweep:
        return _power_sweep(arguments, plan, meter)
    document = _measure(plan, meter, arguments.output)
    if arguments.output:
        documents.write(document, arguments.output)
        print(f"written: {arguments.output}", file=sys.stderr)
    return 0 if any(engine["status"] == "measured" for engine in document["engines"]) else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    from onekernel.backend.choose import choose
    from onekernel.bench.peers import ENGINES, choose_engines
    from onekernel.bench.run import Plan
    from onekernel.checkpoint.hub import resolve
    from onekernel.checkpoint.random_weights import is_random, random_checkpoint
    from onekernel.errors import InvalidRequest

    name = arguments.checkpoint
    folder = random_checkpoint(name, _say) if is_random(name) else resolve(name)
    settings: dict[str, dict[str, Any]] = {"url": {}, "llama-bench": {}}
    if arguments.url:
        settings["url"] = {"url": arguments.url, "model": arguments.url_model}
    if arguments.llama_bench:
        settings["llama-bench"] = {"binary": arguments.llama_bench}
    pythons = {}
    for pair in arguments.peer_python:
        engine, separator, path = pair.partition("=")
        if not separator or engine not in ENGINES:
            raise InvalidRequest(f"--peer-python {pair!r} is not ENGINE=PATH with one of {', '.join(ENGINES)}")
        pythons[engine] = path
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    names = arguments.engines.split(",") if arguments.engines else list(ENGINES)
    return Plan(
        checkpoint=name,
        folder=folder.resolve(),
        device=arguments.backend if arguments.backend != "auto" else choose("auto").name,
        cells=_cells(arguments),
        engines=choose_engines(names, settings),
        repetitions=arguments.repetitions,
        energy_s=arguments.energy,
        gate_tokens=arguments.gate_tokens,
        warm_ups=arguments.warm_ups,
        pythons=pythons,
        command=["onekernel", *sys.argv[1:]],
        logs=arguments.logs,
    )


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    from onekernel.bench.workload import DECODE, PREFILL, cells_of
    from onekernel.errors import InvalidRequest

    kinds = arguments.energy_of.split(",")
    if unknown := [kind for kind in kinds if kind not in (PREFILL, DECODE)]:
        raise InvalidRequest(f"--energy-of {unknown[0]!r} is unknown: choose from {PREFILL}, {DECODE}")
    cells = cells_of(arguments.suite.split(","))
    return [dataclasses.replace(cell, energy=cell.energy and cell.kind in kinds) for cell in cells]


def _meter() -> Meter | None:
    """NVML's view of the GPU; None, and a line that says why, if there is none."""
    from onekernel.errors import BackendError
    from onekernel.gpu.nvml import Nvml
    from onekernel.gpu.probe import bus_id

    try:
        return Nvml(bus_id())
    except BackendError as error:
        _say(f"no energy and no clocks: {error}")
        return None


def _measure(plan: Plan, meter: Meter | None, output: Path | None) -> dict[str, Any]:
    """Run with a live table; the document is written whenever it has grown."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.spinner import Spinner

    from onekernel.bench import document as documents
    from onekernel.bench.run import Listener
    from onekernel.bench.run import run as run_plan

    console = Console(stderr=True)
    latest: documents.Document | None = None
    line, began = "", time.monotonic()

    def view() -> Group:
        parts: list[Any] = [] if latest is None else [table_of(latest)]
        return Group(*parts, Spinner("dots", f"{line} ({time.monotonic() - began:.0f} s)"))

    with Live(console=console, refresh_per_second=REFRESH, get_renderable=view, transient=True):

        def stage(text: str) -> None:
            nonlocal line
            line = text
            if not console.is_terminal:
                _say(f"{time.monotonic() - began:6.1f} s  {text}")

        def updated(document: documents.Document) -> None:
            nonlocal latest
            latest = document
            if output:
                documents.write(document, output)

        document = run_plan(plan, Listener(stage, updated), meter)
    out = Console()
    if not out.is_terminal:  # a file has room for all columns
        out = Console(width=FILE_WIDTH)
    out.print(table_of(document))
    for text in notes_of(document):
        print(text)
    return document


def table_of(document: dict[str, Any]) -> Table:
    """The results so far, for the terminal."""
    from rich import box
    from rich.table import Table

    from onekernel.bench.tables import ABSENT, rows_of

    header, rows = rows_of(document, names=True)
    # Columns without a figure (watts on a CPU) only take room.
    shown = [i for i in range(len(header)) if i < 3 or any(row[i] not in ("", ABSENT) for row in rows)]
    title = f"{document['checkpoint']['name']} on {document['limit']['device']['name']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i in shown:
        words = i < 2 or i == len(header) - 1
        table.add_column(header[i], justify="left" if words else "right", no_wrap=i < len(header) - 1)
    cell = None
    for row in rows:
        if cell not in (None, row[1]):
            table.add_section()
        cell = row[1]
        wrong = row[-1].startswith("WRONG")
        table.add_row(*(row[i] for i in shown), style="red" if wrong else "dim" if row[0] == "limit" else None)
    return table


def notes_of(document: dict[str, Any]) -> list[str]:
    from onekernel.bench.tables import notes

    return notes(document)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _power_sweep(arguments: argparse.Namespace, plan: Plan, meter: Meter | None) -> int:
    from onekernel.bench import document as documents
    from onekernel.bench.power import parse_range, sweep
    from onekernel.errors import BackendError

    if meter is None:
        raise BackendError("--power-sweep needs an NVIDIA GPU with NVML, and there is none that can be used here")
    found = sweep(meter, parse_range(arguments.power_sweep), lambda: _measure(plan, meter, None), _say)
    if arguments.output:
        documents.write(found, arguments.output)
    from onekernel.bench.power import describe

    print(describe(found))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from onekernel.bench import document as documents
    from onekernel.bench.report import page
    from onekernel.bench.tables import readme_tables, replace_tables
    from onekernel.errors import InvalidRequest

    if not arguments.files:
        raise InvalidRequest("report needs the files to report: onekernel bench report benchmarks/results/*.json")
    found = [(Path(name).name, documents.read(Path(name))) for name in arguments.files]
    if arguments.html:
        arguments.html.write_text(page(found), encoding="utf-8")
        _say(f"written: {arguments.html}")
    if arguments.readme:
        text = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(replace_tables(text, found), encoding="utf-8")
        _say(f"written: {arguments.readme}")
    if not arguments.html and not arguments.readme:
        print(readme_tables(found))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from onekernel.bench import document as documents
    from onekernel.bench.compare import compare, differences
    from onekernel.errors import InvalidRequest

    if len(arguments.files) != 2:
        raise InvalidRequest("compare needs two files: onekernel bench compare before.json after.json")
    first, second = (documents.read(Path(name)) for name in arguments.files)
    for line in differences(first, second):
        print(f"note: {line}")
    for row in compare(first, second, arguments.threshold / 100):
        print(row)
    return 0
