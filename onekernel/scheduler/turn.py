"""Turn: a request that shares the engine: its session, and how far it has come."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable

from onekernel.engine import Engine, Member, Session
from onekernel.sampling.params import SampledToken
from onekernel.scheduler.request import Ticket


class Turn:
    """Attributes:
    session: its timeline is what was taken of the prompt so far, then what was made.
    member: the session in runs with others.
    stops: lengths of the prompt at which to take a snapshot, ascending.
    kept: tokens of the timeline that the cache holds a snapshot of.
    served: what it had of the engine, in tokens made, counted from the least served one when it came.
    generated: tokens of the answer.
    parked: its state is in host memory, until there is room again.
    """

    def __init__(self, engine: Engine, ticket: Ticket, served: float) -> None:
        ticket.started_at = time.perf_counter()
        request = ticket.request
        if request.sampling.seed is None:  # one seed for the whole answer
            seeded = dataclasses.replace(request.sampling, seed=secrets.randbits(64))
            ticket.request = request = dataclasses.replace(request, sampling=seeded)
        self.ticket = ticket
        self.request = request
        self.session: Session = engine.new_session()
        self.member = Member(self.session, request.sampling, request.stop_tokens, request.constraint)
        self.stops: list[int] = []
        self.kept = 0
        self.served = served
        self.generated = 0
        self.parked = False
        self._max_context = engine.max_context
        self._in_first_part = True  # the end token of `Request.interruption` has not come yet

    def keep_at(self, stops: Iterable[int]) -> None:
        """Take snapshots at these lengths of the prompt, as far as they lie ahead."""
        self.kept = len(self.session)
        prompt = self.request.prompt
        self.stops = sorted(stop for stop in {*stops} if self.kept < stop <= len(prompt))

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the session does not have yet."""
        return max(0, len(self.request.prompt) - len(self.session))

    @property
    def reads(self) -> bool:
        """Whether it has some of the prompt before it, or a snapshot to take of it."""
        return bool(self.unread or self.stops)

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        room = self._max_context - len(self.session)
        return room if self.request.max_tokens is None else min(self.request.max_tokens - self.generated, room)

    @property
    def allowance(self) -> int:
        """Tokens that may be made before something else has to happen."""
        interruption = self.request.interruption
        if not self._in_first_part or interruption is None:
            return self.left
        return min(self.left, max(1, interruption.after - self.generated))

    def push(self, token: SampledToken) -> None:
        """A token of the answer."""
        self.generated += 1
        interruption = self.request.interruption
        if interruption is not None and token.id == interruption.end:
            self._in_first_part = False
        self.ticket.push(token)

    def interrupt(self) -> None:
        """Cut the first part of the answer short, if its time has come."""
        interruption = self.request.interruption
        if interruption is None or not self._in_first_part or self.generated < interruption.after:
            return
        self._in_first_part = False
        if self.left <= len(interruption.insert):  # nothing could follow
            return
        self.session.extend(interruption.insert)
        for token in interruption.insert:
            if self.request.constraint is not None:
                self.request.constraint.accept(token)
            self.push(SampledToken(token))
