"""Turns: one thread at a time may use the backend; the others wait, and a waiting one can be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from onekernel.errors import InvalidRequest

LOOK_S = 0.02  # how often one that waits looks at its cancel flag


class CancelledWaiting(Exception):
    """The cancel flag was set before the turn came. Internal to the engine."""


class Turns:
    """A lock that notices the two ways in which a plain one would wait forever or for too long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def take(self, cancelled: threading.Event | None = None) -> Iterator[None]:
        """Wait for the turn and hold it.

        Raises:
            CancelledWaiting: `cancelled` was set before the turn came.
            InvalidRequest: this thread holds the turn itself, in an unfinished stream: it would wait forever.
        """
        while not self._lock.acquire(timeout=LOOK_S):
            if self._owner == threading.get_ident():
                raise InvalidRequest(
                    "another stream of this model is unfinished in this thread: exhaust or close it first"
                )
            if cancelled is not None and cancelled.is_set():
                raise CancelledWaiting
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()
