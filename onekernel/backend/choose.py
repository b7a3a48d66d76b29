"""Which backend runs a model, and why. The one place that knows all backends.

A backend is imported when it is used, so that one that cannot even be imported here does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onekernel.backend.base import Backend
from onekernel.checkpoint.shape import Shape
from onekernel.errors import BackendError, InvalidRequest

CHOICES = ("auto", "cpu", "cuda")
NO_CUDA = "this version of onekernel has no GPU kernels yet"


@dataclass(frozen=True)
class Choice:
    """The backend that would run, and one sentence that says why."""

    name: str
    reason: str


def choose(name: str = "auto") -> Choice:
    """Choose a backend.

    Args:
        name: "cpu", "cuda", or "auto" for the fastest that runs here.

    Raises:
        InvalidRequest: no such backend.
        BackendError: "cuda" was asked for and cannot run here; the message says why.
    """
    if name not in CHOICES:
        raise InvalidRequest(f"backend = {name!r} is unknown: choose one of {', '.join(CHOICES)}")
    if name == "cuda":
        raise BackendError(f"the backend cuda cannot run: {NO_CUDA}; use the backend cpu")
    return Choice("cpu", "it was asked for" if name == "cpu" else NO_CUDA)


def memory_needed(name: str, shape: Shape) -> int:
    """Bytes that a model of this shape takes on the backend that `choose` named."""
    from onekernel.backend.cpu import memory_needed as on_the_cpu

    choose(name)
    return on_the_cpu(shape)


def load_backend(name: str, folder: Path, shape: Shape, vocabulary_size: int, max_context: int | None) -> Backend:
    """Load the model in `folder` on the backend that `choose` named; arguments and errors as in CpuBackend.load."""
    from onekernel.backend.cpu import CpuBackend

    choose(name)
    return CpuBackend.load(folder, shape, vocabulary_size, max_context)
