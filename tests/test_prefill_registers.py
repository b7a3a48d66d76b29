"""Registers that the asker of the prefill kernel gives away are gone: its code must not name them (`setmaxnreg`).

The compiler does not check that. Where it kept a value of before in one of them, the kernel works with rubbish.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_code import disassembler, registers_behind_dealloc

from onekernel.checkpoint.sizes import SIZES
from onekernel.gpu.compile import compile_source
from onekernel.gpu.layout import Layout
from onekernel.gpu.prefill_layout import PrefillLayout
from onekernel.gpu.prefiller import prefill_source

pytest.importorskip("cuda.core")
H200 = (132, 232448)  # SMs, bytes of shared memory a block may use


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm")
@pytest.mark.parametrize("narrow", [False, True])
def test_no_register_that_was_given_away_is_used(narrow: bool, tmp_path: Path) -> None:
    plan = PrefillLayout.plan(Layout.plan(SIZES["0.8b"], 248077, *H200), *H200, "sm_90a", narrow)
    assert plan is not None
    file = tmp_path / "prefill.cubin"
    file.write_bytes(compile_source(prefill_source(plan), "sm_90a", "prefill")[0])
    found = registers_behind_dealloc(file)
    assert found
    assert all(0 < used <= left for left, used in found), found
