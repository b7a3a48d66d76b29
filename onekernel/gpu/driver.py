"""The CUDA driver, called through NVIDIA's bindings: every call is checked, every failure is a BackendError."""

from __future__ import annotations

from typing import Any

from onekernel.errors import BackendError, NotEnoughMemory


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
        raise BackendError(f"the GPU failed ({message}); load the model again, and report it if it comes back")
    return values[0] if len(values) == 1 else tuple(values) if values else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
