"""The probe kernels compile for every architecture, without spills. (What they measure needs a GPU.)"""

from __future__ import annotations

import pytest

from onekernel.gpu.compile import ARCHITECTURES, compile_source
from onekernel.gpu.probe import probe_source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_probe_compiles(arch: str) -> None:
    cubin, resources = compile_source(probe_source(arch), arch, "probe")
    assert resources.spill_stores == resources.spill_loads == 0
    for kernel in (b"fill", b"read_4", b"read_8", b"read_16", b"multiply"):
        assert kernel in cubin
    assert (b"multiply_group" in cubin) == (arch == "sm_90a")
