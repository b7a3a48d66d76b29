"""Philox against the known answers of Random123 (`tests/kat_vectors`)."""

from __future__ import annotations

import numpy as np
import pytest

from onekernel.sampling.philox import philox4x32

# The digits of pi are Random123's choice of an irregular input.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        0xFFFFFFFF_FFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    assert tuple(philox4x32(np.array(counter, np.uint32), key).tolist()) == words


def test_many_counters_at_once() -> None:
    counters = np.array([counter for counter, _, _ in KNOWN], np.uint32)[:, None]
    for row, (_, key, words) in enumerate(KNOWN):
        result = philox4x32(counters, key)
        assert result.shape == (3, 1, 4)
        assert tuple(result[row, 0].tolist()) == words
