"""What a check found: faults and notes in sentences. They are collected, so that one check can name several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Absent(Exception):
    """The server does not have what is to be checked; says how one can tell."""


@dataclass
class Findings:
    faults: list[str] = field(default_factory=list)
    """What breaks a client, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """Measurements, and what a client can live with."""

    def fault(self, sentence: str) -> None:
        if sentence not in self.faults:  # the same fault in every event of a stream is one fault
            self.faults.append(sentence)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def require(self, condition: object, sentence: str) -> bool:
        """Note `sentence` as a fault unless `condition` holds; returns whether it does."""
        if not condition:
            self.fault(sentence)
        return bool(condition)


def at(value: Any, *path: str | int) -> Any:
    """The value under `path` in parsed JSON, or None where there is none: a broken server may send anything."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and -len(value) <= step < len(value) else None
    return value


def items(value: Any) -> list[Any]:
    """`value` if it is a list, else none."""
    return value if isinstance(value, list) else []


def shown(value: Any) -> str:
    """A value within a sentence, cut to a bearable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_count(value: Any) -> bool:
    """A number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
