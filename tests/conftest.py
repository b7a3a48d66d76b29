"""Fixtures for the tests above the backend: a folder with a tokenizer of bytes, and models on the fake backend."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

# The models of the tests are tiny: a second thread costs them more than it gives, above all beside a second test.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from fakes import WatchedBackend
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from onekernel.api import Model
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import expected_tensors
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


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """A shell lets the commands that it starts in the background ignore ctrl-C, and so all that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def random_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of random float32 weights, small enough to run in an instant."""
    folder = tmp_path_factory.mktemp("random") / "model"
    shutil.copytree(text_folder, folder)
    config = {
        "model_type": "qwen3_5_text",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "vocab_size": 264,
        "tie_word_embeddings": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    random = np.random.default_rng(0)
    header: dict[str, object] = {}
    data = b""
    for name, dims in expected_tensors(Shape.load(folder)).items():
        values = random.standard_normal(dims).astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[f"model.{name}"] = {"dtype": "F32", "shape": dims, "data_offsets": offsets}
        data += values
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
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
