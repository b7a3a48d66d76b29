"""BufferPool: memory goes from one owner to the next without the driver. The driver is made up."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from onekernel.errors import NotEnoughMemory
from onekernel.gpu.pool import GRAIN, MOST_KEPT, BufferPool

if sys.platform == "darwin":
    pytest.skip("NVIDIA publishes no packages for macOS", allow_module_level=True)
from cuda.bindings import driver

SUCCESS = driver.CUresult.CUDA_SUCCESS


class Memory:
    """A GPU with `room` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.taken, self.calls, self.next = room, {}, 0, 1 << 32
        monkeypatch.setattr(driver, "cuMemAlloc", self.alloc)
        monkeypatch.setattr(driver, "cuMemFree", self.release)
        monkeypatch.setattr(driver, "cuGetErrorName", lambda status: (SUCCESS, status.name.encode()))
        monkeypatch.setattr(driver, "cuGetErrorString", lambda _: (SUCCESS, b"no memory"))

    def alloc(self, nbytes: int):
        self.calls += 1
        if sum(self.taken.values()) + nbytes > self.room:
            return driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        self.next += 1 << 30
        self.taken[self.next] = nbytes
        return SUCCESS, self.next

    def release(self, pointer: int):
        del self.taken[pointer]
        return (SUCCESS,)


def test_freed_memory_is_taken_again_for_about_the_same_size(monkeypatch) -> None:
    memory, pool = Memory(monkeypatch, 1 << 40), BufferPool(1 << 30)
    first = pool.take(100 << 20)
    address = first.address
    first.free()
    first.free()  # twice is once
    assert pool.spare == 100 << 20
    second = pool.take(90 << 20)
    assert (second.address, second.nbytes, pool.spare, memory.calls) == (address, 90 << 20, 0, 1)
    second.free()
    assert pool.take(101 << 20).address != address  # too small
    assert pool.take(50 << 20).address != address  # far too large


def test_the_smallest_that_fits_is_taken(monkeypatch) -> None:
    Memory(monkeypatch, 1 << 40)
    pool = BufferPool(1 << 30)
    buffers = [pool.take(size << 20) for size in (120, 100, 110)]
    wanted = buffers[1].address
    for buffer in buffers:
        buffer.free()
    assert pool.take(99 << 20).address == wanted


def test_a_buffer_that_nobody_holds_goes_back_from_any_thread(monkeypatch) -> None:
    memory, pool = Memory(monkeypatch, 1 << 40), BufferPool(1 << 30)
    held = [pool.take(10 << 20)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert pool.spare == 10 << 20
    kept = pool.take(10 << 20)
    assert memory.calls == 1
    assert kept.nbytes == 10 << 20


def test_no_more_is_kept_than_allowed_and_nothing_after_the_end(monkeypatch) -> None:
    memory, pool = Memory(monkeypatch, 1 << 40), BufferPool(5 * GRAIN)
    buffers = [pool.take(3 * GRAIN) for _ in range(3)]
    buffers[0].free()
    buffers[1].free()
    assert pool.spare == 3 * GRAIN
    assert len(memory.taken) == 2
    pool.close()
    buffers[2].free()
    assert (pool.spare, memory.taken) == (0, {})


def test_what_is_kept_never_keeps_others_from_memory(monkeypatch) -> None:
    Memory(monkeypatch, 10 * GRAIN)
    pool = BufferPool(10 * GRAIN)
    pool.take(6 * GRAIN).free()
    whole = pool.take(10 * GRAIN)
    assert pool.spare == 0
    with pytest.raises(NotEnoughMemory):
        pool.take(GRAIN)
    whole.free()


def test_few_buffers_are_kept_however_small(monkeypatch) -> None:
    memory, pool = Memory(monkeypatch, 1 << 40), BufferPool(1 << 40)
    for buffer in [pool.take(GRAIN) for _ in range(20)]:
        buffer.free()
    assert len(memory.taken) == MOST_KEPT
