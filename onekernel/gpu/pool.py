"""BufferPool: freed buffers are kept for the next of about their size.

The driver takes about half a millisecond to find memory for a state and as long to take it back, and an answer needs a
state and a snapshot: more time than its prompt may take.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from onekernel.errors import NotEnoughMemory
from onekernel.gpu.memory import DeviceBuffer

GRAIN = 2 << 20  # bytes: buffers have multiples of it
MOST_KEPT = 4  # buffers: a state and a snapshot, and those of the answer before
SLACK = 4  # a kept buffer may be larger than asked for by one part in SLACK


class BufferPool:
    """Buffers of one GPU, each used for one thing after another. They count as free memory: see `spare`."""

    def __init__(self, most: int) -> None:
        """Args:
        most: bytes that are kept at most.
        """
        self._most = most
        self._kept: list[tuple[int, Any]] = []  # bytes, pointer
        self._returned: deque[tuple[int, Any]] = deque()  # by whatever thread had a buffer last
        self._closed = False

    @property
    def spare(self) -> int:
        """Bytes that are kept and could be freed."""
        return sum(nbytes for nbytes, _ in (*self._kept, *self._returned))

    def has(self, nbytes: int) -> bool:
        """Whether `take` would need nothing of the driver."""
        self._collect()
        return any(_fits(nbytes, size) for size, _ in self._kept)

    def take(self, nbytes: int) -> DeviceBuffer:
        """A buffer of `nbytes`, with anything in it. Raises NotEnoughMemory; nothing is kept any more then."""
        self._collect()
        for i, (size, pointer) in enumerate(self._kept):  # the smallest first
            if _fits(nbytes, size):
                del self._kept[i]
                return PooledBuffer(nbytes, size, pointer, self._give)
        size = -(-max(1, nbytes) // GRAIN) * GRAIN
        try:
            return PooledBuffer(nbytes, size, None, self._give)
        except NotEnoughMemory:
            self.clear()
            return PooledBuffer(nbytes, size, None, self._give)

    def _collect(self) -> None:
        while self._returned:
            self._kept.append(self._returned.popleft())
        self._kept.sort(key=lambda one: one[0])

    def _give(self, size: int, pointer: Any) -> bool:
        """Keep a buffer that is not used any more; any thread. Returns False if there is no room for it."""
        if self._closed or self.spare + size > self._most or len(self._kept) + len(self._returned) >= MOST_KEPT:
            return False
        self._returned.append((size, pointer))
        return True

    def clear(self) -> None:
        """Free what is kept."""
        from cuda.bindings import driver

        self._collect()
        while self._kept:
            driver.cuMemFree(self._kept.pop()[1])  # unchecked, as DeviceBuffer.free

    def close(self) -> None:
        """Free what is kept, now and from now on."""
        self._closed = True
        self.clear()


def _fits(nbytes: int, size: int) -> bool:
    return nbytes <= size <= nbytes + nbytes // SLACK + GRAIN


class PooledBuffer(DeviceBuffer):
    """A buffer that goes back to its pool."""

    def __init__(self, nbytes: int, size: int, pointer: Any, give: Callable[[int, Any], bool]) -> None:
        """Args:
        size: bytes that there are in truth.
        pointer: to memory of `size` bytes; None takes new memory. Raises NotEnoughMemory.
        give: is offered the memory in the end.
        """
        if pointer is None:
            super().__init__(size)
        else:
            self._pointer = pointer
        self.nbytes, self._size, self._give = nbytes, size, give

    def free(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None and not self._give(self._size, pointer):
            self._pointer = pointer
            super().free()

    def __del__(self) -> None:
        if not sys.is_finalizing() and getattr(self, "_pointer", None) is not None:
            self.free()
