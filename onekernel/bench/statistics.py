"""Medians, spreads, and whether two sets of samples differ by more than their noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_ENUMERATED = 200_000  # permutations that an exact test goes through
SIGNIFICANT = 0.05
LEAST_CHANGE = 0.01  # relative: what one machine does from one day to the next without any change of code


@dataclass(frozen=True)
class Summary:
    """Of repeated samples, in their unit."""

    count: int
    median: float
    low: float  # first quartile
    high: float  # third quartile
    least: float
    most: float

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def quantile(samples: Sequence[float], fraction: float) -> float:
    """Between the sorted samples, linearly; fraction 0 is the least and 1 the most.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples")
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def summarise(samples: Sequence[float]) -> Summary:
    return Summary(
        count=len(samples),
        median=median(samples),
        low=quantile(samples, 0.25),
        high=quantile(samples, 0.75),
        least=min(samples),
        most=max(samples),
    )


def rank_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney test: how often chance alone separates two groups at least so well.

    Exact, by going through all divisions of the pooled samples, while there are at most MOST_ENUMERATED of them; the
    normal approximation (with the correction for ties) beyond. With 5 samples on each side the least p is 2/252.
    """
    pooled = sorted([*first, *second])
    rank = {value: (pooled.index(value) + 1 + len(pooled) - pooled[::-1].index(value)) / 2 for value in pooled}
    observed = sum(rank[value] for value in first)
    size, total = len(first), len(pooled)
    centre = size * (total + 1) / 2
    distance = abs(observed - centre) - 1e-9
    if math.comb(total, size) <= MOST_ENUMERATED:
        ranks = [rank[value] for value in pooled]
        sums = [sum(chosen) for chosen in itertools.combinations(ranks, size)]
        return sum(abs(value - centre) >= distance for value in sums) / len(sums)
    ties = sum(count**3 - count for count in (pooled.count(value) for value in set(pooled)))
    variance = size * (total - size) / 12 * (total + 1 - ties / (total * (total - 1)))
    return math.erfc(distance / math.sqrt(2 * variance)) if variance else 1.0


@dataclass(frozen=True)
class Verdict:
    """Of a comparison. `ratio` is the second median over the first."""

    ratio: float
    p: float
    change: str  # "higher", "lower" or "within noise"


def decide(first: Sequence[float], second: Sequence[float], least_change: float = LEAST_CHANGE) -> Verdict:
    """Whether `second` differs from `first` by more than noise: significantly, and by more than `least_change`."""
    ratio = median(second) / median(first)
    p = rank_test(first, second)
    if p >= SIGNIFICANT or abs(ratio - 1) <= least_change:
        return Verdict(ratio, p, "within noise")
    return Verdict(ratio, p, "higher" if ratio > 1 else "lower")
