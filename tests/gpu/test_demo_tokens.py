"""The demo model's greedy tokens against the NumPy reference, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onekernel.gpu.decoder import Decoder
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State
from onekernel.text.tokenizer import Tokenizer

# Starts of Python code; what follows them is the reference's business. More than enough for 2,000 clear tokens.
PROMPTS = (
    "def fibonacci(n):",
    "import os\n",
    "class Stack:\n    def __init__(self):\n",
    "def test_",
    "from typing import",
    "    def close(self):\n",
    "for i in range(10):\n    print(",
    "# ",
    '"""Read and write',
    "class Error(Exception):\n",
    "if __name__ == '__main__':\n",
    "def __repr__(self):\n    return",
    "try:\n    import",
    "async def",
    "while True:\n    line =",
    "    def get(self, key, default=None):\n",
    "raise ValueError(",
    "with open(path) as file:\n",
    "@property\ndef name(self):\n",
    "assert ",
    "lambda x:",
    "SPECIAL = {",
    "def main(argv):\n    parser = argparse",
    "return self._",
)
LENGTH = 160  # tokens a prompt
WANTED = 2000
CLEAR = 0.02  # of the standard deviation of the logits: several times what bf16 inputs move a difference of two logits


def reference_tokens(parameters: Parameters, prompt: list[int], vocabulary_size: int) -> tuple[list[int], list[float]]:
    """LENGTH greedy tokens, and of each the lead over the second in standard deviations of the logits."""
    state = State.empty(parameters.shape)
    logits = model.forward(parameters, state, prompt)[:vocabulary_size]
    tokens, leads = [], []
    for _ in range(LENGTH):
        second, first = np.sort(np.partition(logits, -2)[-2:])
        tokens.append(int(np.argmax(logits)))
        leads.append(float((first - second) / logits.std()))
        logits = model.forward(parameters, state, tokens[-1:])[:vocabulary_size]
    return tokens, leads


@pytest.mark.timeout(300)
def test_greedy_tokens_equal_the_reference(
    demo: Decoder, demo_reference: Parameters, demo_folder: Path, record_property
) -> None:
    """Compared as far as the reference's choice is clear; a prompt counts up to its first near tie."""
    tokenizer = Tokenizer.load(demo_folder)
    compared, ties, wrong = 0, 0, []
    for text in PROMPTS:
        prompt = tokenizer.encode(text)
        expected, leads = reference_tokens(demo_reference, prompt, tokenizer.size)
        unclear = [i for i, lead in enumerate(leads) if lead < CLEAR]
        clear = unclear[0] if unclear else LENGTH
        ties += bool(unclear)
        made = list(demo.greedy(demo.new_state(), prompt, LENGTH, frozenset()))
        assert len(made) == LENGTH
        if made[:clear] != expected[:clear]:
            first = next(i for i in range(clear) if made[i] != expected[i])
            wrong.append((text, first, leads[first]))
        compared += clear
    record_property("tokens_compared", compared)
    record_property("prompts", len(PROMPTS))
    record_property("prompts_cut_at_a_near_tie", ties)
    assert not wrong
    assert compared >= WANTED
