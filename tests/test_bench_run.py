"""A run of the harness: engines that work, lie, crash, hang or are missing, each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from onekernel.bench import document as documents
from onekernel.bench import gate, workload
from onekernel.bench import run as harness
from onekernel.bench.limit import measure
from onekernel.bench.peers import ENGINES, Engine, choose_engines
from onekernel.bench.process import EngineFailed, EngineProcess
from onekernel.bench.protocol import Decoded, Unavailable, Worker
from onekernel.bench.run import Listener, Plan, run
from onekernel.bench.telemetry import Watch, idle_power, joules
from onekernel.bench.workload import COLD_START, DECODE, PREFILL, SUITES, Cell, cells_of, prompt
from onekernel.checkpoint.hub import demo_folder
from onekernel.cli import main
from onekernel.errors import InvalidRequest

LIMIT = {
    "device": {"name": "made up", "cache": None},
    "read_bandwidth": {"value": 1e10, "samples": [1e10], "kernel": "none"},
    "matrix_throughput": {"value": 1e11, "samples": [1e11], "kernel": "none"},
}
CELLS = (Cell(PREFILL, 20), Cell(DECODE, 20, 8))

# An engine that misbehaves as told. `{behaviour}` is its name.
ENGINE = """
    import os, sys, time
    from onekernel.bench.own import OwnEngine
    from onekernel.bench.protocol import Decoded, Unavailable, serve

    class Engine(OwnEngine):
        def load(self, folder, options):
            print("a library says something on stdout")
            if "{behaviour}" == "absent":
                raise Unavailable("it is not installed")
            if "{behaviour}" == "crashes at load":
                os._exit(3)
            return {{**super().load(folder, {{**options, "device": "cpu"}}), "title": "{behaviour}"}}

        def decode(self, count):
            if "{behaviour}" == "crashes":
                print("Segmentation fault (made up)", file=sys.stderr, flush=True)
                os._exit(139)
            if "{behaviour}" == "raises":
                raise ValueError("out of memory (made up)")
            made = super().decode(count)
            if "{behaviour}" == "counts one too many":
                return Decoded(made.tokens + [0], wall_s=made.wall_s)
            if "{behaviour}" == "forgets":
                return Decoded([(t + os.urandom(1)[0]) % 3000 for t in made.tokens], wall_s=made.wall_s)
            return made

        def logits(self, tokens):
            logits = super().logits(tokens)
            if "{behaviour}" == "wrong":
                logits[:, 5] += 100
            return logits

    if __name__ == "__main__":
        serve(Engine())
"""


def engine(tmp_path: Path, behaviour: str) -> Engine:
    script = tmp_path / f"{behaviour.replace(' ', '_')}.py"
    script.write_text(textwrap.dedent(ENGINE).format(behaviour=behaviour), encoding="utf-8")
    return Engine(behaviour, str(script))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(harness, "measure_limit", lambda device: dict(LIMIT))
    return Plan("demo", demo_folder(), "cpu", CELLS, [ENGINES["onekernel"]], gate_tokens=70, energy_s=0)


def with_engines(plan: Plan, *engines: Engine) -> Plan:
    return Plan(plan.checkpoint, plan.folder, plan.device, plan.cells, engines, gate_tokens=70, energy_s=0)


def entries(found: documents.Document) -> dict[str, Any]:
    return {entry["name"]: entry for entry in found["engines"]}


def test_our_own_engine_gives_every_figure_and_agrees(plan: Plan) -> None:
    stages: list[str] = []
    found = run(plan, Listener(stage=stages.append))
    assert documents.check(json.loads(json.dumps(found))) == ""
    figures = documents.figures(found)
    assert [figure.cell.name for figure in figures] == ["pp20", "tg8@20"]
    for figure in figures:
        assert figure.seconds.count == workload.LEAST_REPETITIONS
        assert figure.agreement["verdict"] == gate.AGREES
        assert figure.rate is not None
        assert figure.rate.median > 1
    assert entries(found)["onekernel"]["measurements"][1]["repeatable"] is True
    assert "onekernel: tg8@20, 5 of 5" in stages


def test_each_misbehaving_engine_is_recorded_and_ends_nothing(plan: Plan, tmp_path: Path) -> None:
    behaviours = ("absent", "crashes at load", "crashes", "counts one too many", "raises", "wrong", "forgets")
    found = entries(run(with_engines(plan, *(engine(tmp_path, name) for name in behaviours), ENGINES["onekernel"])))
    assert (found["absent"]["status"], found["absent"]["reason"]) == ("skipped", "it is not installed")
    assert found["crashes at load"]["status"] == "failed"
    assert "code 3" in found["crashes at load"]["reason"]
    assert found["crashes"]["status"] == "failed"
    assert "Segmentation fault (made up)" in found["crashes"]["reason"]
    # What worked before stays; the failure is told at its place.
    assert len(found["crashes"]["measurements"][0]["samples"]) == 5
    assert "9 tokens instead of 8" in found["counts one too many"]["measurements"][1]["problem"]
    assert "out of memory (made up)" in found["raises"]["measurements"][1]["problem"]
    assert found["wrong"]["agreement"]["verdict"] == gate.WRONG
    assert found["forgets"]["measurements"][1]["repeatable"] is False
    assert found["onekernel"]["status"] == "measured"


def test_a_partly_measured_cell_is_no_figure(plan: Plan, tmp_path: Path) -> None:
    found = run(with_engines(plan, engine(tmp_path, "raises")))
    assert [figure.cell.kind for figure in documents.figures(found)] == [PREFILL]


def test_a_context_beyond_the_model_is_told_and_not_measured(plan: Plan) -> None:
    cells = (Cell(DECODE, 40_000, 8), Cell(DECODE, 20, 8))
    found = run(Plan("demo", plan.folder, "cpu", cells, plan.engines, gate_tokens=0, energy_s=0))
    measurements = entries(found)["onekernel"]["measurements"]
    assert "holds 32768 tokens" in measurements[0]["problem"]
    assert len(measurements[1]["samples"]) == 5
    assert entries(found)["onekernel"]["agreement"]["verdict"] == gate.UNCHECKED


def test_a_cold_start_shows_its_parts(plan: Plan) -> None:
    cells = (Cell(COLD_START, 16),)
    found = entries(run(Plan("demo", plan.folder, "cpu", cells, plan.engines, gate_tokens=0, energy_s=0)))
    (measurement,) = found["onekernel"]["measurements"]
    assert measurement["kernel_cache"] == "warm"
    for sample in measurement["samples"]:
        parts = sample["start_s"] + sample["load_s"] + sample["first_s"]
        assert 0.9 * sample["wall_s"] < parts <= sample["wall_s"]
        assert sample["again_s"] > 0


def test_fewer_repetitions_than_noise_needs_are_refused(plan: Plan) -> None:
    with pytest.raises(InvalidRequest, match="at least 5"):
        run(Plan("demo", plan.folder, "cpu", CELLS, plan.engines, repetitions=4))


def test_a_first_pass_is_never_counted(plan: Plan) -> None:
    with pytest.raises(InvalidRequest, match="warm_ups = 0"):
        run(Plan("demo", plan.folder, "cpu", CELLS, plan.engines, warm_ups=0))


def test_what_an_engine_writes_is_kept_if_asked_for(plan: Plan, tmp_path: Path) -> None:
    crashing = with_engines(plan, engine(tmp_path, "raises"))
    found = run(dataclasses.replace(crashing, warm_ups=1, logs=tmp_path))
    assert found["workload"]["warm_ups"] == 1
    text = (tmp_path / "raises.log").read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "ValueError: out of memory (made up)" in text


def test_an_engine_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('hello?', flush=True, file=__import__('sys').stderr)\ntime.sleep(600)\n")
    start = time.monotonic()
    with pytest.raises(EngineFailed, match=r"no answer within 2 s: hello\?"):
        EngineProcess([sys.executable, str(script)], timeout=2)
    assert time.monotonic() - start < 60


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    process = EngineProcess([sys.executable, *ENGINES["onekernel"].command()[1:]])
    pid = process._process.pid
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_prompts_are_the_same_everywhere_and_differ_between_repetitions() -> None:
    assert prompt(5, 0, 1000) == prompt(5, 0, 1000)
    assert prompt(5, 0, 1000) != prompt(5, 1, 1000)
    assert len(set(prompt(1000, 0, 100_000))) > 950  # no repeated token that would flatter a cache
    assert max(prompt(5000, 0, 50)) == 49


def test_suites_do_not_measure_a_cell_twice() -> None:
    cells = cells_of(["context", "standard"])
    assert len({cell.name for cell in cells}) == len(cells)
    assert next(cell for cell in cells if cell.name == "tg128@520").energy
    assert {cell.context for cell in SUITES["context"]} == {0, 520, 1904, 8192, 32_768, 131_072}
    with pytest.raises(InvalidRequest, match="suite = 'fast'"):
        cells_of(["fast"])


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(InvalidRequest, match="engine = 'tensorflow'"):
        choose_engines(["tensorflow"], {})


class Counting:
    """An adapter that makes `count` tokens in no time and counts its calls."""

    calls = 0

    def decode(self, count: int) -> Decoded:
        self.calls += 1
        return Decoded(count, wall_s=0.001)

    def prefill(self, tokens: list[int]) -> Decoded:
        raise Unavailable("decodes only")


def test_an_energy_window_counts_all_tokens_made_in_it() -> None:
    adapter = Counting()
    answer = Worker(adapter).handle({"do": "steady", "kind": DECODE, "tokens": [1], "count": 7, "seconds": 0.05})  # type: ignore[arg-type]
    assert answer["count"] == 7 * adapter.calls > 7
    assert answer["busy_s"] == pytest.approx(0.001 * adapter.calls)
    assert 0.05 <= answer["window_s"] < 5


class FakeMeter:
    """A GPU that takes 250 W, by a counter."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def energy(self) -> float:
        return 250 * (time.perf_counter() - self.start)

    def power(self) -> float:
        return 250.0

    def clocks(self) -> tuple[int, int]:
        return 1500, 3000

    def reasons(self) -> list[str]:
        return ["power cap"]

    def temperature(self) -> int:
        return 50

    def power_limit(self) -> float:
        return 700.0

    def power_limits(self) -> tuple[float, float]:
        return 100.0, 700.0

    def set_power_limit(self, watts: float) -> None:
        raise AssertionError("nobody may change the limit here")


def test_joules_are_those_of_the_window() -> None:
    found = joules(FakeMeter(), lambda: time.sleep(0.2) or {"count": 100})
    assert found["watts"] == pytest.approx(250, rel=0.01)
    assert found["joules"] == pytest.approx(250 * found["seconds"], rel=0.01)
    assert found["count"] == 100
    assert idle_power(FakeMeter(), 0.1, settled=0)["watts"] == pytest.approx(250, rel=0.01)


def test_the_watch_records_clocks_and_what_holds_them_back() -> None:
    with Watch(FakeMeter()) as watch:
        time.sleep(0.3)
    summary = watch.summary()
    assert summary["sm_mhz"] == {"median": 1500, "least": 1500, "most": 1500}
    assert summary["reasons"] == {"power cap": 1.0}
    assert summary["looks"] > 2


def test_energy_of_a_run_is_in_the_document(plan: Plan) -> None:
    cells = (Cell(DECODE, 20, 8, energy=True),)
    found = run(Plan("demo", plan.folder, "cpu", cells, plan.engines, gate_tokens=0, energy_s=0.3), meter=FakeMeter())
    (figure,) = documents.figures(found)
    assert figure.joules_per_token is not None
    assert figure.watts == pytest.approx(250, rel=0.02)
    energy = entries(found)["onekernel"]["measurements"][0]["energy"]
    assert energy["joules"] / energy["count"] == figure.joules_per_token
    assert figure.throttled == ("power cap",)
    assert found["idle"]["watts"] == pytest.approx(250, rel=0.02)


def test_the_limit_of_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onekernel.bench.limit.STREAM_BYTES", 1 << 26)
    monkeypatch.setattr("onekernel.bench.limit.MATRIX", 256)
    found = measure("cpu")
    assert found["read_bandwidth"]["value"] == max(found["read_bandwidth"]["samples"])
    assert 1e8 < found["read_bandwidth"]["value"] < 1e13
    assert 1e8 < found["matrix_throughput"]["value"] < 1e14


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    assert main(["bench", "--backend", "cuda", "--engines", "onekernel"]) == 1
    assert "no NVIDIA driver" in capsys.readouterr().err


def test_the_command_measures_and_writes(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "standard", CELLS)
    output = tmp_path / "result.json"
    command = [
        "bench",
        "--backend",
        "cpu",
        "--engines",
        "onekernel,vllm",
        "--gate-tokens",
        "70",
        "--output",
        str(output),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tg8@20" in printed
    assert "100.0 %" in printed
    assert "skipped" in printed
    assert documents.read(output)["engines"][0]["status"] == "measured"


def test_energy_can_be_left_to_some_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--energy-of", "decode,warmth", "--backend", "cpu"]) == 2
    assert "--energy-of 'warmth' is unknown: choose from prefill, decode" in capsys.readouterr().err
