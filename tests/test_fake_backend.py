"""The fake backend predicts itself, and behaves like a real one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from onekernel.backend.base import Backend
from onekernel.backend.fake import CERTAIN, FakeBackend, default_next_token
from onekernel.errors import BackendError, InvalidRequest
from onekernel.sampling.params import SamplingParams

NEVER: frozenset[int] = frozenset()


def ids(backend: FakeBackend, state: object, tokens: list[int], count: int, **params: object) -> list[int]:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return [token.id for token in backend.generate(state, tokens, [], sampling, count, NEVER)]  # type: ignore[arg-type]


def predicted(tokens: list[int], count: int, vocabulary_size: int = 256) -> list[int]:
    timeline = list(tokens)
    for _ in range(count):
        timeline.append(default_next_token(timeline, vocabulary_size))
    return timeline[len(tokens) :]


def test_default_next_token() -> None:
    assert default_next_token([], 256) == 0
    assert default_next_token([3], 256) == 10
    assert default_next_token([3, 4], 256) == (31 * 10 + 4 + 7) % 256
    assert default_next_token([4, 3], 256) != default_next_token([3, 4], 256)


def test_generation_is_predictable() -> None:
    backend: Backend = FakeBackend()
    assert isinstance(backend, FakeBackend)
    state = backend.new_state()
    assert ids(backend, state, [1, 2, 3], 20) == predicted([1, 2, 3], 20)
    assert state.position == 22
    assert ids(backend, backend.new_state(), [1, 2, 3], 20, temperature=1, seed=5) == predicted([1, 2, 3], 20)


def test_a_script_of_ones_own() -> None:
    reply = [7, 8, 9]
    backend = FakeBackend(vocabulary_size=10, next_token=lambda consumed, size: reply[len(consumed) - 2])
    state = backend.new_state()
    tokens = backend.generate(state, [0, 1], [], SamplingParams(), 100, frozenset({9}))
    assert [token.id for token in tokens] == reply


def test_snapshot_restore_and_logits() -> None:
    backend = FakeBackend(vocabulary_size=50)
    state = backend.new_state()
    backend.prefill(state, [1, 2])
    snapshot = backend.snapshot(state)
    backend.prefill(state, [3])
    restored = backend.restore(snapshot)
    assert (state.position, restored.position) == (3, 2)
    backend.prefill(restored, [9])
    logits = backend.logits(backend.restore(snapshot), [3, 4])
    assert logits.shape == (2, 58)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == [default_next_token([1, 2, 3], 50), default_next_token([1, 2, 3, 4], 50)]
    assert logits.max() == CERTAIN


def test_limits() -> None:
    backend = FakeBackend(vocabulary_size=50, max_context=6)
    state = backend.new_state()
    with pytest.raises(InvalidRequest, match="holds 6"):
        backend.prefill(state, [1] * 7)
    with pytest.raises(InvalidRequest, match="token 58 does not exist"):
        backend.prefill(state, [58])
    assert len(ids(backend, state, [1, 2], 100)) == 5
    assert state.position == 6


def test_delay_and_close() -> None:
    backend = FakeBackend(delay=0.01)
    start = time.perf_counter()
    state = backend.new_state()
    assert len(ids(backend, state, [1], 5)) == 5
    assert time.perf_counter() - start >= 0.05
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.prefill(state, [1])
