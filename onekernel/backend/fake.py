"""A backend without a model, for tests of everything above backends."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onekernel.backend.stepwise import StepwiseBackend
from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.errors import BackendError, NotEnoughMemory

CERTAIN = 30.0  # logit of the next token, all others being 0
GROWTH = 64  # tokens by which a state grows


def default_next_token(consumed: Sequence[int], vocabulary_size: int) -> int:
    """Depends on every consumed token and on their order: fold `value ← (31 · value + token + 7) mod vocabulary_size`
    over them, from 0."""
    value = 0
    for token in consumed:
        value = (31 * value + token + 7) % vocabulary_size
    return value


@dataclass(eq=False)
class FakeState:
    tokens: list[int] = field(default_factory=list)
    capacity: int = 0  # tokens that there is room for

    @property
    def position(self) -> int:
        return len(self.tokens)


class FakeBackend(StepwiseBackend[FakeState]):
    """Its next token is a function of all consumed tokens; the logit of that token is 30 and every other one is 0."""

    name = "fake"

    def __init__(
        self,
        vocabulary_size: int = 256,
        max_context: int = 4096,
        next_token: Callable[[Sequence[int], int], int] = default_next_token,
        delay: float = 0.0,
        memory: int | None = None,
    ) -> None:
        """Args:
        vocabulary_size: tokens that can be sampled; 8 rows of padding follow them in the logits.
        next_token: (consumed tokens, vocabulary_size) -> the most probable next token.
        delay: seconds that each call that consumes tokens takes.
        memory: tokens that all states and snapshots have room for together; None: any number.
        """
        super().__init__(_shape(vocabulary_size + 8, max_context), vocabulary_size, max_context)
        self.next_token = next_token
        self.delay = delay
        self.memory = memory
        self.closed = False
        self._alive: weakref.WeakSet[FakeState] = weakref.WeakSet()

    def new_state(self) -> FakeState:
        return self._tracked()

    def _tracked(self) -> FakeState:
        state = FakeState()
        self._alive.add(state)
        return state

    def _consume(self, state: FakeState, tokens: Sequence[int]) -> np.ndarray:
        if self.closed:
            raise BackendError("this backend was closed")
        self._reserve(state, state.position + len(tokens))
        time.sleep(self.delay)
        state.tokens.extend(tokens)
        logits = np.zeros(self.shape.vocab, np.float32)
        logits[self.next_token(state.tokens, self.vocabulary_size)] = CERTAIN
        return logits

    def snapshot(self, state: FakeState) -> FakeState:
        copy = self._tracked()
        self._reserve(copy, state.position)
        copy.tokens[:] = state.tokens
        return copy

    def restore(self, snapshot: FakeState) -> FakeState:
        return FakeBackend.snapshot(self, snapshot)

    def park(self, state: FakeState) -> FakeState:
        parked = FakeState(list(state.tokens))
        state.tokens.clear()
        state.capacity = 0
        return parked

    def state_bytes(self, tokens: int) -> int:
        return 4 * GROWTH * -(-tokens // GROWTH)

    def memory_free(self) -> int | None:
        return None if self.memory is None else 4 * (self.memory - sum(state.capacity for state in self._alive))

    def _reserve(self, state: FakeState, positions: int) -> None:
        if positions <= state.capacity:
            return
        capacity = self.state_bytes(positions) // 4
        free = self.memory_free()
        if free is not None and 4 * (capacity - state.capacity) > free:
            raise NotEnoughMemory(f"no room for {capacity} tokens: {free // 4} are left")
        state.capacity = capacity

    def close(self) -> None:
        self.closed = True


def _shape(vocab: int, max_context: int) -> Shape:
    """Any valid shape: nobody computes with it."""
    return Shape(
        hidden=8,
        intermediate=16,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL),
        vocab=vocab,
        tied=True,
        heads=2,
        kv_heads=1,
        head_dim=8,
        rotary_dim=2,
        rope_theta=1e7,
        key_heads=1,
        value_heads=1,
        key_head_dim=8,
        value_head_dim=8,
        conv_kernel=4,
        norm_eps=1e-6,
        max_context=max_context,
        mtp_layers=0,
        eos_token_ids=(),
    )
