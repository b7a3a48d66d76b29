"""A stop string ends the text before it, however the text is cut into chunks, and nothing of it is shown."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel.errors import InvalidRequest
from onekernel.text.stop import StopStrings

LETTERS = st.text("ab", max_size=30) | st.text("ab日\n", max_size=30)  # few letters: many partial matches
STOPS = st.lists(st.text("ab", min_size=1, max_size=5) | st.text("ab日\n", min_size=1, max_size=5), max_size=4)


def plain(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read character by character until the text ends with a stop string; the longest one counts."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def cut(text: str, at: list[int]) -> list[str]:
    places = [0, *sorted(min(place, len(text)) for place in at), len(text)]
    return [text[start:end] for start, end in pairwise(places)]


@settings(max_examples=500)
@given(LETTERS, STOPS, st.lists(st.integers(0, 30)))
def test_chunks_make_no_difference(text: str, stops: list[str], at: list[int]) -> None:
    strings = StopStrings(stops)
    shown, stopped = "", False
    for chunk in cut(text, at):
        new, stopped = strings.push(chunk)
        shown += new
        if stopped:
            break
    if not stopped:
        shown += strings.flush()
    assert (shown, stopped) == plain(text, stops)


@settings(max_examples=500)
@given(LETTERS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    strings = StopStrings(stops)
    shown, stopped = strings.push(text)
    if not stopped:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        assert not any(text.endswith(stop[:count]) for stop in stops for count in range(len(held) + 1, len(stop)))
        assert strings.flush() == held
        assert strings.flush() == ""


@pytest.mark.parametrize(
    ("stops", "chunks", "shown"),
    [
        (["STOP"], ["aST", "O", "Pb"], "a"),
        (["aab"], ["aa", "ab"], "a"),  # the beginning of a match lies within another one
        (["aab"], ["aa", "b"], ""),
        (["bc", "abcd"], ["ab", "cd"], "a"),  # the first that is complete
        (["c", "abc"], ["ab", "c"], ""),  # both at once: the longer
        (["\n\n"], ["one\n", "\ntwo"], "one"),
    ],
)
def test_examples(stops: list[str], chunks: list[str], shown: str) -> None:
    strings = StopStrings(stops)
    results = [strings.push(chunk) for chunk in chunks]
    assert "".join(text for text, _ in results) == shown
    assert [stopped for _, stopped in results] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("bad", ["", None, 3])
def test_a_stop_string_that_is_none_is_named(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"stop\[1\] = {bad!r} must be a string that is not empty"):
        StopStrings(["fine", bad])
