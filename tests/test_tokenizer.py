"""Ids of text and text of ids, as transformers has them; end tokens, default sampling, damaged files."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models
from transformers import AutoTokenizer

from onekernel.checkpoint.hub import demo_folder
from onekernel.errors import CheckpointError, InvalidRequest
from onekernel.sampling.params import SamplingParams
from onekernel.text.tokenizer import BYTE_OF_SYMBOL, Tokenizer

MARKUP = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|im_", "end|>", "<", "|"]
)
TEXTS = st.lists(st.text(max_size=8) | MARKUP, max_size=8).map("".join)


@cache
def demo() -> Tokenizer:
    return Tokenizer.load(demo_folder())


@cache
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(demo_folder())


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_ids_are_those_of_transformers(text: str) -> None:
    assert demo().encode(text) == theirs().encode(text, add_special_tokens=False)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3011), max_size=30), st.booleans())
def test_text_is_that_of_transformers(ids: list[int], skip: bool) -> None:
    expected = theirs().decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert demo().decode(ids, skip_special=skip) == expected


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_text_of_a_user_never_becomes_a_special_token(text: str) -> None:
    ids = demo().encode(text, parse_special=False)
    assert not any(token >= 3000 for token in ids)  # 3,000 tokens of BPE, then special tokens and markup
    if "<" not in text:
        assert ids == demo().encode(text)  # nothing to defuse, nothing changed


def test_special_tokens_within_each_other_are_defused(tmp_path: Path) -> None:
    shutil.copytree(demo_folder(), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    library = Library.from_file(str(path))
    library.add_special_tokens(["aXa", "XaX"])
    library.save(str(path))
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert any(token >= 3012 for token in tokenizer.encode("aXaXaX"))
    ids = tokenizer.encode("aXaXaX" * 3, parse_special=False)
    assert not any(token >= 3000 for token in ids)
    assert tokenizer.decode(ids) == "aXaXaX" * 3


def test_defusing_takes_linear_time() -> None:
    """A message made of special tokens is no way to stop a server."""
    text = "<|im_start|>" * 5000
    ids = demo().encode(text, parse_special=False)
    assert demo().decode(ids) == text


@pytest.mark.parametrize("text", ["\ud800", "good so far \udcff"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_what_is_no_character_is_refused(text: str, parse_special: bool) -> None:
    with pytest.raises(InvalidRequest, match=rf"the text holds .* at character {len(text) - 1}, which is no character"):
        demo().encode(text, parse_special=parse_special)


def test_the_alphabet_has_every_byte_once() -> None:
    assert sorted(BYTE_OF_SYMBOL.values()) == list(range(256))
    assert demo().token_bytes(demo().encode(" ")[0]) == b" "


@pytest.mark.parametrize("token", [-1, 3012, 10**9])
def test_a_token_that_does_not_exist_is_named(token: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"token id {token} is not in the vocabulary of 3012 tokens"):
        demo().token_bytes(token)


def test_both_end_tokens_end_an_answer_and_markup_is_text() -> None:
    ends = {demo().encode(name)[0] for name in ("<|im_end|>", "<|endoftext|>")}
    assert demo().stop_token_ids == ends
    assert demo().decode(demo().encode("<think>a</think>")) == "<think>a</think>"
    assert demo().decode(demo().encode("a<|im_end|>")) == "a"
    assert demo().decode(demo().encode("a<|im_end|>"), skip_special=False) == "a<|im_end|>"


@pytest.fixture
def folder(text_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_folder, tmp_path / "model"))


def configure(folder: Path, **config: Any) -> Tokenizer:
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(folder)


def test_the_recommended_sampling_is_the_default(folder: Path) -> None:
    released = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95, "eos_token_id": [257, 5]}
    tokenizer = configure(folder, **released, bos_token_id=5, pad_token_id=5, transformers_version="5")
    assert tokenizer.default_sampling == SamplingParams(temperature=0.7, top_k=20, top_p=0.95)
    assert tokenizer.stop_token_ids == {257, 5}
    assert configure(folder, do_sample=True).default_sampling == SamplingParams(temperature=1.0)
    assert configure(folder, do_sample=False, temperature=0.7).default_sampling == SamplingParams()
    assert configure(folder, eos_token_id=7).stop_token_ids == {257, 7}
    (folder / "generation_config.json").unlink()
    assert Tokenizer.load(folder).default_sampling == SamplingParams()
    assert Tokenizer.load(folder).stop_token_ids == {257}  # <|im_end|> from the tokenizer itself


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_sample": True, "top_p": 3}, "top_p = 3 must be greater than 0 and at most 1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature = 'hot' must be between 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k = 2.5 must be 0"),
        ({"eos_token_id": "<|im_end|>"}, r"eos_token_id = '<\|im_end\|>' is not a list of token ids"),
        ({"eos_token_id": [1, None]}, "eos_token_id = .* is not a list of token ids"),
    ],
)
def test_a_wrong_generation_config_names_the_field(folder: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        configure(folder, **config)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{", "is not valid JSON"),
        ("generation_config.json", "[" * 100_000, "is not valid JSON"),
        ("generation_config.json", "[]", "is not a JSON object"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "garbage", "is not a tokenizer"),
    ],
)
def test_damaged_files_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{file} {message}.*download the file again"):
        Tokenizer.load(folder)


def test_a_missing_or_foreign_tokenizer_is_named(folder: Path) -> None:
    Library(models.BPE(vocab={"▁hello": 0, "a": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a byte-level tokenizer \(its tokens hold '▁'\)"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; download the model again"):
        Tokenizer.load(folder)
