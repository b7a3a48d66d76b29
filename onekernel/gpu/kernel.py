"""A compiled kernel, loaded and ready to launch cooperatively: all its blocks are resident at once."""

from __future__ import annotations

import ctypes
from typing import Any

from onekernel.errors import BackendError
from onekernel.gpu.compile import compile_cached
from onekernel.gpu.device import Gpu
from onekernel.gpu.driver import check
from onekernel.gpu.layout import DecodeArguments, Layout, enums
from onekernel.gpu.source import assemble


def decode_source(layout: Layout) -> str:
    return assemble("decode.cu", layout.constants(), f"{enums()}\n{DecodeArguments.source()}")


class CooperativeKernel:
    """One kernel on one GPU. Its source defines `shared_bytes` and the threads a block; its argument is one struct."""

    def __init__(self, gpu: Gpu, name: str, source: str, blocks: int, threads: str = "threads") -> None:
        """Compile (or take from the cache) and load.

        Args:
            threads: what the source calls their number.

        Raises:
            BackendError: it does not compile, or its blocks do not fit on the GPU together.
        """
        from cuda.bindings import driver

        self.blocks = blocks
        self._module = check(driver.cuModuleLoadData(compile_cached(source, gpu.arch, name)))
        self._function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        self.shared_bytes = self._constant(b"shared_bytes")
        self.threads = self._constant(threads.encode())
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, attribute, self.shared_bytes))
        resident = check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, self.threads, self.shared_bytes)
        )
        if resident * gpu.sm_count < self.blocks:
            raise BackendError(
                f"the {name} kernel's {self.blocks} blocks do not fit on {gpu.name} together "
                f"({resident} on each of {gpu.sm_count} SMs); use the backend cpu and report this"
            )

    def launch(self, arguments: ctypes.Structure, stream: Any) -> None:
        """Start one launch; the struct is copied before this returns."""
        from cuda.bindings import driver

        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        check(
            driver.cuLaunchCooperativeKernel(
                *(self._function, self.blocks, 1, 1, self.threads, 1, 1),
                *(self.shared_bytes, stream, ctypes.addressof(pointers)),
            )
        )

    def _constant(self, name: bytes) -> int:
        """A number that the kernel's source defines."""
        from cuda.bindings import driver

        address, size = check(driver.cuModuleGetGlobal(self._module, name))
        value = ctypes.c_int()
        check(driver.cuMemcpyDtoH(ctypes.addressof(value), address, size))
        return value.value

    def unload(self) -> None:
        from cuda.bindings import driver

        driver.cuModuleUnload(self._module)


class DecodeKernel(CooperativeKernel):
    """The decode kernel of one layout."""

    def __init__(self, gpu: Gpu, layout: Layout) -> None:
        """Raises: see CooperativeKernel."""
        super().__init__(gpu, "decode", decode_source(layout), layout.blocks)
