"""What is measured: suites of cells, and the token sequences that every engine gets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onekernel.errors import InvalidRequest

PREFILL, DECODE, COLD_START = "prefill", "decode", "cold_start"
LEAST_REPETITIONS = 5
GENERATED = 128  # tokens of one decode sample
GATE_TOKENS = 192  # more than two chunks of the delta rule, and a rest
SEED = 20_260_101
CONTEXTS = (0, 520, 1904, 8192, 32_768, 131_072)
PROMPTS = (32, 128, 520, 2048, 8192, 32_768)
FIRST_TOKEN = (16, 64, 256, 520, 1024)


@dataclass(frozen=True)
class Cell:
    """One figure to measure.

    Attributes:
        kind: PREFILL: from an empty state until the first new token is on the host. DECODE: `count` new tokens, with
            `context` tokens consumed before and one more pending. COLD_START: from the start of the process.
        context: tokens of the prompt (PREFILL, COLD_START) or before the pending one (DECODE).
        count: new tokens of one sample.
        energy: also measure joules, over a window.
    """

    kind: str
    context: int
    count: int = 1
    energy: bool = False

    @property
    def name(self) -> str:
        """As people write it: pp520, tg128@520."""
        if self.kind == DECODE:
            return f"tg{self.count}@{self.context}"
        return f"{'cold' if self.kind == COLD_START else 'pp'}{self.context}"

    @property
    def positions(self) -> int:
        """Tokens that a timeline must hold for it."""
        return self.context + self.count + 1


def _standard() -> tuple[Cell, ...]:
    return Cell(PREFILL, 520, energy=True), Cell(DECODE, 520, GENERATED, energy=True)


SUITES: dict[str, tuple[Cell, ...]] = {
    "standard": _standard(),
    "context": tuple(Cell(DECODE, context, GENERATED, energy=context == 520) for context in CONTEXTS),
    "prompt": tuple(Cell(PREFILL, length) for length in PROMPTS),
    "ttft": tuple(Cell(PREFILL, length) for length in FIRST_TOKEN),
    "cold": (Cell(COLD_START, 64),),
}


def cells_of(suites: Sequence[str]) -> list[Cell]:
    """All cells of some suites, each once.

    Raises:
        InvalidRequest: no such suite.
    """
    cells: dict[tuple[str, int, int], Cell] = {}
    for name in suites:
        if name not in SUITES:
            raise InvalidRequest(f"suite = {name!r} is unknown: choose from {', '.join(SUITES)}")
        for cell in SUITES[name]:
            key = (cell.kind, cell.context, cell.count)
            if key not in cells or cell.energy:
                cells[key] = cell
    return list(cells.values())


def prompt(length: int, variant: int, vocabulary: int) -> list[int]:
    """`length` token ids, the same for every engine; each variant (repetition) is another sequence.

    Uniform over the vocabulary: a repeated token would flatter caches, and a repeated prompt engines that keep the
    prefixes of earlier requests.
    """
    random = np.random.default_rng([SEED, variant])
    ids: list[int] = random.integers(0, vocabulary, length).tolist()
    return ids


def digest(vocabulary: int) -> str:
    """A hash of the sequences, for the document."""
    text = repr([prompt(4096, variant, vocabulary) for variant in range(2)])
    return hashlib.sha256(text.encode()).hexdigest()
