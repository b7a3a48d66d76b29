"""Many tokens: no hang, no wrong token."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from test_demo_tokens import PROMPTS

from onekernel.gpu.decoder import Decoder
from onekernel.gpu.layout import OUTPUT_RING
from onekernel.text.tokenizer import Tokenizer

TOKENS = int(os.environ.get("ONEKERNEL_SOAK_TOKENS", "50000"))  # run.py sets it
LENGTH = 4096  # tokens of one timeline; then the next begins


def timeline(decoder: Decoder, prompt: list[int]) -> list[int]:
    """LENGTH greedy tokens, as many a launch as it can make."""
    state, tokens, made = decoder.new_state(), list(prompt), []
    while len(made) < LENGTH:
        some = list(decoder.greedy(state, tokens, min(OUTPUT_RING, LENGTH - len(made)), frozenset()))
        made += some
        tokens = some[-1:]
    return made


@pytest.mark.timeout(1200)
def test_many_tokens_without_a_wrong_one(demo: Decoder, demo_folder: Path, record_property) -> None:
    """The first timelines are those that test_demo_tokens compares with the reference; here each must come again."""
    tokenizer = Tokenizer.load(demo_folder)
    prompts = [tokenizer.encode(text) for text in PROMPTS[:3]]
    good = [timeline(demo, prompt) for prompt in prompts]
    made, wrong, start = 0, [], time.monotonic()
    while made < TOKENS:
        which = made // LENGTH % len(prompts)
        tokens = timeline(demo, prompts[which])
        if tokens != good[which]:
            wrong.append((made, next(i for i, (a, b) in enumerate(zip(tokens, good[which], strict=False)) if a != b)))
        made += len(tokens)
    record_property("tokens", made)
    record_property("tokens_per_second", round(made / (time.monotonic() - start)))
    record_property("timelines_with_a_wrong_token", len(wrong))
    assert not wrong
