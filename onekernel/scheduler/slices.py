"""TimeSlices: which request runs next on the one engine, and for how long.

This is the inner loop of the scheduler, and all that batched decoding has to replace: `start` takes a request in,
`step` moves some of the running ones on, and those that have ended leave `running`.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from onekernel.engine import Engine, Session
from onekernel.errors import NotEnoughMemory, OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.scheduler.prefix_cache import PrefixCache
from onekernel.scheduler.request import Ticket

SLICE_TOKENS = 8  # of one slice while others wait for theirs
SLICE_S = 0.05  # fewer, where tokens take long
ALONE_TOKENS = 256  # while nobody waits: each slice costs the engine a new start. It ends when somebody comes.
PREFILL_S = 0.1
PREFILL_TOKENS = (32, 2048)  # least and most of one slice
SNAPSHOT_TOKENS = 32  # a snapshot is taken when so many tokens would otherwise be read again


@dataclass
class Running:
    """A request on the engine."""

    ticket: Ticket
    session: Session
    stops: list[int]  # lengths of the prompt at which to take a snapshot, ascending
    kept: int  # tokens of the timeline that the cache holds a snapshot of
    served: float  # what it had of the engine, in tokens made, counted from the least served request when it came
    generated: int = 0
    in_first_part: bool = True  # the end token of `Request.interruption` has not come yet

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the session does not have yet."""
        return max(0, len(self.ticket.request.prompt) - len(self.session))


class TimeSlices:
    """Fair shares of the engine: the next slice goes to the request that had least so far. A token of a prompt counts
    as the part of a made one that it usually takes."""

    def __init__(self, engine: Engine, cache: PrefixCache, others_wait: Callable[[], bool]) -> None:
        """Args:
        others_wait: whether requests wait outside, so that a long slice should end.
        """
        self.running: list[Running] = []
        self.prefilled = 0
        """Tokens of prompts that were read so far."""
        self.request_s = 1.0
        """Seconds that a request has taken from its start to its end, lately."""
        self._engine = engine
        self._cache = cache
        self._others_wait = others_wait
        self._token_s = SLICE_S / SLICE_TOKENS  # what a token takes, roughly
        self._prefill_s = PREFILL_S / PREFILL_TOKENS[0]  # the same of a prompt

    def start(self, ticket: Ticket) -> None:
        """Let a request take part."""
        ticket.started_at = time.perf_counter()
        request = ticket.request
        if request.sampling.seed is None:  # one seed for all slices
            seeded = dataclasses.replace(request.sampling, seed=secrets.randbits(64))
            ticket.request = request = dataclasses.replace(request, sampling=seeded)
        session = self._engine.new_session()
        snapshot, share = self._cache.find(request.prompt)
        if snapshot is not None:
            session.restore(snapshot)
            ticket.cached_tokens = min(len(snapshot.tokens), len(request.prompt) - 1)
        stops = {*request.boundaries, share} - {0}
        self.running.append(
            Running(
                ticket,
                session,
                sorted(stop for stop in stops if len(session) < stop <= len(request.prompt)),
                len(session),
                min((other.served for other in self.running), default=0.0),
            )
        )

    def step(self) -> None:
        """One slice for the request that had least; `running` must not be empty.

        A request whose turn fails ends with the error; the others go on.
        """
        turn = min(self.running, key=lambda running: running.served)
        made, read = turn.generated, turn.unread
        try:
            if turn.ticket.cancelled:
                self._end(turn, "cancelled")
            elif not self._prefill(turn):
                self._decode(turn)
        except NotEnoughMemory as error:
            # Snapshots are only there to save time. Without any left, this request cannot have its turn.
            if not self._cache.drop_oldest():
                self._drop(turn, "error", error)
        except OnekernelError as error:
            if turn.ticket.finish_reason is None:
                self._drop(turn, "error", error)
            else:  # the answer is complete, only its snapshot failed
                self._remove(turn)
        # Reckoned, not timed: a slice during which the machine did something else must not count against anybody.
        turn.served += turn.generated - made + (read - turn.unread) * min(1.0, self._prefill_s / self._token_s)

    def _prefill(self, turn: Running) -> bool:
        """Read a part of the prompt. Returns False if decoding can start at once.

        The last part is left to decoding, which reads it together with making the first token.
        """
        least, most = PREFILL_TOKENS
        part = min(max(int(PREFILL_S / self._prefill_s), least), most)
        stop = turn.stops[0] if turn.stops else None
        count = min(turn.unread, part, turn.unread if stop is None else stop - len(turn.session))
        started_at = time.perf_counter()
        turn.session.extend(turn.ticket.request.prompt[len(turn.session) :][:count])
        self.prefilled += count
        if not turn.unread and stop is None:
            return False
        turn.session.prefill()
        if count >= least:
            self._prefill_s += 0.5 * ((time.perf_counter() - started_at) / count - self._prefill_s)
        if stop == len(turn.session):
            turn.stops.pop(0)
            self._keep(turn)
        return turn.unread > 0

    def _decode(self, turn: Running) -> None:
        ticket, session, request = turn.ticket, turn.session, turn.ticket.request
        room = self._engine.max_context - len(session)
        left = room if request.max_tokens is None else min(request.max_tokens - turn.generated, room)
        alone = len(self.running) == 1 and not self._others_wait()
        count = min(left, ALONE_TOKENS if alone else max(1, min(int(SLICE_S / self._token_s), SLICE_TOKENS)))
        if turn.in_first_part and request.interruption is not None:
            count = min(count, max(1, request.interruption.after - turn.generated))
        stream = session.stream(request.sampling, count, request.stop_tokens, request.constraint, turn.generated)
        started_at, before = time.perf_counter(), turn.generated
        with closing(stream):
            for token in stream:
                self._push(turn, token)
                if ticket.cancelled or (alone and self._others_wait()):
                    break
        made = turn.generated - before
        if before and made:  # the first slice reads the rest of the prompt, too
            self._token_s += 0.5 * ((time.perf_counter() - started_at) / made - self._token_s)
        if ticket.cancelled:
            self._end(turn, "cancelled")
        elif session.finish_reason == "stop":
            self._end(turn, "stop")
        elif made == left:
            self._end(turn, "length")
        else:
            self._interrupt(turn)

    def _push(self, turn: Running, token: SampledToken) -> None:
        turn.generated += 1
        interruption = turn.ticket.request.interruption
        if interruption is not None and token.id == interruption.end:
            turn.in_first_part = False
        turn.ticket.push(token)

    def _interrupt(self, turn: Running) -> None:
        """Cut the first part of the answer short, if its time has come."""
        request = turn.ticket.request
        interruption = request.interruption
        if interruption is None or not turn.in_first_part or turn.generated < interruption.after:
            return
        turn.in_first_part = False
        room = self._engine.max_context - len(turn.session)
        left = room if request.max_tokens is None else min(room, request.max_tokens - turn.generated)
        if left <= len(interruption.insert):  # nothing could follow
            return
        turn.session.extend(interruption.insert)
        for token in interruption.insert:
            if request.constraint is not None:
                request.constraint.accept(token)
            self._push(turn, SampledToken(token))

    def _end(self, turn: Running, reason: str) -> None:
        """The orderly end: what was read and made may be the beginning of the next prompt."""
        turn.ticket.finish(reason)  # first: nobody waits for the snapshot
        self._keep(turn)
        self._remove(turn)

    def _keep(self, turn: Running) -> None:
        """Take a snapshot, if it spares enough."""
        if len(turn.session) - turn.kept < SNAPSHOT_TOKENS:
            return
        turn.kept = len(turn.session)
        try:
            self._cache.add(turn.session.snapshot())
        except NotEnoughMemory:
            self._cache.drop_oldest()

    def _drop(self, turn: Running, reason: str, error: OnekernelError | None = None) -> None:
        turn.ticket.finish(reason, error)
        self._remove(turn)

    def _remove(self, turn: Running) -> None:
        self.running.remove(turn)
        if turn.ticket.started_at is not None and turn.ticket.ended_at is not None:
            self.request_s += 0.2 * (turn.ticket.ended_at - turn.ticket.started_at - self.request_s)
