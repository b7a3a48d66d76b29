"""Room: what fits into the backend's memory, and who waits in host memory when it does not."""

from __future__ import annotations

from collections.abc import Sequence

from onekernel.engine import Engine
from onekernel.scheduler.prefix_cache import PrefixCache
from onekernel.scheduler.request import Request
from onekernel.scheduler.turn import Turn

AHEAD_TOKENS = 256  # of an answer, for which there must be room before it starts or goes on


class Room:
    """Lets requests in as long as there is memory for them, and parks the newest when it runs out all the same."""

    def __init__(self, engine: Engine, cache: PrefixCache) -> None:
        self._engine = engine
        self._cache = cache
        self._gained = False  # memory has become free since the last one was parked

    def fits(self, request: Request, running: Sequence[Turn]) -> bool:
        """Whether a request may start beside those that run. Snapshots are dropped for it."""
        if not running:
            return True
        if any(turn.parked for turn in running):
            return False
        promised = sum(self._needed(turn.request) for turn in running if not turn.session.holds_state)
        return self._has(promised + self._needed(request))

    def make(self, running: Sequence[Turn]) -> bool:
        """After NotEnoughMemory: free some, by dropping a snapshot or else by parking. Returns whether that helped."""
        # Snapshots are only there to save time.
        if self._cache.drop_oldest():
            return True
        active = [turn for turn in running if not turn.parked]
        if len(active) < 2:
            return False
        newest = max(active, key=lambda turn: (turn.request.priority, running.index(turn)))
        newest.session.park()
        newest.parked = True
        self._gained = False
        return True

    def gained(self) -> None:
        """A request has ended."""
        self._gained = True

    def bring_back(self, running: Sequence[Turn]) -> None:
        """Let the oldest of those parked go on if there is room again."""
        parked = [turn for turn in running if turn.parked]
        if not parked:
            return
        first = min(parked, key=lambda turn: turn.request.priority)  # of equals the first to come
        alone = len(parked) == len(running)
        coming = any(not (turn.parked or turn.session.holds_state) for turn in running)  # has not taken its room yet
        needed = self._engine.state_bytes(min(len(first.session) + AHEAD_TOKENS, self._engine.max_context))
        if alone or (self._gained and not coming and self._has(needed)):
            first.parked = False

    def _needed(self, request: Request) -> int:
        answer = AHEAD_TOKENS if request.max_tokens is None else min(request.max_tokens, AHEAD_TOKENS)
        return self._engine.state_bytes(min(len(request.prompt) + answer, self._engine.max_context))

    def _has(self, nbytes: int) -> bool:
        while True:
            free = self._engine.memory_free()
            if free is None or free >= nbytes:
                return True
            if not self._cache.drop_oldest():
                return False
