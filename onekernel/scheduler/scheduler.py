"""Scheduler: takes requests from any thread and serves them from one thread of its own."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable

from onekernel.engine import Engine
from onekernel.errors import BackendError, InvalidRequest, OnekernelError
from onekernel.scheduler.prefix_cache import PrefixCache
from onekernel.scheduler.request import Request, Ticket
from onekernel.scheduler.rounds import Rounds

LEAST_RUNNING = 32  # of `most_running` where nothing else is said
MOST_WAITING = 256
CACHE_BYTES = 2**30
LONGEST_RETRY_S = 60


class QueueFull(OnekernelError):
    """Too many requests wait already.

    Attributes:
        retry_after_s: seconds after which there is likely to be room.
    """

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ShuttingDown(OnekernelError):
    """No new requests are taken."""


class Scheduler:
    """A bounded queue before an engine, and the thread that runs it.

    The engine may be used by others too (each round takes its turn), but they then take a share of the time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        most_running: int | None = None,
        most_waiting: int = MOST_WAITING,
        cache_bytes: int = CACHE_BYTES,
        deterministic: bool = False,
        patient: bool = False,
    ) -> None:
        """Args:
        most_running: requests that share the engine at a time, each with a state; None: 32, or as many as one step of
            the engine serves.
        most_waiting: requests that may wait for that.
        cache_bytes: for snapshots of what was read, see PrefixCache.
        deterministic: the tokens of a request do not depend on whether it was alone: it runs as one of many even then.
            The kernels for one and for many round differently. (What was found in the cache may still turn a last bit.)
        patient: nobody reads the answers as they come: prompts go first, so that more run together sooner.
        """
        self.most_running = most_running or max(LEAST_RUNNING, engine.most_slots)
        self.most_waiting = most_waiting
        self.cache = PrefixCache(engine.shape, cache_bytes)
        self.failure: BaseException | None = None
        """What ended the thread, if anything did: no request can be served any more."""
        self._engine = engine
        self._waiting: list[Ticket] = []  # the next one first
        self._rounds = Rounds(engine, self.cache, self._others_wait, deterministic, patient)
        self._wake = threading.Condition()
        self._closing = False
        self._end_at: float | None = None  # time.perf_counter() at which what still runs is cut off
        self._thread = threading.Thread(target=self._run, name="onekernel-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request, notify: Callable[[], None]) -> Ticket:
        """Take a request on.

        Args:
            notify: see Ticket.

        Raises:
            InvalidRequest: the prompt is empty, holds a token that does not exist, or fills the context.
            QueueFull: try again later.
            ShuttingDown: `close` was called.
            BackendError: the thread has ended on an error.
        """
        self._check(request)
        ticket = Ticket(request, notify)
        with self._wake:
            if self.failure is not None:
                raise BackendError(f"the engine has stopped on an error ({self.failure!r}): start the server again")
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            if not self._has_room():
                raise QueueFull(len(self._waiting), self._retry_after_s())
            bisect.insort_right(self._waiting, ticket, key=lambda waiting: waiting.request.priority)
            self._wake.notify()
        return ticket

    @property
    def accepts(self) -> bool:
        """Whether a request would be taken on now."""
        return self.failure is None and not self._closing and self._has_room()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that share the engine now."""
        return len(self._rounds.running)

    @property
    def parked(self) -> int:
        """Of these, those that wait in host memory until the backend has room for them again."""
        return sum(turn.parked for turn in self._rounds.running)

    @property
    def prefilled(self) -> int:
        """Tokens of prompts that were read so far, without those that were found in the cache."""
        return self._rounds.prefilled

    def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let those taken end for at most `grace_s` seconds, then end them as "cancelled".

        Returns when the thread has ended. Any thread, more than once.
        """
        with self._wake:
            self._closing = True
            self._end_at = time.perf_counter() + grace_s
            self._wake.notify()
        self._thread.join()

    def _others_wait(self, ended: int) -> bool:
        return bool(self._waiting) and len(self._rounds.running) - ended < self.most_running

    def _has_room(self) -> bool:
        free = max(0, self.most_running - len(self._rounds.running))
        return len(self._waiting) < self.most_waiting + free

    def _check(self, request: Request) -> None:
        limit, vocabulary = self._engine.max_context, self._engine.shape.vocab
        if not request.prompt:
            raise InvalidRequest("the prompt is empty: at least one token is needed to continue from")
        if len(request.prompt) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt)} tokens, but the maximum context length is {limit} tokens, the "
                "answer included: shorten the prompt"
            )
        if request.max_tokens is not None and request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens = {request.max_tokens} must be at least 1")
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < vocabulary:
                raise InvalidRequest(f"token id {token} is outside the vocabulary of {vocabulary} tokens")

    def _retry_after_s(self) -> int:
        rounds = len(self._waiting) / max(1, self.most_running)
        return max(1, min(LONGEST_RETRY_S, round(self._rounds.request_s * rounds)))

    def _run(self) -> None:
        try:
            if self.most_running > 1:
                self._rounds.warm_up(self.most_running)
            while self._next():
                self._rounds.step()
        except BaseException as error:  # a bug: nobody may wait for an answer that cannot come
            with self._wake:
                self.failure = error
            self._end_everything("error", BackendError(f"the engine has stopped on an error: {error!r}"))
            raise

    def _next(self) -> bool:
        """Wait until there is something to do. Returns False when everything is over."""
        with self._wake:
            while not self._waiting and not self._rounds.running:
                if self._closing:
                    return False
                self._wake.wait()
            if self._end_at is not None and time.perf_counter() >= self._end_at:
                self._end_everything("cancelled")
                return False
            while self._waiting and len(self._rounds.running) < self.most_running:
                ticket = self._waiting[0]
                if not ticket.cancelled and not self._rounds.room.fits(ticket.request, self._rounds.running):
                    break
                self._waiting.pop(0)
                if ticket.cancelled:
                    ticket.finish("cancelled")
                else:
                    self._rounds.start(ticket)
            self._forget_cancelled()
        return True

    def _forget_cancelled(self) -> None:
        """Requests whose client left while they waited make room for others."""
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            ticket.finish("cancelled")

    def _end_everything(self, reason: str, error: OnekernelError | None = None) -> None:
        for ticket in [*self._waiting, *(turn.ticket for turn in self._rounds.running)]:
            ticket.finish(reason, error)
        self._waiting.clear()
        self._rounds.running.clear()
