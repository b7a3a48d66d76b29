"""Rounds: which requests move on together, and for how long. Continuous batching.

This is the inner loop of the scheduler: `start` takes a request in, `step` moves the running ones on, and those that
have ended leave `running`. Each round first reads a bounded part of the prompts of newcomers, then makes some tokens
for all that have read theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from onekernel.engine import Engine, run_together
from onekernel.errors import BackendError, NotEnoughMemory, OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.scheduler.prefix_cache import PrefixCache
from onekernel.scheduler.request import Ticket
from onekernel.scheduler.room import Room
from onekernel.scheduler.turn import Turn

DECODE_S = 0.025  # of one round while others wait for something else
LONG_STEPS = 256  # while nobody waits: each run costs the engine a new start. It ends when somebody comes.
LONG_S = 0.5  # and no longer, for a backend that cannot end a run early
QUIET_PREFILL_S = 0.1  # of one round without streams: cancelling and newcomers wait for so long
PREFILL_S = 0.025  # that streams may stand still in one round
OVERTIME = 1.25  # a further part is read if it is expected to end before so many times that
PREFILL_TOKENS = (32, 2048)  # least and most of one part of a prompt
SNAPSHOT_TOKENS = 32  # a snapshot is taken when so many tokens would otherwise be read again


class Rounds:
    """All that have read their prompt get a token a step. Of the time for prompts, who had least gets the next part; a
    token of a prompt counts as the part of a made one that it usually takes."""

    def __init__(
        self,
        engine: Engine,
        cache: PrefixCache,
        others_wait: Callable[[int], bool],
        deterministic: bool = False,
        patient: bool = False,
    ) -> None:
        """Args:
        others_wait: whether requests wait outside that could start if so many of the running ones had ended.
        deterministic: one request by itself runs as one of many, too.
        patient: streams may stand still for longer.
        """
        self.running: list[Turn] = []
        """In the order in which they came."""
        self.prefilled = 0
        """Tokens of prompts that were read so far."""
        self.request_s = 1.0
        """Seconds that a request has taken from its start to its end, lately."""
        self.room = Room(engine, cache)
        self._engine = engine
        self._cache = cache
        self._others_wait = others_wait
        self._deterministic = deterministic
        self._patient = patient
        self._step_s = DECODE_S / 4  # what a step takes, roughly
        self._prefill_s = PREFILL_S / PREFILL_TOKENS[0]  # the same of a token of a prompt
        self._slots = 1

    def warm_up(self, most_running: int) -> None:
        """Prepare what runs so many requests together, before there are any. May take long."""
        try:
            self._slots = self._engine.batch_slots(most_running)
        except BackendError:  # closed: each request will hear of it
            self._slots = 1

    def start(self, ticket: Ticket) -> None:
        """Let a request take part."""
        turn = Turn(self._engine, ticket, min((other.served for other in self.running), default=0.0))
        request = turn.request
        snapshot, share = self._cache.find(request.prompt)
        if snapshot is not None:
            turn.session.restore(snapshot)
            ticket.cached_tokens = min(len(snapshot.tokens), len(request.prompt) - 1)
        turn.keep_at((*request.boundaries, share))
        self.running.append(turn)

    def step(self) -> None:
        """One round; `running` must not be empty.

        A request that fails ends with the error; the others go on.
        """
        for turn in [turn for turn in self.running if turn.ticket.cancelled]:
            self._guarded(turn, partial(self._end, turn, "cancelled"))
        self.room.bring_back(self.running)
        self._read_prompts()
        ready = [turn for turn in self.running if not (turn.parked or turn.reads)]
        if len(ready) == 1 and len(self.running) == 1 and not self._deterministic:
            self._guarded(ready[0], partial(self._decode_alone, ready[0]))
        elif ready:
            if len(ready) > self._slots:
                ready = sorted(ready, key=lambda turn: (turn.request.priority, turn.served))[: self._slots]
            self._decode(ready)

    # ---- prompts ----

    def _read_prompts(self) -> None:
        """Read parts of prompts until the time for that is over, or all are read."""
        waiting = [turn for turn in self.running if turn.reads and not turn.parked]
        streams = any(turn.generated and not turn.parked for turn in self.running)
        most_s, spent = PREFILL_S if streams and not self._patient else QUIET_PREFILL_S, 0.0
        while waiting and spent < most_s:
            turn = min(waiting, key=lambda turn: (turn.request.priority, turn.served))
            before, started_at = turn.unread, time.perf_counter()
            least, most = PREFILL_TOKENS
            smallest = min(before, max(least, self._engine.prefill_cut))
            if spent and spent + smallest * self._prefill_s > OVERTIME * most_s:
                return
            part = min(max(int((most_s - spent) / self._prefill_s), least), most)
            self._guarded(turn, partial(self._read, turn, part))
            read = before - turn.unread
            left_to_the_run = 0 if self._engine.runs_ahead or turn.unread else read * self._prefill_s
            spent += max(time.perf_counter() - started_at, left_to_the_run)
            turn.served += read * min(1.0, self._prefill_s / self._step_s)
            waiting = [turn for turn in waiting if turn in self.running and turn.reads and not turn.parked]
            if not read:  # there was no memory
                return

    def _read(self, turn: Turn, part: int) -> None:
        """Read about so many tokens of the prompt.

        A backend that does not run ahead reads the last part together with making the first token, which is left to
        the first run then.
        """
        session, prompt, cut = turn.session, turn.request.prompt, self._engine.prefill_cut
        stop = turn.stops[0] if turn.stops else len(prompt)
        consumed = max(0, len(session) - 1)  # the last token stays pending
        goal = max((consumed + part) // cut, consumed // cut + 1) * cut
        count = min(goal + 1, stop) - len(session)
        started_at = time.perf_counter()
        session.extend(prompt[len(session) :][:count])
        self.prefilled += count
        if not (turn.reads or self._engine.runs_ahead):
            return
        session.prefill()
        self._prefill_timed(time.perf_counter() - started_at, count)
        if turn.stops and stop == len(session):
            turn.stops.pop(0)
            self._keep(turn)

    # ---- answers ----

    def _decode_alone(self, turn: Turn) -> None:
        """One request by itself, as anybody would stream a session."""
        session, request, left = turn.session, turn.request, turn.left
        waited = self._others_wait(0)  # it cannot start, then: it does not fit
        count = min(turn.allowance, self._steps(DECODE_S) if waited else LONG_STEPS)
        stream = session.stream(request.sampling, count, request.stop_tokens, request.constraint, turn.generated)
        started_at, before, last = time.perf_counter(), turn.generated, None
        pending = session.pending
        with closing(stream):
            for token in stream:
                if pending > 1:
                    self._prefill_timed(time.perf_counter() - started_at - self._step_s, pending)
                    pending = 0
                turn.push(token)
                last = token.id
                if turn.ticket.cancelled or (not waited and self._others_wait(0)):
                    break
        made = turn.generated - before
        if before and made:  # the first run reads the rest of the prompt, too
            self._timed((time.perf_counter() - started_at) / made)
        turn.served += made
        if turn.ticket.cancelled:
            self._end(turn, "cancelled")
        elif last in request.stop_tokens:
            self._end(turn, "stop")
        elif made == left:
            self._end(turn, "length")
        else:
            turn.interrupt()

    def _decode(self, turns: Sequence[Turn]) -> None:
        """Some steps for all of `turns`."""
        ended: list[Turn] = []
        left: dict[Turn, int] = {}
        for turn in turns:
            turn.member.max_tokens, turn.member.generated, left[turn] = turn.allowance, turn.generated, turn.left
        by_member = {turn.member: turn for turn in turns}
        others_wait = self._others_wait
        waited = others_wait(0) or any(turn not in left for turn in self.running)
        started_at = time.perf_counter()
        times: list[float] = []  # at which steps came
        pending = sum(turn.session.pending - 1 for turn in turns)

        def interrupted() -> bool:
            if any(turn.ticket.cancelled for turn in turns if turn.ticket.finish_reason is None):
                return True
            if waited and time.perf_counter() - started_at >= DECODE_S:
                return True
            return others_wait(len(ended)) and (not waited or bool(ended))

        run = run_together(
            self._engine, [turn.member for turn in turns], self._steps(DECODE_S if waited else LONG_S), interrupted
        )
        try:
            for step in run:
                times.append(time.perf_counter())
                for member, token in step:
                    turn = by_member[member]
                    left[turn] -= 1
                    turn.served += 1
                    if self._push(turn, token, left[turn]):
                        ended.append(turn)
        except NotEnoughMemory as error:
            if not self.room.make(self.running):
                self._drop(turns[-1], error)
            return
        except OnekernelError as error:
            for turn in turns:
                self._drop(turn, error)
            return
        if times:
            self._prefill_timed(times[0] - started_at - self._step_s, pending)
        if len(times) > 1:  # the first one reads the rest of prompts, too
            self._timed((times[-1] - times[0]) / (len(times) - 1))
        for turn in turns:
            if turn in ended:
                self._guarded(turn, partial(self._end, turn))
            elif turn.member.error is not None:
                self._drop(turn, turn.member.error)
            else:
                self._guarded(turn, turn.interrupt)

    def _push(self, turn: Turn, token: SampledToken, left: int) -> bool:
        """Hand out a token. Returns whether the answer ends with it: its reader hears of that at once."""
        if turn.ticket.finish_reason is not None:
            return False
        turn.push(token)
        if token.id in turn.request.stop_tokens:
            turn.ticket.finish("stop")
        elif not left:
            turn.ticket.finish("length")
        return turn.ticket.finish_reason is not None

    def _steps(self, seconds: float) -> int:
        """That take so long, roughly."""
        return max(1, min(int(seconds / self._step_s), LONG_STEPS))

    def _prefill_timed(self, seconds: float, tokens: int) -> None:
        """So many tokens of prompts took so long."""
        least, _ = PREFILL_TOKENS
        if tokens >= least:
            self._prefill_s += 0.5 * (max(seconds, 1e-6) / tokens - self._prefill_s)

    def _timed(self, seconds: float) -> None:
        """A step took so long."""
        self._step_s += 0.5 * (seconds - self._step_s)

    # ---- ends ----

    def _guarded(self, turn: Turn, work: Callable[[], None]) -> None:
        """Do something for one request; what fails is the affair of this one alone."""
        try:
            work()
        except NotEnoughMemory as error:
            if turn.ticket.finish_reason is not None:  # the answer is complete, only its snapshot failed
                self._remove(turn)
            elif not self.room.make(self.running):
                self._drop(turn, error)
        except OnekernelError as error:
            if turn.ticket.finish_reason is None:
                self._drop(turn, error)
            else:
                self._remove(turn)

    def _end(self, turn: Turn, reason: str | None = None) -> None:
        """The orderly end: what was read and made may be the beginning of the next prompt."""
        if reason is not None:
            turn.ticket.finish(reason)  # first: nobody waits for the snapshot
        if not turn.parked:
            self._keep(turn)
        self._remove(turn)

    def _keep(self, turn: Turn) -> None:
        """Take a snapshot, if it spares enough."""
        if len(turn.session) - turn.kept < SNAPSHOT_TOKENS:
            return
        turn.kept = len(turn.session)
        try:
            self._cache.add(turn.session.snapshot())
        except NotEnoughMemory:
            self._cache.drop_oldest()

    def _drop(self, turn: Turn, error: OnekernelError) -> None:
        turn.ticket.finish("error", error.with_traceback(None))  # its frames would keep the state alive
        self._remove(turn)

    def _remove(self, turn: Turn) -> None:
        if turn in self.running:
            self.running.remove(turn)
        self.room.gained()
        if turn.ticket.started_at is not None and turn.ticket.ended_at is not None:
            self.request_s += 0.2 * (turn.ticket.ended_at - turn.ticket.started_at - self.request_s)
