"""Streamed text is the decoded text, in whole characters, whatever the text and wherever tokens cut it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel.checkpoint.hub import demo_folder
from onekernel.text.detokenizer import IncrementalDetokenizer
from onekernel.text.tokenizer import Tokenizer

# Of every length in UTF-8, of combining marks and joined emoji, and of what looks like the markup of a model.
MARKUP = ["\ufffd", "\x00", "<|im_end|>", "<think>", "\r\n\t ", "def f(x):\n    "]
MARKS = ["é", "e\u0301", "日本語", "👩‍👩‍👧‍👦", "🇩🇪", "नमस्ते"]
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(MARKS + MARKUP), max_size=8).map("".join)


@cache
def demo() -> Tokenizer:
    return Tokenizer.load(demo_folder())


@cache
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> tuple[list[str], str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [detokenizer.push(token) for token in ids], detokenizer.flush()


@settings(deadline=None)
@given(TEXTS)
def test_the_text_comes_back(text: str) -> None:
    """The tokenizer normalises to NFC, as Qwen3.5's does; beyond that nothing is lost."""
    ids = demo().encode(text, parse_special=False)
    pushed, rest = streamed(demo(), ids, skip_special=False)
    assert rest == ""
    assert "".join(pushed) == library().normalizer.normalize_str(text)


@settings(deadline=None)
@given(TEXTS, st.data())
def test_bytes_cut_anywhere_come_back(text_folder_tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """One token a byte: every character of more than one byte is cut, and a stream may end within one."""
    content = text.encode()
    content = content[: data.draw(st.integers(0, len(content)))]
    alphabet = {text_folder_tokenizer.token_bytes(token): token for token in range(256)}
    pushed, rest = streamed(text_folder_tokenizer, [alphabet[bytes([byte])] for byte in content])
    assert "".join(pushed) + rest == content.decode("utf-8", "replace")
    assert text.startswith("".join(pushed))  # whole characters only
    assert rest in ("", "\ufffd")


@pytest.fixture(scope="module")
def text_folder_tokenizer(text_folder: Path) -> Tokenizer:
    return Tokenizer.load(text_folder)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, demo().size - 1), max_size=30), st.booleans())
def test_any_tokens_give_what_the_library_decodes(ids: list[int], skip_special: bool) -> None:
    """Random tokens are mostly not UTF-8: the replacement characters too are those of the library."""
    pushed, rest = streamed(demo(), ids, skip_special=skip_special)
    assert "".join(pushed) + rest == demo().decode(ids, skip_special=skip_special)
    assert "".join(pushed) + rest == library().decode(ids, skip_special_tokens=skip_special)


@settings(deadline=None)
@given(st.lists(st.integers(0, demo().size - 1), max_size=30))
def test_text_that_was_given_out_is_never_taken_back(ids: list[int]) -> None:
    pushed, _ = streamed(demo(), ids)
    for end in range(len(ids) + 1):
        assert demo().decode(ids[:end]).startswith("".join(pushed[:end]).rstrip("\ufffd"))


def test_half_a_character_waits_for_the_other_half(text_folder_tokenizer: Tokenizer) -> None:
    ids = text_folder_tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert streamed(text_folder_tokenizer, ids) == (["a", "", "", "", "🙂", "b"], "")
    assert streamed(text_folder_tokenizer, ids[:3]) == (["a", "", ""], "\ufffd")


def test_a_special_token_within_a_character_changes_nothing(text_folder_tokenizer: Tokenizer) -> None:
    first, second = text_folder_tokenizer.encode("é")
    end = text_folder_tokenizer.encode("<|im_end|>")[0]
    assert streamed(text_folder_tokenizer, [first, end, second])[0] == ["", "", "é"]


def test_a_flushed_detokenizer_starts_anew(text_folder_tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(text_folder_tokenizer)
    first, second = text_folder_tokenizer.encode("é")
    detokenizer.push(first)
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.push(first) + detokenizer.push(second) == "é"
