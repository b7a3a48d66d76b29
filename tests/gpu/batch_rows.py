"""Rows of a batch for the GPU tests, and what a batch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onekernel.backend.batch import Row
from onekernel.gpu.batch_decoder import MOST_STEPS, BatchDecoder
from onekernel.gpu.decoder import Decoder
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler

GREEDY = SamplingParams()
ENDLESS = 1 << 20  # tokens: more than any test makes


def new_row(decoder: Decoder, prompt: Sequence[int], params: SamplingParams = GREEDY, **options: Any) -> Row:
    """A row whose state has consumed `prompt` but for its last token."""
    state = decoder.new_state()
    decoder.consume(state, prompt[:-1])
    sampler = Sampler(params, decoder.layout.vocabulary_size, prompt)
    return Row(state, [prompt[-1]], sampler, **{"max_tokens": ENDLESS, **options})


def advance(batch: BatchDecoder, rows: Sequence[Row], steps: int) -> list[list[SampledToken]]:
    """The tokens of each row of one launch; each row's last becomes its pending one."""
    assert steps <= MOST_STEPS
    made: list[list[SampledToken]] = [[] for _ in rows]
    for step in batch.run(rows, steps):
        for place, token in step:
            made[place].append(token)
    for row, tokens in zip(rows, made, strict=True):
        row.tokens = [token.id for token in tokens[-1:]]
        row.max_tokens -= len(tokens)
    return made


def ids(made: Sequence[Sequence[SampledToken]]) -> list[list[int]]:
    return [[token.id for token in tokens] for tokens in made]
