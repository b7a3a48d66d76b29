"""The demo model is what its folder says: transformers loads it and continues prompts with the very same tokens.

No text of the model stands here: it may be trained anew. The prompts are beginnings of modules that it knows by heart,
so each token is far more probable than the next one, and any backend that computes right makes the same choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import onekernel
from onekernel import Model
from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import Shape
from onekernel.reference import model as reference
from onekernel.reference.mtp import MTPState, mtp_hidden
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State

PROMPTS: list[str] = json.loads(Path(__file__).with_name("demo_prompts.json").read_text(encoding="utf-8"))["prompts"]
TOKENS = 60  # a prompt
CLEAR = 1.0  # logits, between the best and the second best token: hundreds of times the rounding of bf16 backends
MOST_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def ours() -> Iterator[Model]:
    with onekernel.load("demo", backend="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> PreTrainedModel:
    torch.set_num_threads(1)  # the tests run beside each other
    return AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32).eval()


@cache
def continuations(model: Model) -> list[tuple[list[int], list[int]]]:
    """(prompt, greedy continuation) of every prompt; end tokens do not end it."""
    pairs = []
    for text in PROMPTS:
        session = model.engine.new_session()
        session.extend(model.tokenizer.encode(text))
        prompt = list(session.tokens)
        pairs.append((prompt, [token.id for token in session.generate(max_tokens=TOKENS)]))
    return pairs


def test_there_are_ten_different_prompts_and_500_tokens(ours: Model) -> None:
    assert len(set(PROMPTS)) == 10
    assert sum(len(made) for _, made in continuations(ours)) >= 500
    assert len({tuple(made) for _, made in continuations(ours)}) == 10
    assert all(len(set(made)) > 15 for _, made in continuations(ours))  # text, not one token again and again


def test_greedy_output_equals_transformers_token_for_token(ours: Model, theirs: PreTrainedModel) -> None:
    settings = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0)
    for prompt, made in continuations(ours):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=settings
            )
        assert made == expected[0, len(prompt) :].tolist()


def test_logits_equal_transformers(ours: Model, theirs: PreTrainedModel) -> None:
    prompt, made = continuations(ours)[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt + made])).logits[0].double().numpy()
    with ours.engine.exclusive() as backend:
        found = backend.logits(backend.new_state(), prompt + made)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_choices_are_clear(ours: Model) -> None:
    margins = []
    for prompt, made in continuations(ours):
        with ours.engine.exclusive() as backend:
            logits = backend.logits(backend.new_state(), prompt + made)[len(prompt) - 1 : -1, : ours.tokenizer.size]
        second, best = np.partition(logits, -2)[:, -2:].T
        margins.append(round(float((best - second).min()), 2))
    assert min(margins) >= CLEAR, f"smallest margin of each prompt: {margins}"


def test_its_mtp_head_was_trained_with_it() -> None:
    """It guesses the token after the next far better than chance, on text that the model knows."""
    from onekernel.checkpoint.weights import load_weights

    shape = Shape.load(demo_folder())
    parameters = Parameters.load(load_weights(demo_folder(), shape), shape)
    with onekernel.load("demo", backend="cpu") as model:
        tokens = model.tokenizer.encode(PROMPTS[0])
    hidden = reference.final_hidden(parameters, State.empty(shape), tokens)
    drafted = mtp_hidden(parameters, MTPState.empty(shape), hidden[:-2], tokens[1:-1])
    guesses = reference.head(parameters, drafted).argmax(axis=-1)
    assert np.mean(guesses == tokens[2:]) > 0.5


def test_it_is_small_and_whole() -> None:
    names = {path.name for path in demo_folder().iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert sum(path.stat().st_size for path in demo_folder().iterdir()) <= MOST_BYTES
