"""Text to token ids and back, with the model's own tokenizer.json; which tokens end an answer; default sampling."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from onekernel.errors import CheckpointError, InvalidRequest
from onekernel.sampling.params import SamplingParams

# Both end an answer: the first closes a chat turn, the second a document. config.json often names only one of them.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def _byte_of_symbol() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others are moved up from 256.

    Source: GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_SYMBOL = _byte_of_symbol()


class Tokenizer:
    """Byte-level BPE tokenizer of one model.

    Attributes:
        size: number of token ids; logits beyond it belong to padding rows of the embedding.
        stop_token_ids: tokens that end an answer.
        default_sampling: what the model's generation_config.json recommends; greedy if it has none.
    """

    def __init__(self, library: tokenizers.Tokenizer, stop_token_ids: frozenset[int], sampling: SamplingParams) -> None:
        self._library = library
        self._added = library.get_added_tokens_decoder()
        # Every place where a special token begins, also inside another one.
        names = sorted((token.content for token in self._added.values()), key=len, reverse=True)
        self._begin_special = re.compile(f"(?=({'|'.join(map(re.escape, names))}))") if names else None
        self.size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self.stop_token_ids = stop_token_ids
        self.default_sampling = sampling

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and, if it is there, generation_config.json.

        Raises:
            CheckpointError: a file is missing or damaged, or the tokenizer is not a byte-level one.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; download the model again")
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CheckpointError(f"{path} is not a tokenizer ({error}); download the file again") from None
        strange = set().union(*library.get_vocab(with_added_tokens=False)) - BYTE_OF_SYMBOL.keys()
        if strange:
            raise CheckpointError(
                f"{path} is not a byte-level tokenizer (its tokens hold {min(strange)!r}), as all Qwen3.5 models have"
            )
        ids = [library.token_to_id(token) for token in END_TOKENS]
        config = _generation_config(folder)
        return cls(
            library, frozenset([i for i in ids if i is not None] + _end_ids(folder, config)), _sampling(folder, config)
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            parse_special: whether text that looks like a special token ("<|im_end|>") becomes that token. True for
                rendered chat templates; False for text that must not be able to end a turn.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds {text[error.start]!r} at character {error.start}, which is no character "
                "(half of a surrogate pair, or input that was not UTF-8)"
            ) from None
        if parse_special or self._begin_special is None:
            return list(self._library.encode(text, add_special_tokens=False).ids)
        # Cut behind the first character of each special token: no piece then contains one.
        cuts = [0, *(found.start() + 1 for found in self._begin_special.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        encodings = self._library.encode_batch(pieces, add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of one token by its name, say `</think>`; None if there is no such token."""
        found: int | None = self._library.token_to_id(token)
        return found

    def to_json(self) -> str:
        """All of tokenizer.json, for libraries that read it themselves."""
        return str(self._library.to_str())

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """The bytes that a token stands for; none for special tokens if they are skipped.

        Raises:
            InvalidRequest: there is no such token.
        """
        if (added := self._added.get(token)) is not None:
            return b"" if added.special and skip_special else added.content.encode()
        symbols = self._library.id_to_token(token) if 0 <= token < self.size else None
        if symbols is None:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {self.size} tokens")
        return bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download the file again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object; download the file again")
    return config


def _end_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise CheckpointError(f"{folder}/generation_config.json: eos_token_id = {value!r} is not a list of token ids")
    return ids


def _sampling(folder: Path, config: dict[str, Any]) -> SamplingParams:
    if not config.get("do_sample", False):
        return SamplingParams()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: config[name] for name in names if config.get(name) is not None}
    try:
        return SamplingParams(**{"temperature": 1.0, **given})
    except (InvalidRequest, TypeError) as error:
        raise CheckpointError(f"{folder}/generation_config.json: {error}") from None
