"""What a backend must do: consume tokens, make tokens, and copy its state. It knows token ids only, never text.

A backend owns one loaded model. A `State` is everything the model remembers of one token timeline: the KV cache of
the attention layers, conv windows and recurrent states of the delta-net layers, and how many tokens it has consumed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from onekernel.backend.batch import Batch
from onekernel.checkpoint.shape import Shape
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken as SampledToken  # part of this boundary
from onekernel.sampling.params import SamplingParams


class State(Protocol):
    """One timeline on a backend. Opaque but for `position`."""

    @property
    def position(self) -> int:
        """Tokens consumed so far."""


class Backend(Protocol):
    """Used from one thread at a time; the engine sees to that."""

    name: str  # "cpu", "cuda", "fake"
    shape: Shape
    vocabulary_size: int  # tokens that can be sampled; the rest of `shape.vocab` is padding
    max_context: int  # tokens that one state can hold
    prefill_chunk: int  # tokens to give `prefill` at once, where there are more: it cannot be interrupted
    prefill_cut: int  # prompts are cut at its multiples: elsewhere it might change the last bits of what follows
    runs_ahead: bool  # a `generate` that is closed early may have consumed more than it yielded
    most_slots: int  # sequences that one step of a batch serves at about the price of one; 1: they take turns
    # A backend on a GPU may also have `device_seconds: float`, the GPU time of all its launches so far, by the GPU's
    # own clock: the benchmarks then show device time beside wall time.

    def new_state(self) -> Any:
        """An empty timeline (position 0)."""

    def prefill(self, state: Any, tokens: Sequence[int]) -> None:
        """Consume `tokens` without making any.

        Raises InvalidRequest, before anything is consumed, if a token does not exist or the context cannot hold them.
        """

    def generate(
        self,
        state: Any,
        tokens: Sequence[int],
        history: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> Generator[SampledToken, None, None]:
        """Consume `tokens` (at least one), then yield up to `max_tokens` sampled ones, each as it is made.

        Stops after yielding a token of `stop_tokens`, or when the state is full (`max_context`). Every yielded token
        but the last is consumed as well. When the caller closes the iterator early, the backend stops within one
        token; `state.position` then tells what was consumed (more than was yielded only if `runs_ahead`).

        `history` holds all tokens of the timeline before `tokens`; with `tokens` it is the prompt that
        repetition_penalty looks at. Its last `generated` tokens belong to the same answer, made in an earlier call:
        presence_penalty and frequency_penalty count them. Only what `constraint` allows is sampled. `sampling.seed` is
        never None here; the random number of a token depends only on the seed, on the position of the token in the
        timeline and on its id.

        Raises InvalidRequest at the call, not at the first token, if `tokens` is empty, a token does not exist, the
        context cannot hold `tokens`, or the sampling parameters do not fit the model; nothing is consumed then.
        """

    def logits(self, state: Any, tokens: Sequence[int]) -> np.ndarray:
        """Consume `tokens` and return float32 logits [len(tokens), vocab] (padding rows included, as computed)."""

    def batch(self, slots: int) -> Batch:
        """What moves up to `slots` states on together. May take long: nothing is compiled later, while streams run.

        Raises:
            BackendError: the kernels cannot be compiled.
        """

    def snapshot(self, state: Any) -> Any:
        """A copy of the state from which `restore` makes new ones; the original may go on."""

    def park(self, state: Any) -> Any:
        """Move a state into host memory, where `restore` finds it. The state itself is of no use afterwards."""

    def restore(self, snapshot: Any) -> Any:
        """A new state equal to the one that was given to `snapshot` or `park`, bit for bit.

        Raises:
            NotEnoughMemory: there is no room for it.
        """

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the backend's memory that a state takes which holds so many tokens."""

    def memory_free(self) -> int | None:
        """Bytes that new states can have; None if the system does not tell."""

    def close(self) -> None:
        """Free everything; the backend is of no use afterwards. Safe to call twice."""
