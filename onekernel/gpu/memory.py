"""Device buffers, and host memory that a running kernel can read and write."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from onekernel.gpu.driver import check


class DeviceBuffer:
    """Bytes on the GPU, freed with `free` or when the object goes. One of 0 bytes has no address (0)."""

    def __init__(self, nbytes: int) -> None:
        """Raises NotEnoughMemory if the GPU has no room for them."""
        from cuda.bindings import driver

        self.nbytes = nbytes
        self._pointer: Any = None
        if nbytes:
            self._pointer = check(driver.cuMemAlloc(nbytes))

    @classmethod
    def of(cls, array: np.ndarray) -> DeviceBuffer:
        buffer = cls(array.nbytes)
        buffer.write(array)
        return buffer

    @property
    def address(self) -> int:
        return int(self._pointer or 0)

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy a C-contiguous array to byte `offset`."""
        from cuda.bindings import driver

        assert array.flags.c_contiguous
        assert offset + array.nbytes <= self.nbytes
        if array.nbytes:
            check(driver.cuMemcpyHtoD(self.address + offset, array.ctypes.data, array.nbytes))
            _wait()  # the call returns when the bytes are staged, not when they are there

    def read(self, dtype: Any, count: int, offset: int = 0) -> np.ndarray:
        from cuda.bindings import driver

        array = np.empty(count, dtype)
        assert offset + array.nbytes <= self.nbytes
        if array.nbytes:
            check(driver.cuMemcpyDtoH(array.ctypes.data, self.address + offset, array.nbytes))
        return array

    def clear(self) -> None:
        """Fill with zeros."""
        from cuda.bindings import driver

        if self.nbytes:
            check(driver.cuMemsetD8(self.address, 0, self.nbytes))
            _wait()

    def free(self) -> None:
        from cuda.bindings import driver

        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            driver.cuMemFree(pointer)  # unchecked: a context that has failed cannot free, and need not

    def __del__(self) -> None:
        if not sys.is_finalizing():  # the process's end frees it anyway, and nothing can be imported any more
            self.free()


def copy_rows(source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
    """Copy `rows` rows of `width` bytes between device addresses, each with its own distance between rows."""
    from cuda.bindings import driver

    if not width or not rows:
        return
    if rows == 1 or source_pitch == target_pitch == width:
        check(driver.cuMemcpyDtoD(target, source, width * rows))
        _wait()
        return
    copy = driver.CUDA_MEMCPY2D()
    copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.srcPitch = source, source_pitch
    copy.dstDevice, copy.dstPitch = target, target_pitch
    copy.WidthInBytes, copy.Height = width, rows
    check(driver.cuMemcpy2DUnaligned(copy))
    _wait()


def _wait() -> None:
    """Until what was started on the default stream is done: kernels run on another stream, which does not wait."""
    from cuda.bindings import driver

    check(driver.cuStreamSynchronize(0))


class MappedMemory:
    """Words of host memory at an address that the GPU can use, too."""

    def __init__(self, words: int) -> None:
        from cuda.bindings import driver

        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        self._pointer = check(driver.cuMemHostAlloc(8 * words, flags))
        self.address = int(check(driver.cuMemHostGetDevicePointer(self._pointer, 0)))
        view = (ctypes.c_uint64 * words).from_address(int(self._pointer))
        self.words: np.ndarray = np.ctypeslib.as_array(view)
        self.words[:] = 0

    def free(self) -> None:
        from cuda.bindings import driver

        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self.words = np.zeros(0, np.uint64)
            driver.cuMemFreeHost(pointer)
