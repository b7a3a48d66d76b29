"""Session: one token timeline on a loaded model. It can be extended, continued, copied and cancelled."""

from __future__ import annotations

import dataclasses
import operator
import secrets
import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onekernel.backend.base import Backend
from onekernel.engine.turns import CancelledWaiting
from onekernel.errors import InvalidRequest
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams

if TYPE_CHECKING:
    from onekernel.engine.engine import Engine


# A lost state is rebuilt from a snapshot: reading so many tokens again takes as long as taking some.
ANCHOR_TOKENS = 256


@dataclass(frozen=True)
class Snapshot:
    """A copy of a session at one moment; `Session.restore` returns to it as often as needed."""

    tokens: tuple[int, ...]
    state: Any  # of the backend, which has consumed a prefix of `tokens`


class Session:
    """One token timeline, made by `Engine.new_session`.

    The timeline is always exactly `tokens`. The backend has consumed a prefix of it; the rest is pending and is
    consumed when something needs it. At least the last token stays pending, because a backend samples the next token
    while it consumes the one before.

    A session is used from one thread at a time, but for `cancel`, which any thread may call.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens: list[int] = []
        # The backend's state, or None while it is to be rebuilt from `_anchor`, a snapshot of a prefix of the timeline.
        self._state: Any = None
        self._anchor: Snapshot | None = None
        self._cancelled = threading.Event()
        self._streaming = False
        self.finish_reason: str | None = None
        """Why the last stream ended: "stop" (a stop token), "length" or "cancelled" (also when closed early)."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the timeline: what was extended and what was generated."""
        return tuple(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append `tokens` to the timeline. They are consumed later, together with what follows.

        Raises:
            InvalidRequest: a token id is outside the vocabulary, the timeline would not fit into the context, or a
                stream of this session is running. Nothing is appended then.
        """
        self._require_idle()
        new = [operator.index(token) for token in tokens]
        vocabulary = self._engine.shape.vocab
        for token in new:
            if not 0 <= token < vocabulary:
                raise InvalidRequest(f"token id {token} is outside the vocabulary of {vocabulary} tokens")
        length, limit = len(self._tokens) + len(new), self._engine.max_context
        if length > limit:
            raise InvalidRequest(
                f"{length} tokens do not fit into the context of {limit}: shorten the prompt or raise max_context"
            )
        self._tokens += new

    def prefill(self) -> None:
        """Consume the pending tokens now, but for the last, so that what follows starts at once."""
        self._require_idle()
        self._cancelled.clear()
        with self._engine.exclusive() as backend:
            self._consume(backend)

    def stream(
        self,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop_tokens: Iterable[int] = (),
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> Generator[SampledToken, None, None]:
        """Continue the timeline: an iterator over the new tokens, each given out as it is made.

        Args:
            sampling: how tokens are chosen; None is greedy. A seed of None takes a fresh one.
            max_tokens: at most so many tokens, and never more than the context has room for; None: all the room.
            stop_tokens: the stream ends after yielding one of these.
            constraint: only what it allows is sampled.
            generated: so many tokens at the end of the timeline belong to the answer that this stream continues:
                presence_penalty and frequency_penalty count them.

        The engine is held from the first `next` until the iterator ends or is closed; closing early is cheap, and
        the timeline then ends with the last token that was yielded. `finish_reason` tells why the stream ended.

        Raises:
            InvalidRequest: max_tokens < 1, an empty timeline, no room in the context, or a stream already running.
            BackendError: (while iterating) the backend failed. The session survives: its state is rebuilt on next use.
        """
        self._require_idle()
        room = self._engine.max_context - len(self._tokens)
        if not self._tokens:
            raise InvalidRequest("the prompt is empty: at least one token is needed to continue from")
        if room < 1:
            raise InvalidRequest(
                f"the prompt of {len(self._tokens)} tokens fills the context of {self._engine.max_context}: "
                "shorten it or raise max_context"
            )
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"max_tokens = {max_tokens} must be at least 1")
        sampling = sampling or SamplingParams()
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        limit = room if max_tokens is None else min(max_tokens, room)
        # From here on, not from the first `next` on: a cancel between the two must not be lost.
        self._cancelled.clear()
        self.finish_reason = None
        return self._stream(sampling, limit, frozenset(stop_tokens), constraint, generated)

    def generate(
        self,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop_tokens: Iterable[int] = (),
    ) -> list[SampledToken]:
        """All tokens of `stream` at once."""
        return list(self.stream(sampling, max_tokens, stop_tokens))

    def cancel(self) -> None:
        """End the running stream or prefill after at most one more token (or one chunk of the prompt).

        Any thread may call this. A stream that has been asked for but not started yet ends without a token.
        """
        self._cancelled.set()

    def snapshot(self) -> Snapshot:
        """A copy of the session as it is now; the pending tokens but the last are consumed first."""
        self._require_idle()
        self._cancelled.clear()
        with self._engine.exclusive() as backend:
            self._consume(backend)
            return Snapshot(self.tokens, backend.snapshot(self._ready(backend)))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`, of this session or of another one of the same engine."""
        self._require_idle()
        self._tokens = list(snapshot.tokens)
        self._anchor, self._state = snapshot, None

    def logits(self) -> np.ndarray:
        """float32 logits [vocab] of the token that would come next; the timeline stays as it is."""
        self._require_idle()
        if not self._tokens:
            raise InvalidRequest("the prompt is empty: at least one token is needed to continue from")
        self._cancelled.clear()
        with self._engine.exclusive() as backend:
            self._consume(backend)
            # A copy does the work: it consumes the last token, which has to stay pending in the session.
            state = backend.restore(backend.snapshot(self._ready(backend)))
            rows = backend.logits(state, self._tokens[state.position :])
            return np.asarray(rows[-1], dtype=np.float32)

    def park(self) -> None:
        """Move the state into host memory until the session is used again: it takes no memory of the backend then."""
        self._require_idle()
        with self._engine.exclusive() as backend:
            if self._state is not None:
                state, self._state = self._state, None
                self._anchor = Snapshot(tuple(self._tokens[: state.position]), backend.park(state))

    @property
    def holds_state(self) -> bool:
        """Whether the session has a state of its own on the backend."""
        return self._state is not None

    @property
    def pending(self) -> int:
        """Tokens of the timeline that are not consumed yet, as far as can be told without asking the backend."""
        if self._state is not None:
            return len(self._tokens) - int(self._state.position)
        return len(self._tokens) - max(0, self._anchored - 1)

    # ---- for together.py: runs of many sessions ----

    def ready(self, backend: Backend) -> tuple[Any, list[int]]:
        """(the state, the pending tokens: at least one). Raises NotEnoughMemory if the state is to be brought back."""
        self._require_idle()
        self._cancelled.clear()
        self._consume(backend, keep=1 if backend.runs_ahead else backend.prefill_chunk)
        state = self._ready(backend)
        return state, self._tokens[state.position :]

    def lend(self) -> None:
        """A run has the state. Until it is kept again, nobody can vouch for it."""
        self._state = self._anchor = None

    def append(self, token: SampledToken) -> None:
        """The run made a token."""
        self._tokens.append(token.id)

    def keep(self, state: Any) -> None:
        """The run has ended in good order."""
        self._state = state

    def _stream(
        self,
        sampling: SamplingParams,
        limit: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None,
        generated: int,
    ) -> Generator[SampledToken, None, None]:
        self._require_idle()
        self._streaming = True
        self.finish_reason = "cancelled"
        try:
            with self._engine.exclusive(self._cancelled) as backend:
                self._consume(backend, keep=1 if backend.runs_ahead else backend.prefill_chunk)
                state = self._ready(backend)
                if self._cancelled.is_set():
                    return
                if backend.runs_ahead and state.position - self._anchored >= ANCHOR_TOKENS:
                    self._anchor = Snapshot(tuple(self._tokens[: state.position]), backend.snapshot(state))
                history, pending = self._tokens[: state.position], self._tokens[state.position :]
                made = backend.generate(
                    state, pending, history, sampling, limit, stop_tokens, constraint=constraint, generated=generated
                )
                yield from self._continue(state, made, stop_tokens)
        except CancelledWaiting:
            return
        finally:
            self._streaming = False

    def _continue(
        self, state: Any, made: Generator[SampledToken, None, None], stop_tokens: frozenset[int]
    ) -> Generator[SampledToken, None, None]:
        """Pass on what the backend makes, and keep account of it."""
        # An exception in the backend (ctrl-C too) leaves a state that nobody can vouch for: it is taken back only
        # after an orderly end.
        self._state = None
        with closing(made):
            for token in made:
                self._tokens.append(token.id)
                try:
                    yield token
                except GeneratorExit:
                    made.close()
                    self._take_back(state)
                    raise
                if token.id in stop_tokens:
                    self.finish_reason = "stop"
                elif self._cancelled.is_set():
                    break
            else:
                if self.finish_reason != "stop":
                    self.finish_reason = "length"
        self._take_back(state)

    def _take_back(self, state: Any) -> None:
        """Keep the state after a stream, unless the backend ran ahead of what was yielded."""
        self._state = state if state.position < len(self._tokens) else None

    def _consume(self, backend: Backend, keep: int = 1) -> None:
        """Prefill until at most `keep` tokens are pending, or until cancelled."""
        state = self._ready(backend)
        while (pending := len(self._tokens) - state.position) > keep and not self._cancelled.is_set():
            self._state = None  # until the backend has returned in good order
            backend.prefill(state, self._tokens[state.position :][: min(backend.prefill_chunk, pending - 1)])
            self._state = state

    def _ready(self, backend: Backend) -> Any:
        """The state, rebuilt from the last snapshot (or from nothing) if it was lost."""
        if self._state is None:
            self._state = backend.restore(self._anchor.state) if self._anchor else backend.new_state()
        return self._state

    @property
    def _anchored(self) -> int:
        """Tokens that need not be read again to rebuild the state."""
        return len(self._anchor.tokens) if self._anchor else 0

    def _require_idle(self) -> None:
        if self._streaming:
            raise InvalidRequest("the session is streaming: exhaust or close that stream first")
