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
    """Compared wherever the reference's choice is clear; behind a near tie both go on with the reference's token."""
    tokenizer = Tokenizer.load(demo_folder)
    clear, ties, ties_that_differ, wrong = 0, 0, 0, []
    for text in PROMPTS:
        prompt = tokenizer.encode(text)
        expected, leads = reference_tokens(demo_reference, prompt, tokenizer.size)
        state, pending, at = demo.new_state(), prompt, 0
        while at < LENGTH:
            end = next((i for i in range(at, LENGTH) if leads[i] < CLEAR), LENGTH - 1) + 1
            made = list(demo.greedy(state, pending, end - at, frozenset()))
            assert len(made) == end - at
            for i, token in enumerate(made, at):
                tie = leads[i] < CLEAR
                clear += not tie
                ties += tie
                if token != expected[i]:
                    ties_that_differ += tie
                    if not tie:
                        wrong.append((text, i, leads[i]))
                        end = LENGTH  # what follows a wrong token says nothing
                        break
            pending, at = [expected[end - 1]], end
    record_property("clear_tokens_compared", clear)
    record_property("near_ties", ties)
    record_property("near_ties_that_differ", ties_that_differ)
    assert not wrong
    assert clear >= WANTED
