"""The CUDA driver, called through NVIDIA's bindings: every call is checked, every failure is a BackendError."""

from __future__ import annotations

from typing import Any

from onekernel.errors import BackendError, NotEnoughMemory

# After these the CUDA context refuses every call, and a process cannot make itself a sound one.
LOST = "; this process cannot use the GPU any more: start it again, and report this"


def check(result: tuple[Any, ...]) -> Any:
    """The values of a driver call: none, one, or a tuple of them.

    Raises:
        NotEnoughMemory: the GPU's memory is used up.
        BackendError: any other failure, with the driver's own words.
    """
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        _, text = driver.cuGetErrorString(status)
        message = f"{_text(name)}: {_text(text)}"
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise NotEnoughMemory(f"the GPU has no memory left ({message}): close other programs that use it")
        if status in _lasting():
            raise BackendError(f"the GPU failed ({message}){LOST}")
        raise BackendError(f"the GPU failed ({message}); load the model again, and report it if it comes back")
    return values[0] if len(values) == 1 else tuple(values) if values else None


def text_in(buffer: bytes) -> str:
    """The C string at the beginning of a buffer; what follows its end is arbitrary."""
    return buffer.partition(b"\0")[0].decode()


def _lasting() -> tuple[Any, ...]:
    """The failures of a kernel that spoil the CUDA context for good."""
    from cuda.bindings import driver

    names = (
        "ILLEGAL_ADDRESS",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "HARDWARE_STACK_ERROR",
        "ASSERT",
        "ECC_UNCORRECTABLE",
        "NVLINK_UNCORRECTABLE",
        "CONTEXT_IS_DESTROYED",
    )
    return tuple(getattr(driver.CUresult, f"CUDA_ERROR_{name}") for name in names)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
