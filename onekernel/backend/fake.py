"""A backend without a model, for tests of everything above backends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from onekernel.backend.stepwise import StepwiseBackend
from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.errors import BackendError

CERTAIN = 30.0  # logit of the next token, all others being 0


def default_next_token(consumed: Sequence[int], vocabulary_size: int) -> int:
    """Depends on every consumed token and on their order: fold `value ← (31 · value + token + 7) mod vocabulary_size`
    over them, from 0."""
    value = 0
    for token in consumed:
        value = (31 * value + token + 7) % vocabulary_size
    return value


@dataclass
class FakeState:
    tokens: list[int] = field(default_factory=list)

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
    ) -> None:
        """Args:
        vocabulary_size: tokens that can be sampled; 8 rows of padding follow them in the logits.
        next_token: (consumed tokens, vocabulary_size) -> the most probable next token.
        delay: seconds that each call that consumes tokens takes.
        """
        super().__init__(_shape(vocabulary_size + 8, max_context), vocabulary_size, max_context)
        self.next_token = next_token
        self.delay = delay
        self.closed = False

    def new_state(self) -> FakeState:
        return FakeState()

    def _consume(self, state: FakeState, tokens: Sequence[int]) -> np.ndarray:
        if self.closed:
            raise BackendError("this backend was closed")
        time.sleep(self.delay)
        state.tokens.extend(tokens)
        logits = np.zeros(self.shape.vocab, np.float32)
        logits[self.next_token(state.tokens, self.vocabulary_size)] = CERTAIN
        return logits

    def snapshot(self, state: FakeState) -> FakeState:
        return FakeState(list(state.tokens))

    def restore(self, snapshot: FakeState) -> FakeState:
        return FakeState(list(snapshot.tokens))

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
