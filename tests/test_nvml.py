"""NVML through ctypes, on a library made of Python functions: units, words, and errors that say what to do."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from onekernel.errors import BackendError
from onekernel.gpu.nvml import THROTTLING, Nvml

VALUES = {
    "nvmlDeviceGetTotalEnergyConsumption": 123_456_789,  # mJ
    "nvmlDeviceGetPowerUsage": 432_100,  # mW
    "nvmlDeviceGetPowerManagementLimit": 700_000,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x20,
    "nvmlDeviceGetTemperature": 41,
    "nvmlDeviceGetClockInfo": 1980,
}


class Describe:
    restype: Any = None

    def __call__(self, status: int) -> bytes:
        return b"made-up failure"


class FakeLibrary:
    """Functions of the C interface; each fills what the last argument points to."""

    def __init__(self, failures: dict[str, int] | None = None) -> None:
        self.failures = failures or {}
        self.set_to: list[int] = []
        self.bus_id = b""
        self.nvmlErrorString = Describe()

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            if status := self.failures.get(name, 0):
                return status
            if name == "nvmlDeviceGetHandleByPciBusId_v2":
                self.bus_id = arguments[0]
            elif name == "nvmlSystemGetDriverVersion":
                arguments[0].value = b"580.1"
            elif name == "nvmlDeviceSetPowerManagementLimit":
                self.set_to.append(arguments[1].value)
            elif name == "nvmlDeviceGetPowerManagementLimitConstraints":
                arguments[1]._obj.value, arguments[2]._obj.value = 200_000, 700_000
            elif name in VALUES:
                arguments[-1]._obj.value = VALUES[name]
            return 0

        return function


def test_values_have_the_units_that_they_promise() -> None:
    library = FakeLibrary()
    meter = Nvml("0000:1B:00.0", library)
    assert library.bus_id == b"0000:1B:00.0"
    assert meter.energy() == 123_456.789
    assert meter.power() == 432.1
    assert meter.power_limit() == 700
    assert meter.power_limits() == (200, 700)
    assert meter.clocks() == (1980, 1980)
    assert meter.temperature() == 41
    assert meter.driver() == "580.1"
    assert meter.reasons() == ["power cap", "thermal slowdown"]
    assert set(meter.reasons()) <= set(THROTTLING)


def test_a_power_limit_is_set_in_milliwatts() -> None:
    library = FakeLibrary()
    Nvml("0000:1B:00.0", library).set_power_limit(250.5)
    assert library.set_to == [250_500]


def test_energy_needs_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "nvmlDeviceGetTotalEnergyConsumption", 2**40)
    assert Nvml("0", FakeLibrary()).energy() == 2**40 / 1e3
    assert ctypes.sizeof(ctypes.c_ulonglong) == 8


def test_a_missing_right_says_so() -> None:
    meter = Nvml("0", FakeLibrary({"nvmlDeviceSetPowerManagementLimit": 4}))
    with pytest.raises(BackendError, match="run as root"):
        meter.set_power_limit(300)


def test_other_failures_carry_the_words_of_nvml() -> None:
    with pytest.raises(BackendError, match=r"nvmlDeviceGetHandleByPciBusId_v2 \(made-up failure\)"):
        Nvml("0", FakeLibrary({"nvmlDeviceGetHandleByPciBusId_v2": 6}))


def test_without_a_driver_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onekernel.gpu.nvml.LIBRARY", "libno-such-library.so")
    with pytest.raises(BackendError, match="no NVML on this machine"):
        Nvml("0")
