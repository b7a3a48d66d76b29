"""Engine: a loaded model on a backend, shared by any number of sessions and threads. It knows token ids only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from onekernel.backend.base import Backend
from onekernel.backend.batch import Batch
from onekernel.checkpoint.shape import Shape
from onekernel.engine.session import Session
from onekernel.engine.turns import Turns
from onekernel.errors import BackendError

LOOP_SLOTS = 256  # of a backend that serves its rows in turn


class Engine:
    """A model ready to run. One session, or one batch of them, runs at a time; the others wait for their turn.

    Use it as a context manager, or call `close`, to give the backend's memory back.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turns = Turns()
        self._closed = False
        self._batch: Batch | None = None
        self.name = backend.name
        self.shape: Shape = backend.shape
        self.max_context = backend.max_context
        """Tokens that one session can hold."""
        self.prefill_cut = backend.prefill_cut
        self.runs_ahead = backend.runs_ahead
        self.most_slots = backend.most_slots
        """Sequences that one step serves at about the price of one; 1: they take turns."""

    def new_session(self) -> Session:
        """An empty timeline."""
        return Session(self)

    @contextmanager
    def exclusive(self, cancelled: threading.Event | None = None) -> Iterator[Backend]:
        """The backend, for this thread alone. See `Turns.take` for the errors.

        Raises:
            BackendError: the engine is closed.
        """
        with self._turns.take(cancelled):
            if self._closed:
                raise BackendError("the model is closed: load it again")
            yield self._backend

    def batch(self, backend: Backend, wanted: int) -> Batch:
        """What runs up to `wanted` sessions together, if so many can, for who holds the backend. May take long when it
        is made: the first time, and when more are wanted than before."""
        slots = min(wanted, backend.most_slots) if backend.most_slots > 1 else LOOP_SLOTS
        if self._batch is None or self._batch.slots < slots:
            if self._batch is not None:
                self._batch.close()
                self._batch = None
            self._batch = backend.batch(slots)
        return self._batch

    def batch_slots(self, wanted: int) -> int:
        """Sessions that `run_together` takes at most, of those that are wanted. Prepares it, which may take long.

        Raises:
            BackendError: the engine is closed.
        """
        with self.exclusive() as backend:
            return self.batch(backend, wanted).slots

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the backend's memory that a session of so many tokens takes."""
        return self._backend.state_bytes(tokens)

    def memory_free(self) -> int | None:
        """Bytes that the backend has for new sessions; None if the system does not tell. Waits for nobody."""
        with contextlib.suppress(BackendError):  # closed
            return self._backend.memory_free()
        return None

    def close(self) -> None:
        """Free the backend, once the session that is running has ended. Safe to call twice."""
        with self._turns.take():
            self._closed = True
            if self._batch is not None:
                self._batch.close()
            self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
