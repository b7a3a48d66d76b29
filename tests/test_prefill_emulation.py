"""The prefill kernel, run on the CPU by the emulation in tests/emulation, against the float32 reference.

It shows what indices, barriers and arithmetic do, on the path of sm_90a and on the portable one; races and the rules of
the hardware are for the tests on a GPU.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent / "gpu"), str(Path(__file__).parent / "emulation")]

import small_shape  # noqa: E402
from emulate import Emulated  # noqa: E402
from random_model import random_weights  # noqa: E402

from onekernel.checkpoint.shape import FULL, LINEAR  # noqa: E402
from onekernel.gpu.layout import Layout  # noqa: E402
from onekernel.gpu.prefill_layout import PrefillLayout  # noqa: E402
from onekernel.reference import model  # noqa: E402
from onekernel.reference.parameters import Parameters  # noqa: E402
from onekernel.reference.state import State  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="needs g++ on x86-64 Linux: the fibers switch in assembly",
)
LIMIT = 0.02  # as in tests/gpu/test_prefill.py
SMALL = dataclasses.replace(
    small_shape.SMALL,
    hidden=512,
    intermediate=768,
    layer_types=(LINEAR, FULL, LINEAR),
    vocab=208,
    key_heads=2,
    value_heads=4,
)
CASES = {
    "sm_90a": ("sm_90a", 232448, False, 4, (70, 30)),
    "sm_90a, many blocks": ("sm_90a", 232448, False, 16, (200, 50)),
    "sm_90a, few tokens behind many": ("sm_90a", 232448, True, 8, (200, 5)),
    "portable, little shared memory": ("sm_80", 101376, False, 4, (70, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_state_are_those_of_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "behind many" in case:
        monkeypatch.setattr(PrefillLayout, "attention_splits", lambda *_: 3)
    arch, shared_memory, narrow, blocks, pieces = CASES[case]
    weights = random_weights(SMALL)
    plan = PrefillLayout.plan(Layout.plan(SMALL, 208, blocks, 232448), blocks, shared_memory, arch, narrow)
    assert plan is not None
    emulated = Emulated(plan, weights, arch)
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab, sum(pieces)).tolist()
    state = State.empty(SMALL)
    expected = model.forward(Parameters.load(weights, SMALL, mtp=False), state, tokens, all_logits=True)
    found = np.concatenate([emulated.prefill(piece) for piece in cut(tokens, pieces)])
    assert np.linalg.norm(found - expected) < LIMIT * np.linalg.norm(expected)
    errors = emulated.errors(state)
    assert all(max(values) < LIMIT for values in errors.values()), errors


def cut(tokens: list[int], pieces: tuple[int, ...]) -> list[list[int]]:
    ends = np.cumsum(pieces)
    return [tokens[end - count : end] for end, count in zip(ends, pieces, strict=True)]
