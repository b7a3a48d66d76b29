"""One run: the limit, the oracle, then engine after engine, each in a process of its own, into a growing document."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onekernel.bench import document as documents
from onekernel.bench import machine, workload
from onekernel.bench.ceiling import decode_bytes, decode_flops, prefill_flops
from onekernel.bench.gate import UNCHECKED, Agreement, judge
from onekernel.bench.oracle import Oracle, consult
from onekernel.bench.peers import OWN, Engine
from onekernel.bench.process import EngineFailed, EngineProcess, own_python
from onekernel.bench.protocol import Unavailable
from onekernel.bench.telemetry import Meter, Watch, idle_power, joules
from onekernel.bench.workload import COLD_START, DECODE, PREFILL, Cell
from onekernel.checkpoint.random_weights import fingerprint
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.errors import BackendError, InvalidRequest
from onekernel.text.tokenizer import Tokenizer

MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"
IDLE_S = 4.0  # seconds of the window of idle power
WARM_UPS = 2  # untimed passes of every cell: caches fill, clocks rise, compilers compile


@dataclass(frozen=True)
class Plan:
    """What to run. Checked by `run`.

    Attributes:
        checkpoint: its name, as the user gave it; `folder` is where it is.
        device: "cpu" or "cuda".
        energy_s: seconds of an energy window; 0 leaves energy out.
        gate_tokens: length of the sequence of the correctness gate; 0 leaves it out.
        warm_ups: untimed passes of every cell, at least 1.
        pythons: engine name -> interpreter to run its adapter with.
        logs: a folder for what each engine's processes write to stderr; None keeps nothing.
    """

    checkpoint: str
    folder: Path
    device: str
    cells: Sequence[Cell]
    engines: Sequence[Engine]
    repetitions: int = workload.LEAST_REPETITIONS
    energy_s: float = 10.0
    gate_tokens: int = workload.GATE_TOKENS
    warm_ups: int = WARM_UPS
    pythons: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    logs: Path | None = None


@dataclass
class Listener:
    """Hears of progress: `stage` gets one line, `updated` the document whenever it has grown."""

    stage: Callable[[str], None] = lambda line: None
    updated: Callable[[documents.Document], None] = lambda document: None


def run(plan: Plan, listener: Listener | None = None, meter: Meter | None = None) -> documents.Document:
    """Carry out a plan and return the document. An engine that cannot run or fails is recorded, and ends nothing.

    Args:
        meter: NVML's view of the GPU; None on the CPU (no energy then).

    Raises:
        InvalidRequest: the plan asks for something impossible.
        BackendError: the device cannot be used at all.
    """
    listener = listener or Listener()
    if plan.repetitions < workload.LEAST_REPETITIONS:
        raise InvalidRequest(
            f"repetitions = {plan.repetitions}: at least {workload.LEAST_REPETITIONS} are needed to know the noise"
        )
    if plan.warm_ups < 1:
        raise InvalidRequest(f"warm_ups = {plan.warm_ups}: the first pass of anything measures compilers and caches")
    shape = Shape.load(plan.folder)
    vocabulary = Tokenizer.load(plan.folder).size
    listener.stage("measuring the limit of this machine")
    limit = measure_limit(plan.device)
    found = begin(plan, shape, vocabulary, limit)
    listener.updated(found)
    oracle = None
    with ThreadPoolExecutor(1) as beside:  # the reference needs no GPU, and idle power nothing else
        if plan.gate_tokens:
            listener.stage(f"the float32 reference, over {plan.gate_tokens} tokens")
            start = time.perf_counter()
            tokens = workload.prompt(plan.gate_tokens, 0, vocabulary)
            reference = beside.submit(consult, load_weights(plan.folder, shape), shape, tokens)
        if meter is not None and plan.energy_s:
            listener.stage(f"idle power, over {IDLE_S:g} s")
            found["idle"] = idle_power(meter, IDLE_S)
        if plan.gate_tokens:
            oracle = reference.result()
            found["workload"]["oracle_s"] = time.perf_counter() - start
    for engine in plan.engines:
        entry = {"name": engine.name, "title": engine.name, "status": MEASURED, "measurements": []}
        found["engines"].append(entry)
        try:
            _Session(plan, engine, shape, vocabulary, oracle, meter, listener, found, entry).measure()
        except Unavailable as reason:
            entry |= {"status": SKIPPED, "reason": str(reason)}
        except EngineFailed as error:
            entry |= {"status": FAILED, "reason": str(error)}
        listener.updated(found)
    return found


def measure_limit(device: str) -> dict[str, Any]:
    """The machine's limit, by a process of its own: it leaves nothing behind on the GPU.

    Raises:
        BackendError: the device cannot be used; the message says why.
    """
    command = [*own_python("onekernel.bench.limit"), device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT, timeout=600)
    if done.returncode:
        raise BackendError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the probe failed")
    limit: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return limit


def begin(plan: Plan, shape: Shape, vocabulary: int, limit: Mapping[str, Any]) -> documents.Document:
    """A document with everything but results."""
    config = json.loads((plan.folder / "config.json").read_text(encoding="utf-8"))
    return {
        "format": documents.FORMAT,
        "version": documents.VERSION,
        "created": machine.now(),
        "command": list(plan.command),
        "commit": machine.commit(),
        "machine": {**machine.system(), "device": plan.device},
        "checkpoint": {
            "name": plan.checkpoint,
            "fingerprint": fingerprint(plan.folder),
            "config": config,
            "decode_bytes": dataclasses.asdict(decode_bytes(shape, 520)),
            "decode_flops": decode_flops(shape, 520),
            "prefill_flops": prefill_flops(shape, 520),
        },
        "workload": {
            "repetitions": plan.repetitions,
            "warm_ups": plan.warm_ups,
            "energy_s": plan.energy_s,
            "gate_tokens": plan.gate_tokens,
            "vocabulary": vocabulary,
            "prompts_sha256": workload.digest(vocabulary),
        },
        "limit": dict(limit),
        "engines": [],
    }


@dataclass
class _Session:
    """One engine in one run."""

    plan: Plan
    engine: Engine
    shape: Shape
    vocabulary: int
    oracle: Oracle | None
    meter: Meter | None
    listener: Listener
    document: documents.Document
    entry: dict[str, Any]

    def measure(self) -> None:
        if self.engine.missing:
            raise Unavailable(self.engine.missing)
        cells = [cell for cell in self.plan.cells if cell.kind != COLD_START and self._possible(cell)]
        longest = max([cell.positions for cell in cells] + [self.plan.gate_tokens, 1024])
        self.options = {
            "device": self.plan.device,
            "max_context": min(longest, self.shape.max_context),
            **self.engine.options,
        }
        if cells:
            self._stage("starting")
            with self._start() as process:
                loaded = process.ask("load", folder=str(self.plan.folder), options=self.options)
                self.entry |= {**loaded["facts"], "ready_s": process.ready_s, "load_s": loaded["wall_s"]}
                self.entry["agreement"] = self._judge(process).document()
                self.listener.updated(self.document)
                for cell in cells:
                    if cell.kind in self.entry.get("kinds", (PREFILL, DECODE)):
                        self._measure(process, cell)
        for cell in self.plan.cells:
            if cell.kind == COLD_START and COLD_START in self.entry.get("kinds", (COLD_START,)):
                self._cold_starts(cell)

    def _start(self, environment: Mapping[str, str] | None = None) -> EngineProcess:
        command = self.engine.command(self.plan.pythons.get(self.engine.name))
        log = None if self.plan.logs is None else self.plan.logs / f"{self.engine.name}.log"
        return EngineProcess(command, environment=environment, log=log)

    def _stage(self, what: str) -> None:
        self.listener.stage(f"{self.engine.name}: {what}")

    def _possible(self, cell: Cell) -> bool:
        if cell.positions <= self.shape.max_context:
            return True
        reason = f"the model's context holds {self.shape.max_context} tokens"
        self.entry["measurements"].append(_measurement(cell, problem=reason))
        return False

    def _judge(self, process: EngineProcess) -> Agreement:
        if self.oracle is None:
            return Agreement(UNCHECKED, reason="the gate was left out")
        self._stage("agreement with the reference")
        try:
            answer = process.logits(self.oracle.tokens)
        except Unavailable as reason:
            return Agreement(UNCHECKED, reason=str(reason))
        return judge(self.oracle, answer, self.vocabulary, self.entry.get("weights", "bf16"))

    def _measure(self, process: EngineProcess, cell: Cell) -> None:
        measurement = _measurement(cell)
        self.entry["measurements"].append(measurement)
        try:
            made: list[Any] = []  # the tokens of every pass
            with Watch(self.meter) as watch:
                for i in range(-self.plan.warm_ups, self.plan.repetitions):
                    self._stage(f"{cell.name}, {'warming up' if i < 0 else f'{i + 1} of {self.plan.repetitions}'}")
                    sample = self._sample(process, cell, i + self.plan.warm_ups)
                    made.append(sample.pop("tokens"))
                    if i >= 0:
                        measurement["samples"].append(sample)
                        self.listener.updated(self.document)
            measurement["telemetry"] = watch.summary()
            # The same prompt again: does it give the same tokens? An energy window begins with the first pass's prompt.
            if cell.energy and self.meter is not None and self.plan.energy_s:
                self._stage(f"{cell.name}, energy over {self.plan.energy_s:g} s")
                measurement["energy"] = self._energy(process, cell, self.meter)
                before, again = made[0], measurement["energy"].pop("tokens", None)
            else:
                before = made[-1]
                again = process.ask("decode", count=cell.count)["tokens"] if before is not None else None
            if before is not None:
                measurement["repeatable"] = again == before
        except Unavailable as reason:
            measurement["problem"] = str(reason)
        except EngineFailed as error:
            measurement["problem"] = str(error)
            if not process.alive:
                raise
        self.listener.updated(self.document)

    def _sample(self, process: EngineProcess, cell: Cell, variant: int) -> dict[str, Any]:
        tokens = workload.prompt(cell.context if cell.kind == PREFILL else cell.context + 1, variant, self.vocabulary)
        if cell.kind == PREFILL:
            answer = process.ask("prefill", tokens=tokens)
            expected = cell.context
        else:
            if cell.context <= 2048 or variant == 0:  # a long prompt is consumed once, not once a repetition
                process.ask("prepare", tokens=tokens)
            answer = process.ask("decode", count=cell.count)
            expected = cell.count
        if answer["count"] != expected:
            raise EngineFailed(f"{cell.name}: it made {answer['count']} tokens instead of {expected}")
        return {name: answer.get(name) for name in ("wall_s", "device_s", "tokens")}

    def _energy(self, process: EngineProcess, cell: Cell, meter: Meter) -> dict[str, Any]:
        tokens = workload.prompt(cell.context if cell.kind == PREFILL else cell.context + 1, 0, self.vocabulary)
        if cell.kind == DECODE:
            process.ask("prepare", tokens=tokens)
        with Watch(meter) as watch:
            found = joules(
                meter,
                lambda: process.ask(
                    "steady", kind=cell.kind, tokens=tokens, count=cell.count, seconds=self.plan.energy_s
                ),
            )
        return {**found, "telemetry": watch.summary()}

    def _cold_starts(self, cell: Cell) -> None:
        """New processes; with an empty cache of kernels as well, where kernels are compiled."""
        caches = ["warm"]
        if self.engine.name == OWN and self.plan.device == "cuda":
            caches.append("empty")
        for cache in caches:
            measurement = {**_measurement(cell), "kernel_cache": cache}
            self.entry["measurements"].append(measurement)
            for i in range(-1, self.plan.repetitions):  # the first start fills the file cache, and the kernel cache
                self._stage(f"{cell.name} ({cache} kernel cache), start {i + 2} of {self.plan.repetitions + 1}")
                with tempfile.TemporaryDirectory() as folder:
                    sample = self._cold_start(cell, {"ONEKERNEL_CACHE": folder} if cache == "empty" else None)
                if i >= 0:
                    measurement["samples"].append(sample)
                    self.listener.updated(self.document)

    def _cold_start(self, cell: Cell, environment: Mapping[str, str] | None) -> dict[str, Any]:
        start = time.perf_counter()
        with self._start(environment) as process:
            loaded = process.ask("load", folder=str(self.plan.folder), options=self.options)
            tokens = workload.prompt(cell.context, 0, self.vocabulary)
            first = process.ask("prefill", tokens=tokens)
            total = time.perf_counter() - start
            again = process.ask("prefill", tokens=workload.prompt(cell.context, 1, self.vocabulary))
            if "versions" not in self.entry:
                self.entry |= loaded["facts"]
        return {
            "wall_s": total,
            "start_s": process.ready_s,
            "load_s": loaded["wall_s"],
            "first_s": first["wall_s"],
            "again_s": again["wall_s"],
        }


def _measurement(cell: Cell, problem: str = "") -> dict[str, Any]:
    measurement: dict[str, Any] = {"kind": cell.kind, "context": cell.context, "count": cell.count, "samples": []}
    return {**measurement, "problem": problem} if problem else measurement
