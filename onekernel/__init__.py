"""onekernel: a local inference engine for the dense Qwen3.5 family.

import onekernel

model = onekernel.load("demo")
print(model.generate("def bisect_right(a, x,").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onekernel.api import Model as Model
    from onekernel.api import load as load
    from onekernel.conversation import Conversation as Conversation
    from onekernel.errors import OnekernelError as OnekernelError
    from onekernel.sampling.params import SamplingParams as SamplingParams
    from onekernel.stream import AsyncStream as AsyncStream
    from onekernel.stream import Chunk as Chunk
    from onekernel.stream import Completion as Completion
    from onekernel.stream import Stream as Stream

__version__ = "0.1.0"

# Imported on first use, so that `onekernel --help` does not wait for NumPy.
_HOMES = {
    "AsyncStream": "stream",
    "Chunk": "stream",
    "Completion": "stream",
    "Conversation": "conversation",
    "Model": "api",
    "OnekernelError": "errors",
    "SamplingParams": "sampling.params",
    "Stream": "stream",
    "load": "api",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onekernel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onekernel.{_HOMES[name]}"), name)
