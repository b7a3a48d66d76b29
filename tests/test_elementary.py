"""exp and log from single operations: close to the true values, and exactly these bits."""

from __future__ import annotations

import numpy as np

from onekernel.sampling import elementary


def units_in_the_last_place(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(ours.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))))


def test_exp() -> None:
    x = np.linspace(-87, 88, 1_000_001).astype(np.float32)
    assert elementary.exp(x).dtype == np.float32
    assert units_in_the_last_place(elementary.exp(x), np.exp(x.astype(np.float64))) <= 2
    np.testing.assert_array_equal(elementary.exp(np.array([0, -0.0, -88, -1e30, -np.inf], np.float32)), [1, 1, 0, 0, 0])


def test_log_of_all_that_gumbel_needs() -> None:
    odd = np.concatenate([np.arange(1, 2**20, 2), np.arange(2**24 - 2**20 + 1, 2**24, 2), np.arange(1, 2**24, 98)])
    u = ((odd | 1) * 2.0**-24).astype(np.float32)
    exponential = -elementary.log(u)
    assert exponential.dtype == np.float32
    assert units_in_the_last_place(exponential, -np.log(u.astype(np.float64))) <= 2
    assert exponential.min() > 0
    error = elementary.log(exponential) - np.log(exponential.astype(np.float64))
    assert np.abs(error).max() <= 1e-6  # close to 1 the result is small, and its relative error of no importance
    assert np.isfinite(elementary.log(exponential)).all()


def test_bits() -> None:
    """Frozen: every kernel must compute the same."""
    x = np.array([-0.1, -1.0, -2.5, -20.0, -86.9], np.float32)
    bits = elementary.exp(x).view(np.uint32).tolist()
    assert bits == [0x3F67A36D, 0x3EBC5AB2, 0x3DA81C2E, 0x310DA433, 0x00C60F89]
    x = np.array([2**-24, 0.1, 0.5, 0.75, 1 - 2**-24, 3.0, 16.5], np.float32)
    bits = elementary.log(x).view(np.uint32).tolist()
    assert bits == [0xC1851592, 0xC0135D8E, 0xBF317218, 0xBE934B10, 0xB3800000, 0x3F8C9F54, 0x40336A42]
