"""The JSON document of one run: reading, checking, and every figure that is derived from its raw samples.

Nothing derived is stored, so nothing can go stale: medians, shares and joules per token are computed here, from the
samples, whenever they are shown. The fields are described in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onekernel.bench import ceiling, gate
from onekernel.bench.statistics import Summary, median, summarise
from onekernel.bench.workload import COLD_START, DECODE, PREFILL, Cell
from onekernel.checkpoint.shape import Shape
from onekernel.errors import CheckpointError, InvalidRequest

FORMAT, VERSION = "onekernel-bench", 1
PARTS = ("start", "load", "first", "again")  # of a cold start

Document = dict[str, Any]

# Field -> type, for the parts of a document. Nested parts are checked by `check`.
TOP: dict[str, Any] = {
    "format": str,
    "version": int,
    "created": str,
    "command": list,
    "commit": dict,
    "machine": dict,
    "checkpoint": dict,
    "workload": dict,
    "limit": dict,
    "engines": list,
}
ENGINE: dict[str, Any] = {"name": str, "title": str, "status": str, "measurements": list}
MEASUREMENT: dict[str, Any] = {"kind": str, "context": int, "count": int, "samples": list}


@dataclass(frozen=True)
class Figure:
    """One cell of one engine, as tables and charts show it."""

    engine: str
    title: str
    cell: Cell
    rate: Summary | None  # tokens/s by wall time (COLD_START: None)
    device_rate: Summary | None  # tokens/s by the GPU's clock
    seconds: Summary  # of one sample, wall time
    samples: tuple[float, ...]  # the same, raw
    parts: Mapping[str, float]  # of COLD_START: medians of its parts, seconds
    kernel_cache: str  # of COLD_START: "warm" or "empty"
    limit: float | None  # tokens/s that the checkpoint's bytes and FLOPs allow; None if it fits into a cache
    joules_per_token: float | None
    watts: float | None
    agreement: Mapping[str, Any]
    throttled: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the cell, and of the state of the kernel cache where that matters."""
        return f"{self.cell.name}{', compiling' if self.kernel_cache == 'empty' else ''}"

    @property
    def rates(self) -> list[float]:
        """Tokens/s of every sample (COLD_START: its seconds)."""
        tokens = self.cell.context if self.cell.kind == PREFILL else self.cell.count
        return list(self.samples) if self.cell.kind == COLD_START else [tokens / value for value in self.samples]

    @property
    def share(self) -> float | None:
        """Of the limit, by wall time."""
        return None if self.rate is None or not self.limit else self.rate.median / self.limit

    @property
    def believable(self) -> bool:
        """Whether its text agreed with the reference: only then its speed means anything."""
        return self.agreement.get("verdict") in (gate.AGREES, gate.QUANTISED)


def write(document: Document, path: Path) -> None:
    """Atomically: a run that is cut short leaves the last whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> Document:
    """Raises InvalidRequest: there is no such file, or it is not such a document; the message names the field."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequest(f"{path} does not exist: give a file that `onekernel bench` has written") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as JSON ({error})") from None
    problem = check(document)
    if problem:
        raise InvalidRequest(f"{path} is not a result of `onekernel bench`: {problem}")
    checked: Document = document
    return checked


def check(document: Any) -> str:
    """What is wrong with a document, or nothing."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"its format is not {FORMAT!r}"
    if document.get("version") != VERSION:
        return f"version {document.get('version')!r} is unknown (this program writes {VERSION})"
    if problem := _fields("", document, TOP):
        return problem
    try:
        Shape.from_config(document["checkpoint"].get("config", {}))
    except CheckpointError as error:
        return f"checkpoint.config: {error}"
    for i, engine in enumerate(document["engines"]):
        if problem := _fields(f"engines[{i}].", engine, ENGINE):
            return problem
        for j, measurement in enumerate(engine["measurements"]):
            place = f"engines[{i}].measurements[{j}]."
            if problem := _fields(place, measurement, MEASUREMENT):
                return problem
            if measurement["kind"] not in (PREFILL, DECODE, COLD_START):
                return f"{place}kind = {measurement['kind']!r} is unknown"
            for k, sample in enumerate(measurement["samples"]):
                if not isinstance(sample.get("wall_s"), float) or sample["wall_s"] <= 0:
                    return f"{place}samples[{k}].wall_s = {sample.get('wall_s')!r} is not a time in seconds"
    return ""


def _fields(place: str, part: Any, fields: Mapping[str, Any]) -> str:
    if not isinstance(part, dict):
        return f"{place.rstrip('.')} is not an object"
    for name, kind in fields.items():
        if not isinstance(part.get(name), kind):
            return f"{place}{name} is missing or not of type {kind.__name__}"
    return ""


def shape_of(document: Document) -> Shape:
    return Shape.from_config(document["checkpoint"]["config"])


def limit_of(document: Document, cell: Cell, weight_bytes: float = 2) -> float | None:
    """Tokens/s that the bytes and FLOPs of the checkpoint (bf16) allow on the measured machine."""
    shape, limit = shape_of(document), document["limit"]
    if "read_bandwidth" not in limit:
        return None
    bandwidth, throughput = limit["read_bandwidth"]["value"], limit["matrix_throughput"]["value"]
    if cell.kind == DECODE:
        middle = cell.context + cell.count // 2  # the context grows while the sample runs
        return ceiling.decode_ceiling(shape, middle, bandwidth, throughput, weight_bytes)
    if cell.kind == PREFILL:
        return ceiling.prefill_ceiling(shape, cell.context, bandwidth, throughput, weight_bytes)
    return None


def fits_in_cache(document: Document) -> bool:
    """Whether the weights may stay in the last-level cache: then memory bandwidth is no limit for decoding."""
    cache = document["limit"].get("device", {}).get("cache")
    return bool(cache) and ceiling.decode_bytes(shape_of(document), 0).weights < 2 * cache


def load_average(document: Document) -> float | None:
    """The highest load average during a measurement on the CPU, if it says that other programs ran at the same time.

    The harness itself keeps at most every core busy; half a core more is taken for chance.
    """
    loads = [
        (measurement.get("telemetry") or {}).get("load_average") or 0.0
        for engine in document["engines"]
        for measurement in engine["measurements"]
    ]
    most = max(loads, default=0.0)
    return most if most > (document["machine"].get("cpu_count") or 1) + 0.5 else None


def figures(document: Document) -> list[Figure]:
    """All cells of all engines that gave samples, in the order of the document."""
    found = []
    for engine in document["engines"]:
        for measurement in engine["measurements"]:
            if measurement["samples"] and not measurement.get("problem"):
                found.append(_figure(document, engine, measurement))
    return found


def _figure(document: Document, engine: Mapping[str, Any], measurement: Mapping[str, Any]) -> Figure:
    cell = Cell(measurement["kind"], measurement["context"], measurement["count"])
    samples = measurement["samples"]
    tokens = cell.context if cell.kind == PREFILL else cell.count
    device = [sample.get("device_s") for sample in samples]
    energy = measurement.get("energy") or {}
    reasons = (measurement.get("telemetry") or {}).get("reasons", {})
    return Figure(
        engine=engine["name"],
        title=engine["title"],
        cell=cell,
        rate=None if cell.kind == COLD_START else summarise([tokens / sample["wall_s"] for sample in samples]),
        device_rate=summarise([tokens / seconds for seconds in device if seconds]) if all(device) else None,
        seconds=summarise([sample["wall_s"] for sample in samples]),
        samples=tuple(sample["wall_s"] for sample in samples),
        parts={
            part: median([sample[f"{part}_s"] for sample in samples]) for part in PARTS if f"{part}_s" in samples[0]
        },
        kernel_cache=measurement.get("kernel_cache", ""),
        limit=None if fits_in_cache(document) else limit_of(document, cell),
        joules_per_token=energy["joules"] / energy["count"] if energy.get("count") else None,
        watts=energy.get("watts"),
        agreement=engine.get("agreement") or {"verdict": gate.UNCHECKED},
        throttled=tuple(word for word in reasons if word not in ("idle", "application clocks")),
    )
