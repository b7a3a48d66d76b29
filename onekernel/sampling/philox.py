"""Philox4x32-10: random numbers as a pure function of a counter and a key.

There is no generator state: any thread computes the number that it needs, in any order, and gets the same bits.
Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (and its Random123 library).
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Four random words for each counter.

    Args:
        counter: uint32 [..., 4], lowest word first.
        key: 64 bits; its lower half is the first key word.

    Returns:
        uint32 [..., 4]
    """
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint32) for i in range(4))
    key0, key1 = key & WORD, key >> 32
    for _ in range(ROUNDS):
        product0 = x0 * MULTIPLIERS[0]  # uint64
        product1 = x2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> HALF).astype(np.uint32), (product1 >> HALF).astype(np.uint32)
        x0, x1, x2, x3 = (
            high1 ^ x1 ^ np.uint32(key0),
            product1.astype(np.uint32),
            high0 ^ x3 ^ np.uint32(key1),
            product0.astype(np.uint32),
        )
        key0, key1 = (key0 + KEY_INCREMENTS[0]) & WORD, (key1 + KEY_INCREMENTS[1]) & WORD
    return np.stack([x0, x1, x2, x3], axis=-1)
