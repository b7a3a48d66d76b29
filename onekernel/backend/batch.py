"""What a backend's batch must do: move many states on together, some steps at a time. And one that does it in a loop.

The scheduler decides who takes part in a run and for how many steps; a batch knows neither requests nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from onekernel.errors import OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.sampling.sampler import Sampler

Made = list[tuple[int, SampledToken]]
"""What one step made: (place of the row in the list of rows, its token), at most one a row, places ascending."""


@dataclass(eq=False)
class Row:
    """One sequence of a batch. The same object comes back in the next run as long as nobody else moved the sequence.

    Attributes:
        state: of the backend, an ordinary one: prefill, snapshot and park work on it between runs.
        tokens: not consumed yet, at least one; the first new token follows the last of them. Usually one.
        sampler: how tokens are chosen, with the history and the constraint. It is told each token that is made, so it
            stands where the sequence stands; whoever puts tokens into the timeline by force must `record` them, too.
        max_tokens: at most so many new tokens, at least 1.
        stop_tokens: the row ends after one of these.
        error: set by a run in which this row alone failed (logits that are no numbers, a constraint that cannot be
            followed); its state is of no use then. The others are not affected.
    """

    state: Any
    tokens: Sequence[int]
    sampler: Sampler
    max_tokens: int
    stop_tokens: frozenset[int] = field(default_factory=frozenset)
    error: OnekernelError | None = None


class Batch(Protocol):
    """Used by the thread that has the backend."""

    slots: int  # most rows of one run

    def run(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool] = lambda: False) -> Iterator[Made]:
        """Consume the tokens of each row and make up to `steps` new ones for it: one launch. Yields after each step.

        A row ends within the run after one of its stop tokens, after `max_tokens`, or when its state is full
        (`max_context`); the others go on without it. Every token but the last of a row is consumed as well:
        `state.position` has grown by len(row.tokens) + made - 1 when the iterator ends. The fields of the row are read
        at the call and not changed, but for `error`; to go on, the caller sets `tokens` to the last token made.

        The tokens of a row depend on its own fields alone, never on the rows beside it.

        Args:
            rows: 1 to `slots`, of different states.
            steps: at least 1. A row may get fewer (a constraint may allow one a launch): run again.
            interrupted: asked now and then, from this thread; when it says yes, the launch ends after a step. What was
                made until then still comes.

        The iterator must be exhausted: if it is dropped before its end, or raises, no state of `rows` can be used any
        more, except after the errors at the call.

        Raises:
            NotEnoughMemory: (at the call) there is no room for the tokens to come; no row was moved.
            InvalidRequest: (at the call) `tokens` of a row is empty, does not exist or does not fit; no row was moved.
            BackendError: (while iterating) the device failed.
        """

    def close(self) -> None:
        """Free what the batch holds (not the states). Safe to call twice."""


class LoopBatch:
    """A batch for backends that make one token of one sequence at a time: the rows in turn, step by step."""

    def __init__(
        self,
        slots: int,
        prepare: Callable[[Row, int], None],
        generate: Callable[[Row, int], Iterator[SampledToken]],
        whole_rows: bool = False,
    ) -> None:
        """Args:
        prepare: raises what `run` raises at the call if a row cannot have up to so many new tokens.
        generate: yields at most so many new tokens of a row, consuming all but the last.
        whole_rows: `generate` of one row must end before that of the next begins.
        """
        self.slots = slots
        self._prepare = prepare
        self._generate = generate
        self._whole_rows = whole_rows

    def run(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool] = lambda: False) -> Iterator[Made]:
        for row in rows:
            self._prepare(row, min(steps, row.max_tokens))
        return self._steps(rows, steps, interrupted)

    def _steps(self, rows: Sequence[Row], steps: int, interrupted: Callable[[], bool]) -> Generator[Made, None, None]:
        running = [(place, row, self._generate(row, min(steps, row.max_tokens))) for place, row in enumerate(rows)]
        if self._whole_rows:
            for place, row, tokens in running:
                while (token := _next(row, tokens)) is not None:
                    yield [(place, token)]
            return
        for _ in range(steps):
            made = [(place, token) for place, row, tokens in running if (token := _next(row, tokens)) is not None]
            if not made:
                return
            yield made
            if interrupted():
                return

    def close(self) -> None:
        pass


def _next(row: Row, tokens: Iterator[SampledToken]) -> SampledToken | None:
    """The next token of a row; None after its end, which may be an error of its own."""
    try:
        return next(tokens, None)
    except OnekernelError as error:
        row.error = error
        return None
