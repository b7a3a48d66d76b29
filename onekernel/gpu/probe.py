"""Measure what a GPU can do at most: bytes read a second, and matrix FLOPs a second. Kernels: probe.cu."""

from __future__ import annotations

import ctypes
import time
from importlib.resources import files
from typing import Any

from onekernel.errors import BackendError
from onekernel.gpu.compile import compile_cached
from onekernel.gpu.device import Gpu, find_gpu
from onekernel.gpu.driver import check, text_in
from onekernel.gpu.memory import DeviceBuffer
from onekernel.gpu.nvml import Nvml

READ_BYTES = 4 << 30  # larger than any cache; less where the GPU has little memory
ITERATIONS = 1 << 14
REPETITIONS = 9
SETTLE = 0.5  # seconds of work before anything counts: clocks and power settle


def probe_source(arch: str) -> str:
    """The source for one architecture, such as sm_90a."""
    number = int(arch.removeprefix("sm_").rstrip("a")) * 10
    text = (files("onekernel") / "gpu" / "probe.cu").read_text(encoding="utf-8")
    return f'#define ARCH {number}\n#define ITERATIONS {ITERATIONS}\n#line 1 "probe.cu"\n{text}'


class Probe:
    """The probe kernels, loaded on one GPU. Use as a context manager."""

    def __init__(self, gpu: Gpu) -> None:
        from cuda.bindings import driver

        self.gpu = gpu
        self._module = check(driver.cuModuleLoadData(compile_cached(probe_source(gpu.arch), gpu.arch, "probe")))
        self._begin, self._end = (check(driver.cuEventCreate(0)) for _ in range(2))

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        from cuda.bindings import driver

        for event in (self._begin, self._end):
            driver.cuEventDestroy(event)
        driver.cuModuleUnload(self._module)

    def read_bandwidth(self) -> dict[str, Any]:
        """Bytes/s of reading once a buffer that no cache holds: the best of several kernels and grids.

        Returns "value", its "samples", the "kernel", and "bytes". What was read is checked.
        """
        nbytes = min(READ_BYTES, self.gpu.memory_free() // 4) // 64 * 64
        buffer, sink = DeviceBuffer(nbytes), DeviceBuffer(4)
        try:
            return self._read_bandwidth(buffer, sink, nbytes)
        finally:
            buffer.free()
            sink.free()

    def _read_bandwidth(self, buffer: DeviceBuffer, sink: DeviceBuffer, nbytes: int) -> dict[str, Any]:
        import numpy as np

        self._launch(
            "fill", 8 * self.gpu.sm_count, 512, ctypes.c_void_p(buffer.address), ctypes.c_ulonglong(nbytes // 4)
        )
        best: tuple[float, str, tuple[str, int, int]] | None = None
        arguments = (ctypes.c_void_p(buffer.address), ctypes.c_ulonglong(nbytes // 16), ctypes.c_void_p(sink.address))
        sums = set()
        for name in ("read_4", "read_8", "read_16"):
            for blocks, threads in ((1, 1024), (2, 1024), (4, 512), (8, 256), (32, 256)):
                launch = (name, blocks * self.gpu.sm_count, threads)
                sink.clear()
                seconds = self._launch(*launch, *arguments)
                sums.add(int(sink.read(np.uint32, 1)[0]))
                seconds = min(seconds, self._launch(*launch, *arguments))
                if best is None or seconds < best[0]:
                    best = (seconds, f"{name}, {blocks} blocks of {threads} threads an SM", launch)
        assert best is not None
        if len(sums) != 1:
            raise BackendError("the read probe is wrong: its kernels disagree about what the memory holds; report this")
        self._settle(*best[2], *arguments)
        samples = [nbytes / self._launch(*best[2], *arguments) for _ in range(REPETITIONS)]
        return {"value": sorted(samples)[len(samples) // 2], "samples": samples, "kernel": best[1], "bytes": nbytes}

    def matrix_throughput(self) -> dict[str, Any]:
        """FLOP/s of the tensor cores with 16-bit operands and float32 sums, everything in registers or shared memory.

        Returns "value", its "samples" and the "kernel".
        """
        operands, sink = DeviceBuffer(4 << 16), DeviceBuffer(4 << 22)
        try:
            fill = (ctypes.c_void_p(operands.address), ctypes.c_ulonglong(1 << 16))
            self._launch("fill", self.gpu.sm_count, 256, *fill)
            arguments = (ctypes.c_void_p(operands.address), ctypes.c_void_p(sink.address))
            depth = 16 if self.gpu.capability >= (8, 0) else 8
            choices = [("multiply", 4 * self.gpu.sm_count, 256, 8 * 4 * 2 * 16 * 8 * depth, "mma.sync, from registers")]
            if self.gpu.capability == (9, 0):
                flops = 2 * 2 * 64 * 256 * 16
                choices.append(("multiply_group", self.gpu.sm_count, 256, flops, "wgmma, from shared memory"))
            found: list[dict[str, Any]] = []
            for name, blocks, threads, flops_per_block, title in choices:
                self._settle(name, blocks, threads, *arguments)
                total = flops_per_block * blocks * ITERATIONS
                samples = [total / self._launch(name, blocks, threads, *arguments) for _ in range(REPETITIONS)]
                found.append({"value": sorted(samples)[len(samples) // 2], "samples": samples, "kernel": title})
            return max(found, key=lambda one: float(one["value"]))
        finally:
            operands.free()
            sink.free()

    def _settle(self, *launch: Any) -> None:
        end = time.monotonic() + SETTLE
        while time.monotonic() < end:
            self._launch(*launch)

    def _launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> float:
        """Seconds of one launch, by events on its stream."""
        from cuda.bindings import driver

        function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        check(driver.cuEventRecord(self._begin, 0))
        check(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, 0, ctypes.addressof(pointers), 0))
        check(driver.cuEventRecord(self._end, 0))
        check(driver.cuEventSynchronize(self._end))
        return float(check(driver.cuEventElapsedTime(self._begin, self._end))) / 1e3


def bus_id() -> str:
    """The PCI bus id of the first GPU, such as "0000:1B:00.0", by which NVML finds the same one.

    Makes no context: this process would take memory on the GPU, and keep it from idling.

    Raises:
        BackendError: there is no driver, or no GPU.
    """
    try:
        from cuda.bindings import driver
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise BackendError(f"NVIDIA's Python packages are not installed here ({error})") from None
    try:
        check(driver.cuInit(0))
    except DynamicLibNotFoundError:
        raise BackendError("there is no NVIDIA driver on this machine") from None
    return text_in(check(driver.cuDeviceGetPCIBusId(32, check(driver.cuDeviceGet(0)))))


def identify() -> dict[str, Any]:
    """The GPU as a document records it: name, architecture, SMs, memory and L2 cache in bytes, CUDA, driver, watts."""
    from cuda.bindings import driver

    gpu = find_gpu()
    kind = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
    supported = int(check(driver.cuDriverGetVersion()))
    return {
        "name": gpu.name,
        "arch": gpu.arch,
        "sm_count": gpu.sm_count,
        "memory": gpu.memory,
        "cache": int(check(driver.cuDeviceGetAttribute(kind, gpu.handle))),
        "cuda": f"{supported // 1000}.{supported % 1000 // 10}",
        **_managed(),
    }


def _managed() -> dict[str, Any]:
    """What only the management library knows: the driver's version and the power limit; nothing where it is missing."""
    try:
        meter = Nvml(bus_id())
        return {"driver": meter.driver(), "power_limit_w": meter.power_limit()}
    except BackendError:
        return {"driver": None, "power_limit_w": None}
