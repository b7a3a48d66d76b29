"""What the driver's management library (NVML) says of one GPU: energy, power, clocks, and what holds the clocks back.

Called through ctypes: the library comes with the driver and its C functions have not changed for years, while NVIDIA's
Python package has them only from 13.1 on, and we run with 13.0 too.
Functions: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from onekernel.errors import BackendError

LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
SM_CLOCK, MEMORY_CLOCK = 1, 2  # nvmlClockType_t
GPU_TEMPERATURE = 0  # nvmlTemperatureSensors_t
NO_PERMISSION = 4  # nvmlReturn_t

# Bits of nvmlDeviceGetCurrentClocksEventReasons. Those of THROTTLING mean that the clock is lower than it could be for
# a reason outside of the program.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
THROTTLING = ("power cap", "hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "hardware power brake")


class Nvml:
    """One GPU, found by its PCI bus id (which, unlike an index, means the same GPU to CUDA)."""

    def __init__(self, bus_id: str, library: Any = None) -> None:
        """Args:
            bus_id: such as "0000:1B:00.0".
            library: stands for the loaded library in tests.

        Raises:
            BackendError: there is no NVML, or it does not know this GPU.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY) if library is None else library
        except OSError:
            raise BackendError("there is no NVML on this machine: it comes with the NVIDIA driver") from None
        self._check("nvmlInit_v2")
        self._handle = ctypes.c_void_p()
        self._check("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self._handle))

    def driver(self) -> str:
        """The driver's version, such as "580.65.06"."""
        text = ctypes.create_string_buffer(80)
        self._check("nvmlSystemGetDriverVersion", text, len(text))
        return text.value.decode()

    def energy(self) -> float:
        """Joules since the driver was loaded; counted by the board. Raises BackendError on a GPU without a counter."""
        return self._value("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong) / 1e3

    def power(self) -> float:
        """Watts, averaged by the board over about a second."""
        return self._value("nvmlDeviceGetPowerUsage") / 1e3

    def power_limit(self) -> float:
        """Watts that the GPU may take now."""
        return self._value("nvmlDeviceGetPowerManagementLimit") / 1e3

    def power_limits(self) -> tuple[float, float]:
        """The least and the most watts that the limit can be set to."""
        least, most = ctypes.c_uint(), ctypes.c_uint()
        function = "nvmlDeviceGetPowerManagementLimitConstraints"
        self._check(function, self._handle, ctypes.byref(least), ctypes.byref(most))
        return least.value / 1e3, most.value / 1e3

    def set_power_limit(self, watts: float) -> None:
        """For everybody who uses this GPU, until it is set again or the machine restarts.

        Raises:
            BackendError: this needs the right (root), or the GPU does not take it.
        """
        self._check("nvmlDeviceSetPowerManagementLimit", self._handle, ctypes.c_uint(round(watts * 1e3)))

    def clocks(self) -> tuple[int, int]:
        """MHz of the SMs and of the memory, now."""
        sm, memory = (self._value("nvmlDeviceGetClockInfo", kind) for kind in (SM_CLOCK, MEMORY_CLOCK))
        return sm, memory

    def reasons(self) -> list[str]:
        """What holds the clocks back now, in words."""
        bits = self._value("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return [word for bit, word in REASONS.items() if bits & bit]

    def temperature(self) -> int:
        """Degrees Celsius of the GPU."""
        return self._value("nvmlDeviceGetTemperature", GPU_TEMPERATURE)

    def _value(self, function: str, *arguments: int, kind: Any = ctypes.c_uint) -> int:
        """The number that a function about this GPU gives."""
        value = kind()
        self._check(function, self._handle, *arguments, ctypes.byref(value))
        return int(value.value)

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status == NO_PERMISSION:
            raise BackendError(f"{function} needs the right to it: run as root")
        if status:
            describe = self._library.nvmlErrorString
            describe.restype = ctypes.c_char_p
            raise BackendError(f"NVML refuses {function} ({describe(status).decode()})")
