"""The kernel's way to cut the list of tokens (kernels/sampling/select.cuh), told in NumPy: the same tokens as `keep`.

It is what can be tested without a GPU: that the keys order tokens as they should, that stopping early is right, and
that every case ends. That the kernel does what this does, tests/gpu/test_sampling.py checks.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel.gpu.sampling import BINS
from onekernel.sampling import elementary
from onekernel.sampling.sampler import MASS_BITS, keep

KEY_BITS, DIGIT_BITS = 56, 8
PASSES = KEY_BITS // DIGIT_BITS


def order_keys(z: np.ndarray) -> np.ndarray:
    """uint64: larger keys come first in the order (z descending, id ascending)."""
    order = ~(z.view(np.uint32) | np.uint32(0x80000000))
    return order.astype(np.uint64) << np.uint64(25) | (0xFFFFF - np.arange(len(z), dtype=np.uint64)) << np.uint64(5)


def cut(keys: np.ndarray, mass: np.ndarray | None, target: int, top_p: float, kept: int) -> tuple[int, int]:
    """The least key that remains, and the passes that it took to find."""
    prefix, shift = 0, KEY_BITS
    while True:
        shift -= DIGIT_BITS
        members = (keys >= np.uint64(kept)) & (keys >> np.uint64(shift) >> np.uint64(DIGIT_BITS) == np.uint64(prefix))
        digits = (keys[members] >> np.uint64(shift) & np.uint64(BINS - 1)).astype(np.int64)
        counts = np.bincount(digits, minlength=BINS)
        weights = counts.astype(np.int64)
        if mass is not None:
            weights[:] = 0
            np.add.at(weights, digits, mass[members])
            if shift == KEY_BITS - DIGIT_BITS:
                target = int(np.ceil(np.float64(top_p) * np.float64(weights.sum())))
        reached = weights[::-1].cumsum()[::-1]  # from the highest bin down
        digit = int(np.flatnonzero((reached - weights < target) & (target <= reached)).item())
        target -= int(reached[digit] - weights[digit])
        prefix = prefix << DIGIT_BITS | digit
        if shift == 0 or counts[digit] == 1 or (mass is None and counts[digit] == target):
            return max(kept, prefix << shift), (KEY_BITS - shift) // DIGIT_BITS


def kept_by_cuts(z: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    keys, kept = order_keys(z), 0
    if 0 < top_k < len(z):
        kept, passes = cut(keys, None, top_k, 1, kept)
        assert passes <= PASSES
    if top_p < 1:
        mass = (elementary.exp(z) * np.float32(2**MASS_BITS)).astype(np.int64)
        kept, passes = cut(keys, mass, 0, top_p, kept)
        assert passes <= PASSES
    return np.flatnonzero((keys >= np.uint64(kept)) & ((min_p == 0) | (elementary.exp(z) >= np.float32(min_p))))


z_values = st.one_of(
    st.integers(-40, 0).map(lambda i: i / 8),  # many ties
    st.floats(-100, 0, width=32),
    st.floats(-(2.0**-100), 0, width=32),
    st.sampled_from([-0.0, -np.inf, -87.0, -26.0, -30.0]),
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(z_values, max_size=200),
    st.integers(0, 210),
    st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True), st.sampled_from([1e-300, 1 - 2**-53])),
    st.one_of(st.just(0.0), st.floats(0, 0.99)),
)
def test_cuts_keep_what_the_reference_keeps(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    z = np.array([0, *values], np.float32)[np.random.default_rng(len(values)).permutation(len(values) + 1)]
    assert kept_by_cuts(z, top_k, top_p, min_p).tolist() == keep(z, top_k, top_p, min_p).tolist()


def test_a_large_vocabulary_takes_few_passes() -> None:
    """Each pass is a meeting of all blocks: what makes sampling quick is that few are needed."""
    scores = np.random.default_rng(0).normal(0, 3, 248_077).astype(np.float32)
    keys = order_keys(scores - scores.max())
    for top_k in (20, 50, 1000):
        _, passes = cut(keys, None, top_k, 1, 0)
        assert passes <= 4
