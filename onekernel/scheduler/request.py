"""Request: what is asked of the scheduler. Ticket: what has come of it so far."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from onekernel.errors import OnekernelError
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams


@dataclass(frozen=True)
class Interruption:
    """Cuts the first part of an answer (the thinking) short by putting tokens into the timeline.

    Attributes:
        end: the token that ends this part when the model ends it by itself.
        after: so many tokens may come without it.
        insert: the tokens that then follow, as if the model had chosen them.
    """

    end: int
    after: int
    insert: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One answer to make.

    Attributes:
        prompt: token ids, at least one.
        sampling: how tokens are chosen. A seed of None takes a fresh one.
        max_tokens: at most so many tokens; None, or more than the context holds: all that it holds.
        stop_tokens: the answer ends after one of these.
        constraint: only what it allows is sampled. Of this request alone.
        boundaries: lengths of prefixes of `prompt` that other requests are likely to share: a snapshot is kept there.
        interruption: see there.
        priority: requests with a smaller number start first, and are the last to wait when memory runs out.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    boundaries: tuple[int, ...] = ()
    interruption: Interruption | None = None
    priority: int = 0


class Ticket:
    """The answer to one request, as it is made. The scheduler's thread writes it, one other thread reads it.

    Attributes:
        finish_reason: None while it runs, then "stop" (a stop token), "length", "cancelled" or "error".
        error: what went wrong, if finish_reason is "error".
        cached_tokens: tokens of the prompt that did not have to be read, because an earlier request had.
        submitted_at, started_at, first_at, ended_at: time.perf_counter() when the request came, left the queue, had
            its first token, ended; None: not yet.
    """

    def __init__(self, request: Request, notify: Callable[[], None]) -> None:
        """Args:
        notify: called from the scheduler's thread when there is something new; not again before the next `take`.
        """
        self.request = request
        self.finish_reason: str | None = None
        self.error: OnekernelError | None = None
        self.cached_tokens = 0
        self.submitted_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self._fresh: deque[SampledToken] = deque()
        self._notify = notify
        self._notified = False
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """The rest of the answer is not wanted; it ends within one round. Any thread may call this."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def take(self) -> list[SampledToken]:
        """The tokens that came since the last call. None will come any more if `finish_reason` was set before it."""
        # First the flag, then the tokens: one that comes in between is taken now and announced once more.
        self._notified = False
        taken = []
        while self._fresh:
            taken.append(self._fresh.popleft())
        return taken

    def push(self, token: SampledToken) -> None:
        """For the scheduler: one more token."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
        self._fresh.append(token)
        self._announce()

    def finish(self, reason: str, error: OnekernelError | None = None) -> None:
        """For the scheduler: the end."""
        self.ended_at = time.perf_counter()
        self.error = error
        self.finish_reason = reason
        self._announce()

    def _announce(self) -> None:
        # A reader that is slower than the engine is told once and finds many tokens: the faster the tokens come, the
        # less each of them costs.
        if not self._notified:
            self._notified = True
            self._notify()
