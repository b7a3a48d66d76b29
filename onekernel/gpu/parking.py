"""Parking: the bytes of a state that count, moved to host memory and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.gpu.decoder import FIRST_CAPACITY, Decoder, State, cache_rows, recurrent_bytes
from onekernel.gpu.memory import DeviceBuffer


@dataclass(frozen=True)
class Parked:
    """A state in host memory: uint8 parts, in the order of `_parts`."""

    parts: list[np.ndarray]
    position: int


def park(decoder: Decoder, state: State) -> Parked:
    """Copy a state to the host, then free its GPU memory. Takes no GPU memory itself."""
    parts = [
        state.buffer.read(np.uint8, nbytes, offset)
        for offset, nbytes in _parts(decoder.shape, state.position, state.capacity)
    ]
    state.buffer.free()
    state.buffer, state.capacity = DeviceBuffer(0), 0
    return Parked(parts, state.position)


def unpark(decoder: Decoder, parked: Parked) -> State:
    """A new state on the GPU, the same bit for bit. Raises NotEnoughMemory."""
    state = State(DeviceBuffer(0), 0)
    decoder.reserve(state, max(FIRST_CAPACITY, parked.position))
    state.position = parked.position
    places = _parts(decoder.shape, state.position, state.capacity)
    for part, (offset, _) in zip(parked.parts, places, strict=True):
        state.buffer.write(part, offset)
    return state


def _parts(shape: Shape, positions: int, capacity: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what a state of this capacity holds after so many tokens: see decoder.State."""
    fixed = recurrent_bytes(shape)
    yield 0, fixed
    rows, row = cache_rows(shape)
    for i in range(rows):
        yield fixed + i * capacity * row, positions * row
