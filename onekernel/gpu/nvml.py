"""What the driver's management library (NVML) says of one GPU: energy, power, clocks, and what holds the clocks back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onekernel.errors import BackendError

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

    def __init__(self, bus_id: str) -> None:
        """Args:
            bus_id: such as "0000:1B:00.0".

        Raises:
            BackendError: there is no NVML, or it does not know this GPU.
        """
        try:
            from cuda.bindings import nvml
            from cuda.pathfinder import DynamicLibNotFoundError
        except ImportError as error:
            raise BackendError(f"NVIDIA's Python packages are not installed here ({error})") from None
        self._nvml: Any = nvml
        try:
            nvml.init_v2()
        except DynamicLibNotFoundError:
            raise BackendError("there is no NVML on this machine: it comes with the NVIDIA driver") from None
        except nvml.NvmlError as error:
            raise BackendError(f"NVML does not start ({error})") from None
        self._handle = self._call(nvml.device_get_handle_by_pci_bus_id_v2, bus_id, whole=True)
        self.bus_id = bus_id

    def driver(self) -> str:
        """The driver's version, such as "580.65.06"."""
        return str(self._call(self._nvml.system_get_driver_version, whole=True))

    def energy(self) -> float:
        """Joules since the driver was loaded; counted by the board. Raises BackendError on a GPU without a counter."""
        return float(self._call(self._nvml.device_get_total_energy_consumption)) / 1e3

    def power(self) -> float:
        """Watts, averaged by the board over about a second."""
        return float(self._call(self._nvml.device_get_power_usage)) / 1e3

    def power_limit(self) -> float:
        """Watts that the GPU may take now."""
        return float(self._call(self._nvml.device_get_power_management_limit)) / 1e3

    def power_limits(self) -> tuple[float, float]:
        """The least and the most watts that the limit can be set to."""
        least, most = self._call(self._nvml.device_get_power_management_limit_constraints)
        return least / 1e3, most / 1e3

    def set_power_limit(self, watts: float) -> None:
        """For everybody who uses this GPU, until it is set again or the machine restarts.

        Raises:
            BackendError: this needs the right (root), or the GPU does not take it.
        """
        scope = self._nvml.PowerScope.GPU
        self._call(self._nvml.device_set_power_management_limit_v2, int(scope), round(watts * 1e3))

    def clocks(self) -> tuple[int, int]:
        """MHz of the SMs and of the memory, now."""
        kinds = self._nvml.ClockType
        get = self._nvml.device_get_clock_info
        return int(self._call(get, int(kinds.SM))), int(self._call(get, int(kinds.MEM)))

    def reasons(self) -> list[str]:
        """What holds the clocks back now, in words."""
        bits = int(self._call(self._nvml.device_get_current_clocks_event_reasons))
        return [word for bit, word in REASONS.items() if bits & bit]

    def temperature(self) -> int:
        """Degrees Celsius of the GPU."""
        return int(self._call(self._nvml.device_get_temperature_v, 0))

    def _call(self, function: Callable[..., Any], *arguments: Any, whole: bool = False) -> Any:
        """One call; `whole`: not about this GPU."""
        try:
            return function(*arguments) if whole else function(self._handle, *arguments)
        except self._nvml.NvmlError as error:
            raise BackendError(f"NVML refuses {function.__name__} ({error})") from None
