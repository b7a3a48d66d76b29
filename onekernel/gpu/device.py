"""Find the GPU, and say in one sentence why there is none to use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from onekernel.cache import cache_folder
from onekernel.errors import BackendError
from onekernel.gpu.compile import ARCHITECTURES
from onekernel.gpu.driver import check, text_in

LEAST_DRIVER = 13000  # CUDA version a driver must support; driver 580 is the first of them
LEAST_CAPABILITY = (7, 5)  # Turing: the first with the tensor-core instructions used


@dataclass(frozen=True)
class Gpu:
    """One GPU, with its primary context current in the calling thread."""

    handle: Any
    context: Any
    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int  # bytes that one block may use
    memory: int  # bytes

    @property
    def arch(self) -> str:
        """What the compiler calls it."""
        return architecture(self.capability)

    def memory_free(self) -> int:
        """Bytes that can still be allocated."""
        from cuda.bindings import driver

        return int(check(driver.cuMemGetInfo())[0])

    def make_current(self) -> None:
        """Use this GPU from the calling thread."""
        from cuda.bindings import driver

        check(driver.cuCtxSetCurrent(self.context))


def architecture(capability: tuple[int, int]) -> str:
    """What the compiler calls a chip: sm_75 ... sm_90a, sm_100a, ... (`a`: with the chip's own instructions)."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def find_gpu(index: int = 0) -> Gpu:
    """The GPU with this index (CUDA_VISIBLE_DEVICES hides and reorders them).

    Raises:
        BackendError: there is none that can be used; one sentence says why.
    """
    try:
        # Imported here: the package must work where NVIDIA's packages cannot be installed.
        from cuda.bindings import driver
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise BackendError(f"NVIDIA's Python packages are not installed here ({error})") from None
    try:
        status = driver.cuInit(0)[0]
    except DynamicLibNotFoundError:
        raise BackendError("there is no NVIDIA driver on this machine") from None
    if status == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        raise BackendError("the NVIDIA driver finds no GPU (is one hidden by CUDA_VISIBLE_DEVICES?)")
    check((status,))
    supported = check(driver.cuDriverGetVersion())
    if supported < LEAST_DRIVER:
        raise BackendError(
            f"the NVIDIA driver supports CUDA {_version(supported)}, and onekernel needs {_version(LEAST_DRIVER)}: "
            "install driver 580 or newer"
        )
    count = check(driver.cuDeviceGetCount())
    if index >= count:
        raise BackendError(f"GPU {index} was asked for, but there are {count}")
    handle = check(driver.cuDeviceGet(index))
    kind = driver.CUdevice_attribute

    def attribute(which: Any) -> int:
        return int(check(driver.cuDeviceGetAttribute(which, handle)))

    capability = (
        attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        attribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    )
    name = text_in(check(driver.cuDeviceGetName(256, handle)))
    if capability < LEAST_CAPABILITY:
        raise BackendError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and onekernel needs 7.5 (Turing) or newer"
        )
    if architecture(capability) not in ARCHITECTURES:
        raise BackendError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, which this version of onekernel does not "
            f"know: it compiles for {', '.join(ARCHITECTURES)}"
        )
    context = check(driver.cuDevicePrimaryCtxRetain(handle))
    check(driver.cuCtxSetCurrent(context))
    return Gpu(
        handle=handle,
        context=context,
        name=name,
        capability=capability,
        sm_count=attribute(kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        shared_memory=attribute(kind.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        memory=int(check(driver.cuDeviceTotalMem(handle))),
    )


def describe() -> dict[str, Any]:
    """Facts for `onekernel doctor`; `problem` in their place if there is no GPU to use. Sizes in bytes."""
    try:
        nvrtc: str | None = version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        nvrtc = None
    compiler = {"nvrtc": nvrtc, "kernel_cache": str(cache_folder("kernels"))}
    try:
        gpu = find_gpu()
    except BackendError as error:
        return {"problem": str(error), **compiler}
    from cuda.bindings import driver

    return {
        "name": gpu.name,
        "compute_capability": f"{gpu.capability[0]}.{gpu.capability[1]} ({gpu.arch})",
        "sm_count": gpu.sm_count,
        "memory_total": gpu.memory,
        "memory_free": gpu.memory_free(),
        "driver_supports": f"CUDA {_version(check(driver.cuDriverGetVersion()))} (needed: {_version(LEAST_DRIVER)})",
        **compiler,
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
