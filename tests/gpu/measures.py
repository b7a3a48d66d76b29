"""Small helpers of the GPU tests."""

from __future__ import annotations

import numpy as np

from onekernel.checkpoint.shape import Shape


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over norm of the reference."""
    assert ours.shape == reference.shape
    difference = np.linalg.norm(ours.astype(np.float64) - reference)
    return float(difference / np.linalg.norm(reference.astype(np.float64)))


def random_tokens(shape: Shape, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, shape.vocab, count).tolist()
