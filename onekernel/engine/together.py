"""Sessions that are continued together, many in one run of the backend."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from onekernel.backend.base import Backend
from onekernel.backend.batch import Row
from onekernel.engine.engine import Engine
from onekernel.engine.session import Session
from onekernel.errors import OnekernelError
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler


class Member:
    """A session, and how its answer is made. It may take part in runs and be streamed or extended between them.

    Attributes:
        max_tokens: of the next run, at least 1 and no more than the context has room for. Set before each run.
        generated: so many tokens at the end of the timeline belong to this answer. Set before each run.
        error: what ended this member in the last run while the others went on.
    """

    def __init__(
        self,
        session: Session,
        sampling: SamplingParams,
        stop_tokens: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """Args:
        sampling: with a seed, unless it is greedy.
        """
        self.session = session
        self.max_tokens = 1
        self.generated = 0
        self.error: OnekernelError | None = None
        self._sampling = sampling
        self._stop_tokens = frozenset(stop_tokens)
        self._constraint = constraint
        self._row: Row | None = None
        self._length = 0  # of the timeline when `_row` was last right

    def row(self, backend: Backend) -> Row:
        """For `run_together`: the row of the next run. The same one as long as nothing else moved the session.

        Raises NotEnoughMemory; the session is as it was then.
        """
        state, pending = self.session.ready(backend)
        if self._row is None or self._length != len(self.session):
            tokens, size = self.session.tokens, backend.vocabulary_size
            sampler = Sampler(self._sampling, size, tokens, self._constraint, self.generated)
            self._row = Row(state, pending, sampler, self.max_tokens, self._stop_tokens)
        else:
            self._row.state, self._row.tokens, self._row.max_tokens = state, pending, self.max_tokens
        self._length = len(self.session)
        return self._row

    def moved(self, state: Any) -> None:
        """For `run_together`: the run has ended well."""
        self.session.keep(state)
        self._length = len(self.session)


def run_together(
    engine: Engine, members: Sequence[Member], steps: int, interrupted: Callable[[], bool] = lambda: False
) -> Generator[list[tuple[Member, SampledToken]], None, None]:
    """Continue the sessions of `members` by up to `steps` tokens each. Yields what each step made.

    A member ends within the run after one of its stop tokens, after `max_tokens` or on an error of its own. The engine
    is held from the first `next` until the end. The iterator must be exhausted; sessions whose run did not end well are
    rebuilt from their tokens when they are used again.

    Args:
        members: at most `engine.batch_slots(...)`. Pending tokens of their sessions are consumed here, too:
            prefill before.
        interrupted: see Batch.run.

    Raises:
        NotEnoughMemory: before anything was made; the sessions are as they were.
        BackendError: the device failed.
    """
    with engine.exclusive() as backend:
        rows = []
        for member in members:
            member.error = None
            rows.append(member.row(backend))
        made = engine.batch(backend, len(members)).run(rows, steps, interrupted)
        for member in members:
            member.session.lend()
        for step in made:
            for place, token in step:
                members[place].session.append(token)
            yield [(members[place], token) for place, token in step]
        for member, row in zip(members, rows, strict=True):
            member.error = row.error
            if row.error is None:
                member.moved(row.state)
