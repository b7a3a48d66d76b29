"""LaunchClock: sums the GPU's own time of launches, and waits for none of them while it runs. The driver is made up."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from onekernel.errors import BackendError
from onekernel.gpu.clock import MOST_PENDING, LaunchClock

if sys.platform == "darwin":
    pytest.skip("NVIDIA publishes no packages for macOS", allow_module_level=True)
from cuda.bindings import driver

SUCCESS = driver.CUresult.CUDA_SUCCESS


class Events:
    """Events that count seconds of a made-up GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits, self.destroyed = 0.0, 0, 0
        self.made: list[dict[str, float]] = []
        monkeypatch.setattr(driver, "cuEventCreate", self.create)
        monkeypatch.setattr(driver, "cuEventRecord", self.record)
        monkeypatch.setattr(driver, "cuEventSynchronize", self.synchronize)
        monkeypatch.setattr(driver, "cuEventElapsedTime", lambda a, b: (SUCCESS, 1e3 * (b["at"] - a["at"])))
        monkeypatch.setattr(driver, "cuEventDestroy", self.destroy)

    def create(self, _: int) -> tuple[Any, ...]:
        self.made.append({"at": -1.0})
        return SUCCESS, self.made[-1]

    def record(self, event: dict[str, float], stream: str) -> tuple[Any, ...]:
        assert stream == "the stream"
        event["at"] = self.now
        return (SUCCESS,)

    def synchronize(self, event: dict[str, float]) -> tuple[Any, ...]:
        self.waits += 1
        return (SUCCESS,)

    def destroy(self, _: dict[str, float]) -> tuple[Any, ...]:
        self.destroyed += 1
        return (SUCCESS,)

    def launch(self, clock: LaunchClock, seconds: float) -> None:
        clock.begin()
        self.now += seconds
        clock.end()
        self.now += 1  # of which nothing may count


def test_times_of_launches_are_added_and_pauses_are_not(monkeypatch) -> None:
    events = Events(monkeypatch)
    clock = LaunchClock("the stream")
    assert clock.seconds == 0
    for i in range(3):
        events.launch(clock, 0.5 + i)
    assert events.waits == 0
    assert clock.seconds == pytest.approx(4.5)
    events.launch(clock, 0.25)
    assert clock.seconds == pytest.approx(4.75)
    assert clock.launches == 4


def test_events_are_used_again_however_long_nobody_asks(monkeypatch) -> None:
    events = Events(monkeypatch)
    clock = LaunchClock("the stream")
    for _ in range(100):
        events.launch(clock, 0.125)
    assert len(events.made) <= 2 * (MOST_PENDING + 1)
    assert clock.seconds == pytest.approx(12.5)
    clock.close()
    assert events.destroyed == len(events.made)


def test_a_launch_that_failed_is_told_and_not_counted(monkeypatch) -> None:
    events = Events(monkeypatch)
    clock = LaunchClock("the stream")
    events.launch(clock, 1)
    monkeypatch.setattr(driver, "cuEventSynchronize", lambda _: (driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,))
    monkeypatch.setattr(driver, "cuGetErrorName", lambda status: (SUCCESS, status.name.encode()))
    monkeypatch.setattr(driver, "cuGetErrorString", lambda _: (SUCCESS, b"what it means"))
    with pytest.raises(BackendError, match="LAUNCH_FAILED"):
        _ = clock.seconds
