"""The generation loop of backends whose logits come to the host after every token: cpu and fake."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Generic, TypeVar

import numpy as np

from onekernel.backend.base import State
from onekernel.backend.batch import Batch, LoopBatch, Row
from onekernel.checkpoint.shape import Shape
from onekernel.errors import InvalidRequest
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler

StateT = TypeVar("StateT", bound=State)


def check_limits(shape: Shape, vocabulary_size: int, max_context: int | None) -> None:
    """Raises InvalidRequest if one of them exceeds what the model has."""
    if max_context is not None and not 1 <= max_context <= shape.max_context:
        raise InvalidRequest(f"max_context = {max_context} must be between 1 and the model's {shape.max_context}")
    if not 1 <= vocabulary_size <= shape.vocab:
        raise InvalidRequest(
            f"the tokenizer defines {vocabulary_size} tokens, but the model has {shape.vocab}: "
            "they do not belong together"
        )


class StepwiseBackend(ABC, Generic[StateT]):
    """Implements `prefill`, `generate`, `batch` and `logits` of the Backend protocol on one method, `_consume`."""

    prefill_chunk = 512
    prefill_cut = 1  # a bit more or less counts less here than streams that stand still
    runs_ahead = False
    most_slots = 1

    def __init__(self, shape: Shape, vocabulary_size: int, max_context: int | None) -> None:
        """Args:
            vocabulary_size: tokens that the tokenizer defines; the rest of `shape.vocab` is never sampled.
            max_context: tokens that one state may hold; None for what the model was made for.

        Raises:
            InvalidRequest: see check_limits.
        """
        check_limits(shape, vocabulary_size, max_context)
        self.shape = shape
        self.vocabulary_size = vocabulary_size
        self.max_context = shape.max_context if max_context is None else max_context

    @abstractmethod
    def _consume(self, state: StateT, tokens: Sequence[int]) -> np.ndarray:
        """Consume `tokens` (checked, at least one) and return the logits after the last, float32 [vocab]."""

    def prefill(self, state: StateT, tokens: Sequence[int]) -> None:
        self._check(state, tokens)
        if tokens:
            self._consume(state, tokens)

    def generate(
        self,
        state: StateT,
        tokens: Sequence[int],
        history: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> Generator[SampledToken, None, None]:
        # Not a generator itself: a request that cannot run is refused here and not at the first token.
        if not tokens:
            raise InvalidRequest("tokens is empty: generating needs at least one token to start from")
        self._check(state, tokens)
        sampler = Sampler(sampling, self.vocabulary_size, [*history, *tokens], constraint, generated)
        return self._generate(state, tokens, sampler, max_tokens, stop_tokens)

    def _generate(
        self, state: StateT, tokens: Sequence[int], sampler: Sampler, max_tokens: int, stop_tokens: frozenset[int]
    ) -> Generator[SampledToken, None, None]:
        logits = self._consume(state, tokens)
        for remaining in reversed(range(max_tokens)):
            token = sampler.choose(logits, state.position)
            yield token
            if remaining == 0 or token.id in stop_tokens or state.position == self.max_context:
                return
            logits = self._consume(state, [token.id])

    def batch(self, slots: int) -> Batch:
        return LoopBatch(slots, self._prepare, self._generate_row, whole_rows=self.runs_ahead)

    def _generate_row(self, row: Row, count: int) -> Generator[SampledToken, None, None]:
        return self._generate(row.state, row.tokens, row.sampler, count, row.stop_tokens)

    def _prepare(self, row: Row, count: int) -> None:
        """Raises what Batch.run raises at the call; makes room for `count` new tokens."""
        if not row.tokens:
            raise InvalidRequest("tokens of a row is empty: generating needs at least one token to start from")
        self._check(row.state, row.tokens)
        self._reserve(row.state, min(row.state.position + len(row.tokens) + count - 1, self.max_context))

    def _reserve(self, state: StateT, positions: int) -> None:
        """Make room for so many tokens in all, or raise NotEnoughMemory. The state is as it was then."""

    def logits(self, state: StateT, tokens: Sequence[int]) -> np.ndarray:
        self._check(state, tokens)
        result = np.empty((len(tokens), self.shape.vocab), np.float32)
        for row, token in enumerate(tokens):
            result[row] = self._consume(state, [token])
        return result

    def _check(self, state: StateT, tokens: Sequence[int]) -> None:
        """Raises InvalidRequest if `tokens` do not exist or do not fit."""
        if state.position + len(tokens) > self.max_context:
            raise InvalidRequest(
                f"{state.position} tokens of context and {len(tokens)} new ones are "
                f"{state.position + len(tokens)}, but the context holds {self.max_context}: "
                "shorten the prompt or start a new session"
            )
        for token in tokens:
            if not 0 <= token < self.shape.vocab:
                raise InvalidRequest(f"token {token} does not exist: ids go from 0 to {self.shape.vocab - 1}")
