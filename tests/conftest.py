"""Fixtures for the tests above the backend: a folder with a tokenizer of bytes, and models on the fake backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fakes import WatchedBackend
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from onekernel.api import Model
from onekernel.engine import Engine
from onekernel.text.tokenizer import Tokenizer

START, END = 256, 257  # <|im_start|>, <|im_end|>
OPENING = "assistant\n"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    "{%- endif -%}"
)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json (token n is the byte n of ByteLevel's alphabet, then two specials) and its companions."""
    folder = tmp_path_factory.mktemp("text")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = RawTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}), encoding="utf-8"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}), encoding="utf-8")
    return folder


@pytest.fixture
def make_model(text_folder: Path) -> Callable[..., Model]:
    def make(answers: str | list[str], *, prompt: str = "", **backend_options: object) -> Model:
        """A model that continues `prompt` with the first answer, or gives one answer after the other in a chat."""
        tokenizer = Tokenizer.load(text_folder)
        scripts = [[*tokenizer.encode(text), END] for text in ([answers] if isinstance(answers, str) else answers)]
        opening = tokenizer.encode(OPENING)

        def next_token(consumed: Sequence[int], _: int) -> int:
            turns = [i + 1 for i, token in enumerate(consumed) if token == START]
            turns = [i + len(opening) for i in turns if list(consumed[i : i + len(opening)]) == opening]
            begin, turn = (turns[-1], len(turns) - 1) if turns else (len(tokenizer.encode(prompt)), 0)
            script = scripts[turn % len(scripts)]
            return script[min(len(consumed) - begin, len(script) - 1)]

        backend = WatchedBackend(tokenizer.size, next_token=next_token, **backend_options)
        return Model("fake", Engine(backend), tokenizer, text_folder)

    return make
