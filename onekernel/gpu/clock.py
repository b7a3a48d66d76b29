"""LaunchClock: how long launches took, by the GPU's own clock."""

from __future__ import annotations

from collections import deque
from typing import Any

from onekernel.gpu.driver import check

MOST_PENDING = 8  # launches whose time has not been read yet


class LaunchClock:
    """Sums the time between two events, recorded before and after each launch on one stream.

    Nothing here waits for the GPU while a launch runs: times are read when they are asked for, or many launches later.
    The first event is recorded by an idle GPU a few microseconds before the launch reaches it, so that the sum is
    rather too long than too short.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._free: list[tuple[Any, Any]] = []
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0
        self.launches = 0

    def begin(self) -> None:
        """Just before a launch; `end` must follow it."""
        from cuda.bindings import driver

        if len(self._pending) >= MOST_PENDING:
            self._read_oldest()
        pair = self._free.pop() if self._free else (check(driver.cuEventCreate(0)), check(driver.cuEventCreate(0)))
        self._pending.append(pair)
        check(driver.cuEventRecord(pair[0], self._stream))

    def end(self) -> None:
        """Just after it."""
        from cuda.bindings import driver

        check(driver.cuEventRecord(self._pending[-1][1], self._stream))
        self.launches += 1

    @property
    def seconds(self) -> float:
        """Of all launches so far. Waits for the last of them.

        Raises:
            BackendError: a launch has failed.
        """
        while self._pending:
            self._read_oldest()
        return self._seconds

    def _read_oldest(self) -> None:
        from cuda.bindings import driver

        begin, end = pair = self._pending[0]
        check(driver.cuEventSynchronize(end))
        self._seconds += float(check(driver.cuEventElapsedTime(begin, end))) / 1e3
        self._pending.popleft()
        self._free.append(pair)

    def close(self) -> None:
        from cuda.bindings import driver

        for pair in (*self._free, *self._pending):
            for event in pair:
                driver.cuEventDestroy(event)  # unchecked: a context that has failed cannot free, and need not
        self._free, self._pending = [], deque()
