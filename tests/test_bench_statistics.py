"""Medians, spreads and the verdict on two sets of samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from onekernel.bench.statistics import decide, quantile, rank_test, summarise


def test_quantiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 5, 8, 31):
        samples = random.standard_normal(size).tolist()
        for fraction in (0, 0.1, 0.25, 0.5, 0.75, 1):
            assert quantile(samples, fraction) == pytest.approx(np.quantile(samples, fraction))


def test_one_outlier_moves_the_mean_but_not_the_median() -> None:
    summary = summarise([10.0, 10.1, 9.9, 10.0, 2.0])
    assert summary.median == 10.0
    assert summary.least == 2.0
    assert summary.spread < 0.02


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


@pytest.mark.parametrize(("size", "other"), [(5, 5), (5, 7), (8, 8)])
def test_the_exact_rank_test_is_that_of_scipy(size: int, other: int) -> None:
    random = np.random.default_rng(size)
    for shift in (0, 0.5, 2):
        first, second = random.standard_normal(size), random.standard_normal(other) + shift
        expected = mannwhitneyu(first, second, method="exact").pvalue
        assert rank_test(first.tolist(), second.tolist()) == pytest.approx(expected)


def test_the_approximate_rank_test_is_that_of_scipy() -> None:
    random = np.random.default_rng(3)
    first, second = random.integers(0, 9, 40), random.integers(1, 10, 40)  # with ties
    expected = mannwhitneyu(first, second, method="asymptotic", use_continuity=False).pvalue
    assert rank_test(first.tolist(), second.tolist()) == pytest.approx(expected, rel=1e-6)


def test_a_real_difference_is_told_from_noise() -> None:
    slow, fast = [100, 101, 99, 100.5, 99.5], [110, 111, 109, 110.5, 109.5]
    assert decide(slow, fast).change == "higher"
    assert decide(fast, slow).change == "lower"


def test_a_significant_but_tiny_difference_is_noise() -> None:
    """Five samples within a hundredth of a percent say nothing about the next day."""
    verdict = decide([100, 100.01, 100.02, 100.03, 100.04], [100.1, 100.11, 100.12, 100.13, 100.14])
    assert verdict.p < 0.05
    assert verdict.change == "within noise"


def test_overlapping_samples_are_noise_however_far_the_medians() -> None:
    assert decide([80, 120, 81, 119, 100], [90, 130, 82, 118, 110]).change == "within noise"


def test_false_alarms_are_rare() -> None:
    """Two runs of the same thing must not be called different more often than the level allows."""
    random = np.random.default_rng(0)
    runs = random.normal(100, 3, (2000, 2, 5))
    alarms = sum(decide(a.tolist(), b.tolist()).change != "within noise" for a, b in runs)
    assert alarms / len(runs) < 0.05
