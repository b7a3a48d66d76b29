"""Constraint: what may come next, beyond what the logits say (a grammar, a schema). Defined once for every backend."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Of one generation: it is asked before each token, and told each token that was chosen."""

    def allowed(self) -> np.ndarray | None:
        """bool [vocabulary_size]: which tokens may come next; None: all of them. At least one must be allowed."""

    def accept(self, token: int) -> None:
        """`token` was chosen (or put into the timeline by force)."""
