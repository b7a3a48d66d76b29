"""Engine: a loaded model on a backend, shared by any number of sessions and threads. It knows token ids only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from onekernel.backend.base import Backend
from onekernel.checkpoint.shape import Shape
from onekernel.engine.session import Session
from onekernel.engine.turns import Turns
from onekernel.errors import BackendError


class Engine:
    """A model ready to run. One session runs at a time; the others wait for their turn.

    Use it as a context manager, or call `close`, to give the backend's memory back.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turns = Turns()
        self._closed = False
        self.name = backend.name
        self.shape: Shape = backend.shape
        self.max_context = backend.max_context
        """Tokens that one session can hold."""

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

    def close(self) -> None:
        """Free the backend, once the session that is running has ended. Safe to call twice."""
        with self._turns.take():
            self._closed = True
            self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
