"""CudaBatch: many states a launch on the GPU, and beside them the rows that need the host for each token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from onekernel.backend.batch import Batch, Made, Row


class BatchKernel(Protocol):
    """What a decode kernel of many rows offers."""

    slots: int

    def run(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool]) -> Iterator[Made]:
        """As Batch.run. Each row has one token to consume, the last of `tokens`; its state has room for all steps."""

    def close(self) -> None: ...


class CudaBatch:
    """A Batch (see there) over the batch kernel."""

    def __init__(
        self,
        kernel: BatchKernel,
        alone: Batch,
        prepare: Callable[[Row, int], None],
        consume: Callable[[Any, Sequence[int]], None],
        most_stop_tokens: int,
        max_context: int,
    ) -> None:
        """Args:
        alone: runs the rows that the kernel cannot: those with a constraint, or with too many stop tokens.
        prepare: checks a row and makes room for so many new tokens, see StepwiseBackend.
        consume: makes a state consume checked tokens.
        """
        self.slots = kernel.slots
        self._kernel = kernel
        self._alone = alone
        self._prepare = prepare
        self._consume = consume
        self._most_stop_tokens = most_stop_tokens
        self._max_context = max_context

    def run(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool] = lambda: False) -> Iterator[Made]:
        # The last token of a row is not consumed, so it may stand right behind the end of the context.
        steps = min(steps, *(self._max_context - row.state.position - len(row.tokens) + 1 for row in rows), steps)
        for row in rows:
            self._prepare(row, max(1, min(steps, row.max_tokens)))
        return self._steps(rows, steps, interrupted)

    def _steps(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool]) -> Generator[Made, None, None]:
        apart = [place for place, row in enumerate(rows) if self._needs_host(row)]
        if apart:
            yield from self._placed(self._alone.run([rows[place] for place in apart], 1), apart)
        together = [place for place, row in enumerate(rows) if not self._needs_host(row)]
        if together:
            for place in together:
                if len(rows[place].tokens) > 1:
                    self._consume(rows[place].state, rows[place].tokens[:-1])
            made = self._kernel.run([rows[place] for place in together], 1 if apart else steps, interrupted)
            yield from self._placed(made, together)

    def _needs_host(self, row: Row) -> bool:
        return row.sampler.constraint is not None or len(row.stop_tokens) > self._most_stop_tokens

    @staticmethod
    def _placed(made: Iterator[Made], places: Sequence[int]) -> Iterator[Made]:
        for step in made:
            yield [(places[place], token) for place, token in step]

    def close(self) -> None:
        self._kernel.close()
