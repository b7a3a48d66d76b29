"""The gated MLP that follows the mixer in every layer."""

from __future__ import annotations

import numpy as np

from onekernel.reference.norm import silu
from onekernel.reference.parameters import MLP


def mlp(parameters: MLP, x: np.ndarray) -> np.ndarray:
    """down(silu(gate x) · up x); [T, hidden] -> [T, hidden]."""
    return (silu(x @ parameters.gate_proj.T) * (x @ parameters.up_proj.T)) @ parameters.down_proj.T
