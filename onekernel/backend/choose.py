"""Which backend runs a model, and why. The one place that knows all backends.

A backend is imported when it is used, so that one that cannot even be imported here does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onekernel.backend.base import Backend
from onekernel.checkpoint.shape import Shape
from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory, UnsupportedModel

CHOICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Choice:
    """The backend that would run, and one sentence that says why."""

    name: str
    reason: str


def choose(name: str = "auto", shape: Shape | None = None) -> Choice:
    """Choose a backend.

    Args:
        name: "cpu", "cuda", or "auto" for the fastest that runs here.
        shape: the model to run, if it is known: "auto" leaves the GPU aside if this model cannot run or does not fit
            there.

    Raises:
        InvalidRequest: no such backend.
        BackendError, UnsupportedModel, NotEnoughMemory: "cuda" was asked for and cannot run here, or not with this
            model; the message says why.
    """
    if name not in CHOICES:
        raise InvalidRequest(f"backend = {name!r} is unknown: choose one of {', '.join(CHOICES)}")
    if name == "cpu":
        return Choice("cpu", "it was asked for")
    from onekernel.backend import cuda

    try:
        gpu = cuda.usable_gpu()
        if shape is not None:
            cuda.check_fits(gpu, shape)
    except (BackendError, UnsupportedModel, NotEnoughMemory) as error:
        if name == "auto":
            return Choice("cpu", str(error))
        if isinstance(error, BackendError):
            raise BackendError(f"the backend cuda cannot run: {error}; use the backend cpu") from None
        raise
    return Choice("cuda", f"{gpu.name}, {gpu.memory_free() / 2**30:.1f} GiB free")


def memory_needed(name: str, shape: Shape) -> int:
    """Bytes that a model of this shape takes on the backend that `choose` named: GPU memory for cuda, RAM for cpu."""
    if choose(name).name == "cuda":
        from onekernel.backend import cuda

        return cuda.memory_needed(shape)
    from onekernel.backend import cpu

    return cpu.memory_needed(shape)


def state_bytes(name: str, shape: Shape, tokens: int) -> int:
    """Bytes of the same memory that each conversation of so many tokens takes."""
    if choose(name).name == "cuda":
        from onekernel.backend import cuda

        return cuda.state_bytes(shape, tokens)
    from onekernel.backend import cpu

    return cpu.state_bytes(shape, tokens)


def load_backend(name: str, folder: Path, shape: Shape, vocabulary_size: int, max_context: int | None) -> Backend:
    """Load the model in `folder` on the backend that `choose` named; arguments and errors as in its `load`."""
    if choose(name).name == "cuda":
        from onekernel.backend.cuda import CudaBackend

        return CudaBackend.load(folder, shape, vocabulary_size, max_context)
    from onekernel.backend.cpu import CpuBackend

    return CpuBackend.load(folder, shape, vocabulary_size, max_context)
