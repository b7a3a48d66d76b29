"""Small helpers of the GPU tests."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.gpu.decoder import Decoder, State
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over norm of the reference."""
    assert ours.shape == reference.shape
    difference = np.linalg.norm(ours.astype(np.float64) - reference)
    return float(difference / np.linalg.norm(reference.astype(np.float64)))


def random_tokens(shape: Shape, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, shape.vocab, count).tolist()


def greedy(
    decoder: Decoder, state: State, tokens: Sequence[int], count: int, stop_tokens: frozenset[int] = frozenset()
) -> Generator[int, None, None]:
    """Ids of at most `count` greedy tokens in one launch. Closing the iterator stops the launch."""
    sampler = Sampler(SamplingParams(), decoder.layout.vocabulary_size)
    with closing(decoder.generate(state, tokens, sampler, count, stop_tokens)) as made:
        for token in made:
            yield token.id
