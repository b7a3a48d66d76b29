"""Normalisations and activations. All of them act on the last axis and keep dtype and shape."""

from __future__ import annotations

import numpy as np

L2_EPS = 1e-6


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zero-centred RMS norm, `x / sqrt(mean(x²) + eps) · (1 + weight)`: a weight of 0 changes nothing.

    Every norm of the model but the one inside the delta net: layer norms, q and k norms, final norm, MTP norms.
    """
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1 + weight)


def gated_rms_norm(x: np.ndarray, gate: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`x / sqrt(mean(x²) + eps) · weight · silu(gate)`: the norm comes first, and its weight is *not* zero-centred."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight * silu(gate)


def l2_norm(x: np.ndarray) -> np.ndarray:
    """`x / sqrt(Σx² + 1e-6)`: eps is added to the sum of squares."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """`log(1 + exp(x))`, without overflow."""
    return np.logaddexp(x, 0).astype(x.dtype)
