"""Thinking apart from the answer."""

from __future__ import annotations

import random

import pytest

from onekernel.text.thinking import ThinkingSplitter, overlap


def split(text: str, inside: bool, *, calls: bool = False, pieces: int = 1, seed: int = 0) -> tuple[str, str]:
    splitter = ThinkingSplitter(inside, calls=calls)
    chance, thinking, answer = random.Random(seed), "", ""
    while text:
        size = chance.randint(1, pieces)
        more = splitter.push(text[:size])
        thinking, answer, text = thinking + more[0], answer + more[1], text[size:]
    more = splitter.flush()
    return thinking + more[0], answer + more[1]


@pytest.mark.parametrize("pieces", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("thought\n</think>\n\nanswer\n", True, ("thought", "answer\n")),
        ("\n\n</think>\n\nanswer", True, ("", "answer")),
        ("never closed  ", True, ("never closed", "")),
        ("a </thin b </think>c", True, ("a </thin b", "c")),
        ("answer", False, ("", "answer")),
        ("<think>\nown\n</think>\n\nanswer", False, ("own", "answer")),
        ("answer <think> no", False, ("", "answer <think> no")),
        ("<thing>", False, ("", "<thing>")),
        ("<thi", False, ("", "<thi")),
        ("x</think>y</think>z", True, ("x", "y</think>z")),
    ],
)
def test_tags_part_the_text(text: str, inside: bool, expected: tuple[str, str], pieces: int) -> None:
    assert split(text, inside, pieces=pieces) == expected


def test_a_call_ends_thinking_that_was_not_closed() -> None:
    text = "hm\n<tool_call>\n<function=f>\n</function>\n</tool_call>"
    assert split(text, True, calls=True) == ("hm", text.removeprefix("hm\n"))
    assert split(text, True, calls=False)[1] == ""


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    splitter = ThinkingSplitter(True)
    assert splitter.push("one two") == ("one two", "")
    assert splitter.push(" </thi") == ("", "")
    assert splitter.push("s") == (" </this", "")
    assert splitter.push("</think>\n\nok") == ("", "ok")
    assert splitter.over


@pytest.mark.parametrize(
    ("text", "tag", "expected"),
    [("ab<t", "<tag>", 2), ("<ta<", "<tag>", 1), ("aa", "aab", 2), ("aaa", "aab", 2), ("", "x", 0)],
)
def test_overlap(text: str, tag: str, expected: int) -> None:
    assert overlap(text, tag) == expected
