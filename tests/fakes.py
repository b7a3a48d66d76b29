"""A fake backend that watches how it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence

import numpy as np

from onekernel.backend.fake import FakeBackend, FakeState, default_next_token
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams


class WatchedBackend(FakeBackend):
    """Records the calls, refuses two threads at once, and can run ahead or break."""

    def __init__(
        self,
        vocabulary_size: int = 256,
        max_context: int = 4096,
        next_token: Callable[[Sequence[int], int], int] = default_next_token,
        runs_ahead: bool = False,
        delay: float = 0.0,
        memory: int | None = None,
    ) -> None:
        super().__init__(vocabulary_size, max_context, next_token, delay, memory)
        self.runs_ahead = runs_ahead
        self.break_after: int | None = None  # tokens of a `generate` until it raises
        self.consumed_in_all = 0
        self.calls: list[str] = []
        self.seeds: list[int | None] = []
        self._busy = threading.Lock()

    def _consume(self, state: FakeState, tokens: Sequence[int]) -> np.ndarray:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            self.consumed_in_all += len(tokens)
            return super()._consume(state, tokens)
        finally:
            self._busy.release()

    def new_state(self) -> FakeState:
        self.calls.append("new_state")
        return super().new_state()

    def prefill(self, state: FakeState, tokens: Sequence[int]) -> None:
        self.calls.append("prefill")
        super().prefill(state, tokens)

    def snapshot(self, state: FakeState) -> FakeState:
        self.calls.append("snapshot")
        return super().snapshot(state)

    def restore(self, snapshot: FakeState) -> FakeState:
        self.calls.append("restore")
        return super().restore(snapshot)

    def generate(
        self,
        state: FakeState,
        tokens: Sequence[int],
        history: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> Generator[SampledToken, None, None]:
        assert list(history) == state.tokens, "the session lost track of what was consumed"
        self.calls.append("generate")
        self.seeds.append(sampling.seed)
        made = super().generate(state, tokens, history, sampling, max_tokens, stop_tokens, constraint, generated)
        return self._disturbed(state, made)

    def _disturbed(
        self, state: FakeState, made: Generator[SampledToken, None, None]
    ) -> Generator[SampledToken, None, None]:
        try:
            for count, token in enumerate(made):
                if count == self.break_after:
                    raise RuntimeError("the backend broke")
                yield token
        except GeneratorExit:
            if self.runs_ahead:
                self._consume(state, [7, 7, 7])
            raise
