"""The CPU backend: the NumPy reference model, with all weights in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onekernel.backend.memory import available_memory
from onekernel.backend.stepwise import StepwiseBackend, check_limits
from onekernel.checkpoint.shape import Shape
from onekernel.errors import BackendError, NotEnoughMemory
from onekernel.reference import model
from onekernel.reference.parameters import Parameters, parameter_count
from onekernel.reference.state import State

PREFILL_CHUNK = 512  # tokens of a prompt in one forward pass: bounds the scratch memory, and Ctrl-C comes through
INTERPRETER = 2**27  # bytes that Python and its libraries take
CONTEXT_TO_PLAN_FOR = 8192  # tokens of KV cache that memory_needed includes; longer ones grow when they are used


def memory_needed(shape: Shape) -> int:
    """Bytes of RAM that a model of this shape takes: weights, the state of one session and scratch, all float32."""
    context = min(shape.max_context, CONTEXT_TO_PLAN_FOR)
    recurrent = shape.value_heads * shape.key_head_dim * shape.value_head_dim
    state = shape.linear_layers * (recurrent + shape.conv_dim * (shape.conv_kernel - 1))
    cache = shape.full_layers * 2 * shape.kv_dim * context
    widest = max(shape.intermediate, shape.conv_dim + shape.value_dim, 2 * shape.query_dim)
    scratch = PREFILL_CHUNK * (4 * shape.hidden + 4 * widest) + shape.vocab
    return 4 * (parameter_count(shape, mtp=False) + state + cache + scratch) + INTERPRETER


def state_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of RAM of a state that holds so many tokens."""
    return shape.state_bytes(tokens)


class CpuBackend(StepwiseBackend[State]):
    name = "cpu"

    def __init__(self, parameters: Parameters, vocabulary_size: int, max_context: int | None = None) -> None:
        super().__init__(parameters.shape, vocabulary_size, max_context)
        self._parameters: Parameters | None = parameters

    @classmethod
    def load(cls, folder: Path, shape: Shape, vocabulary_size: int, max_context: int | None = None) -> CpuBackend:
        """Read the checkpoint in `folder` and widen it to float32 (without the MTP head, which is of no use here).

        Raises:
            InvalidRequest: see check_limits; before anything is read.
            NotEnoughMemory: before anything is read.
            CheckpointError: see load_weights.
        """
        check_limits(shape, vocabulary_size, max_context)
        needed, available = memory_needed(shape), available_memory()
        if available is not None and needed > available:
            raise NotEnoughMemory(
                f"on the CPU this model needs {needed / 2**30:.1f} GiB of memory "
                f"({parameter_count(shape, mtp=False):,} weights in float32, caches and scratch), but "
                f"{available / 2**30:.1f} GiB are available: close other programs, or choose a smaller model"
            )
        from onekernel.checkpoint.weights import load_weights

        return cls(Parameters.load(load_weights(folder, shape), shape, mtp=False), vocabulary_size, max_context)

    @property
    def parameters(self) -> Parameters:
        if self._parameters is None:
            raise BackendError("this backend was closed; load the model again")
        return self._parameters

    def new_state(self) -> State:
        return State.empty(self.shape)

    def _consume(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        return model.head(self.parameters, self._hidden(state, tokens))

    def prefill(self, state: State, tokens: Sequence[int]) -> None:
        self._check(state, tokens)
        if tokens:
            self._hidden(state, tokens)  # no LM head

    def _hidden(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        """Consume `tokens` and return the last one's final hidden state [hidden]."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            hidden = model.final_hidden(self.parameters, state, tokens[start : start + PREFILL_CHUNK])
        return hidden[-1]

    def logits(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        self._check(state, tokens)
        result = np.empty((len(tokens), self.shape.vocab), np.float32)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            result[part] = model.forward(self.parameters, state, tokens[part], all_logits=True)
        return result

    def snapshot(self, state: State) -> State:
        return state.copy()

    def restore(self, snapshot: State) -> State:
        return snapshot.copy()

    def park(self, state: State) -> State:
        return state  # it is in the host's memory already

    def state_bytes(self, tokens: int) -> int:
        return state_bytes(self.shape, tokens)

    def memory_free(self) -> int | None:
        return available_memory()

    def close(self) -> None:
        self._parameters = None
