"""Perplexity: how well a model predicts a given text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onekernel.engine.engine import Engine
from onekernel.errors import InvalidRequest

LOGITS_AT_ONCE = 128  # positions whose logits are held together: 121 MiB at 248,320 tokens


@dataclass(frozen=True)
class Perplexity:
    tokens: int  # that were predicted: in each window all but the first
    windows: int
    mean_log_probability: float  # natural logarithm

    @property
    def value(self) -> float:
        return math.exp(-self.mean_log_probability)


def perplexity(engine: Engine, tokens: Sequence[int], window: int) -> Perplexity:
    """The perplexity of `tokens`, cut into windows that are predicted each from its own beginning.

    A last window of a single token is left out: nothing in it can be predicted.

    Raises:
        InvalidRequest: fewer than two tokens, or a window outside of 2 .. engine.max_context.
    """
    if not 2 <= window <= engine.max_context:
        raise InvalidRequest(f"context = {window} must be between 2 and {engine.max_context}")
    if len(tokens) < 2:
        raise InvalidRequest(f"the text has {len(tokens)} tokens: perplexity needs at least 2")
    parts = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    parts = [part for part in parts if len(part) > 1]
    total = sum(float(log_probabilities(engine, part).sum()) for part in parts)
    count = sum(len(part) - 1 for part in parts)
    return Perplexity(count, len(parts), total / count)


def log_probabilities(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """float64 [len(tokens) - 1]: log p(tokens[i + 1] | tokens[: i + 1]), natural, over the whole vocabulary."""
    result = np.empty(len(tokens) - 1)
    with engine.exclusive() as backend:
        state = backend.new_state()
        for start in range(0, len(result), LOGITS_AT_ONCE):
            end = min(start + LOGITS_AT_ONCE, len(result))
            logits = backend.logits(state, tokens[start:end])
            highest = logits.max(-1, keepdims=True)
            total = np.exp(logits - highest, dtype=np.float32).sum(-1, dtype=np.float64)
            chosen = logits[np.arange(end - start), np.asarray(tokens[start + 1 : end + 1])]
            result[start:end] = chosen - highest[:, 0].astype(np.float64) - np.log(total)
    return result
