"""The power sweep on a fake NVML: measured limits, the sweet spot, and the original limit again on every way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from onekernel.bench.power import Terminated, describe, parse_range, points, restored_limit, sweep
from onekernel.errors import BackendError, InvalidRequest

ROOT = Path(__file__).parent.parent
ORIGINAL = 700.0


class FakeMeter:
    """A GPU whose power limit can be set, and that writes every change down."""

    def __init__(self, fail_at: float | None = None, fail_restores: int = 0) -> None:
        self.limit = ORIGINAL
        self.set_to: list[float] = []
        self.fail_at = fail_at
        self.fail_restores = fail_restores

    def power_limit(self) -> float:
        return self.limit

    def power_limits(self) -> tuple[float, float]:
        return 100.0, 700.0

    def set_power_limit(self, watts: float) -> None:
        if watts == self.fail_at:
            raise BackendError("nvmlDeviceSetPowerManagementLimit needs the right to it: run as root")
        if watts == ORIGINAL and self.fail_restores:
            self.fail_restores -= 1
            raise BackendError("busy")
        self.set_to.append(watts)
        self.limit = watts

    def energy(self) -> float:
        return 0.0

    def power(self) -> float:
        return self.limit

    def clocks(self) -> tuple[int, int]:
        return 1980, 3201

    def reasons(self) -> list[str]:
        return ["power cap"]

    def temperature(self) -> int:
        return 40


def document(rate: float, joules_per_token: float) -> dict[str, Any]:
    measurement = {
        "kind": "decode",
        "context": 520,
        "count": 128,
        "samples": [{"wall_s": 128 / rate, "device_s": None}] * 5,
        "energy": {"joules": 1000 * joules_per_token, "count": 1000, "watts": 300.0},
    }
    engine = {"name": "onekernel", "title": "onekernel", "status": "measured", "measurements": [measurement]}
    return {
        "limit": {"device": {"name": "fake", "cache": None}},
        "checkpoint": {"config": _config()},
        "engines": [engine],
    }


def _config() -> dict[str, Any]:
    from onekernel.checkpoint.random_weights import config
    from onekernel.checkpoint.sizes import SIZES

    return config(SIZES["0.8b"])


@pytest.mark.parametrize(
    ("text", "watts"), [("150:350:100", [150, 250, 350]), ("200:200:25", [200]), ("100:130:25", [100, 125])]
)
def test_ranges(text: str, watts: list[float]) -> None:
    assert parse_range(text) == watts


@pytest.mark.parametrize(
    "text", ["150", "150:350", "350:150:25", "150:350:0", "a:b:c", "0:100:10", "1:1000:0.1", "1:2:nan"]
)
def test_impossible_ranges_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="power sweep"):
        parse_range(text)


def test_each_limit_is_measured_and_the_best_is_named() -> None:
    meter = FakeMeter()
    speeds = {200.0: (1500.0, 0.25), 300.0: (2000.0, 0.2), 400.0: (2100.0, 0.3)}
    found = sweep(meter, list(speeds), lambda: document(*speeds[meter.limit]), lambda line: None)
    assert meter.set_to == [200, 300, 400, ORIGINAL]
    assert points(found)["onekernel"] == [(200, 1500, 4), (300, 2000, 5), (400, 2100, pytest.approx(10 / 3))]
    assert describe(found) == "onekernel: best at 300 W: 5.00 tok/J at 2,000 tok/s, 95 % of the fastest step"


def test_an_exception_restores_the_limit() -> None:
    meter = FakeMeter()

    def fails() -> dict[str, Any]:
        assert meter.limit == 200
        raise RuntimeError("an engine broke")

    with pytest.raises(RuntimeError, match="broke"):
        sweep(meter, [200.0, 300.0], fails, lambda line: None)
    assert meter.limit == ORIGINAL


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_ends_the_sweep_restores_the_limit(error: type[BaseException]) -> None:
    meter = FakeMeter()

    def end() -> None:
        with restored_limit(meter, lambda line: None):
            meter.set_power_limit(150)
            raise error

    with pytest.raises(error):
        end()
    assert meter.limit == ORIGINAL


def test_signal_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with restored_limit(FakeMeter(), lambda line: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_without_the_right_nothing_is_changed() -> None:
    meter = FakeMeter(fail_at=200.0)
    with pytest.raises(BackendError, match="run as root"):
        sweep(meter, [200.0, 300.0], lambda: document(1, 1), lambda line: None)
    assert meter.set_to == []


def test_limits_outside_of_the_range_are_refused_before_anything_is_set() -> None:
    meter = FakeMeter()
    with pytest.raises(BackendError, match="from 100 to 700 W, not 50 W"):
        sweep(meter, [300.0, 50.0], lambda: document(1, 1), lambda line: None)
    assert meter.set_to == []


def test_a_restore_that_fails_is_tried_again() -> None:
    meter = FakeMeter(fail_restores=2)
    with restored_limit(meter, lambda line: None):
        meter.set_power_limit(150)
    assert meter.limit == ORIGINAL


def test_a_restore_that_keeps_failing_says_how_to_mend_it() -> None:
    meter = FakeMeter(fail_restores=9)
    with pytest.raises(BackendError, match="nvidia-smi -pl 700"), restored_limit(meter, lambda line: None):
        meter.set_power_limit(150)


PROGRAM = """
    import sys, time
    sys.path[:0] = [{root!r}, {tests!r}]
    from test_bench_power import FakeMeter
    from onekernel.bench.power import sweep

    class Meter(FakeMeter):
        def set_power_limit(self, watts):
            super().set_power_limit(watts)
            print(f"set {{watts:g}}", flush=True)

    def measure():
        print("measuring", flush=True)
        time.sleep(60)

    sweep(Meter(), [200.0, 300.0], measure, lambda line: None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_restores_the_limit_before_the_process_ends(number: signal.Signals) -> None:
    program = textwrap.dedent(PROGRAM).format(root=str(ROOT), tests=str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["set 200", "measuring"]
    process.send_signal(number)
    for _ in range(5):  # an impatient user
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.split("\n")[0] == "set 700"
    assert process.returncode != 0


def test_the_exception_of_a_signal_is_no_ordinary_exception() -> None:
    """An engine's `except Exception` must not swallow it."""
    assert not issubclass(Terminated, Exception)
