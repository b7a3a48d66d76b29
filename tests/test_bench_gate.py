"""The correctness gate: a correct bf16 engine passes, and every planted mistake is caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onekernel.bench import gate
from onekernel.bench.oracle import Oracle, consult, round_to_bf16
from onekernel.bench.workload import GATE_TOKENS, prompt
from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.random_weights import to_bfloat16
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.reference import attention, linear_attention, model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State

VOCABULARY = 3012  # tokens of the demo model


@cache
def demo() -> tuple[Oracle, Parameters]:
    folder = demo_folder()
    shape = Shape.load(folder)
    weights = load_weights(folder, shape)
    return consult(weights, shape, prompt(GATE_TOKENS, 0, VOCABULARY)), Parameters.load(weights, shape, mtp=False)


def forward() -> np.ndarray:
    oracle, parameters = demo()
    return model.forward(parameters, State.empty(parameters.shape), oracle.tokens, all_logits=True)


def test_the_layerwise_oracle_is_the_reference() -> None:
    assert np.abs(demo()[0].exact - forward()).max() < 1e-3


def test_rounding_is_that_of_torch() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert (round_to_bf16(values) == expected.float().numpy()).all()
    assert (to_bfloat16(values).view(np.int16) == expected.view(torch.int16).numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correct_engine_agrees(dtype: torch.dtype) -> None:
    oracle, _ = demo()
    theirs = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=dtype)
    with torch.no_grad():
        logits = theirs(torch.tensor([oracle.tokens])).logits[0].float().numpy()
    found = gate.judge(oracle, logits, VOCABULARY)
    assert found.verdict == gate.AGREES, found
    assert found.clear > GATE_TOKENS / 2
    assert found.kl_rounding is not None
    assert found.kl is not None
    assert found.kl < (gate.ALLOWANCE / 2) * found.kl_rounding  # with room: the allowance is no tight fit


def rotate_in_place(x: np.ndarray, position: int, shape: Shape) -> np.ndarray:
    """RoPE whose second half is turned with the already turned first half."""
    half = shape.rotary_dim // 2
    frequency = (shape.rope_theta ** (-np.arange(half) / half)).astype(np.float32)
    angle = np.arange(position, position + len(x), dtype=np.float32)[:, None, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    x = x.copy()
    x[..., :half] = x[..., :half] * cos - x[..., half : 2 * half] * sin
    x[..., half : 2 * half] = x[..., half : 2 * half] * cos + x[..., :half] * sin
    return x


def delta_before_decay(query, key, value, decay, beta, state):  # type: ignore[no-untyped-def]
    """The delta is read before the state has faded."""
    output = np.empty_like(value)
    for t in range(len(value)):
        delta = beta[t][:, None] * (value[t] - np.einsum("nk,nkv->nv", key[t], state))
        state = state * np.exp(decay[t])[:, None, None] + key[t][:, :, None] * delta[:, None, :]
        output[t] = np.einsum("nk,nkv->nv", query[t], state)
    return output, state


rope, causal = attention.rope, attention.causal_attention


def position_behind_by_one(x: np.ndarray, position: int, shape: Shape) -> np.ndarray:
    """Keys and queries of the first token at position 1: harmless, as only distances count ..."""
    return rope(x, position + 1, shape)


def blind_to_the_newest(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The race of a kernel that reads the cache before the newest key is there."""
    late = keys.copy()
    late[:, -1] = 0
    return causal(query, late, values) if len(query) == 1 else causal(query, keys, np.roll(values, 1, axis=1))


MISTAKES: list[tuple[object, str, Callable[..., object]]] = [
    (attention, "rope", rotate_in_place),
    (attention, "causal_attention", blind_to_the_newest),
    (attention, "sigmoid", lambda x: 1 / (1 + np.exp(-x)) * x),  # SiLU for the output gate
    (linear_attention, "chunked_delta_rule", delta_before_decay),
    (linear_attention, "l2_norm", lambda x: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) / 8),
    (linear_attention, "gated_rms_norm", lambda x, gate, w, eps: x * w * gate),
]


@pytest.mark.parametrize(("module", "name", "mistake"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught(
    module: object, name: str, mistake: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, _ = demo()
    monkeypatch.setattr(module, name, mistake)
    found = gate.judge(oracle, forward(), VOCABULARY)
    assert found.verdict == gate.WRONG, found
    assert "KL" in found.reason


def test_what_changes_nothing_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, _ = demo()
    monkeypatch.setattr(attention, "rope", position_behind_by_one)
    assert gate.judge(oracle, forward(), VOCABULARY).verdict == gate.AGREES


def test_a_wrong_engine_that_tells_only_tokens_is_caught() -> None:
    oracle, _ = demo()
    best = oracle.exact[:, :VOCABULARY].argmax(-1)
    assert gate.judge(oracle, best.tolist(), VOCABULARY).verdict == gate.AGREES
    shifted = np.roll(best, 1).tolist()
    assert gate.judge(oracle, shifted, VOCABULARY).verdict == gate.WRONG
    some_wrong = best.copy()
    some_wrong[::12] = (some_wrong[::12] + 1) % VOCABULARY
    assert gate.judge(oracle, some_wrong.tolist(), VOCABULARY).verdict == gate.WRONG


def test_tokens_that_cannot_be_told_are_left_aside() -> None:
    oracle, _ = demo()
    best: list[int | None] = list(oracle.exact[:, :VOCABULARY].argmax(-1))
    best[::3] = [None] * len(best[::3])
    found = gate.judge(oracle, best, VOCABULARY)
    assert (found.verdict, found.tokens) == (gate.AGREES, GATE_TOKENS - 64)
    assert gate.judge(oracle, [None] * GATE_TOKENS, VOCABULARY).verdict == gate.UNCHECKED


def test_answers_of_the_wrong_form_are_wrong() -> None:
    oracle, _ = demo()
    assert gate.judge(oracle, oracle.exact[:-1], VOCABULARY).verdict == gate.WRONG
    assert gate.judge(oracle, oracle.exact[:, :100], VOCABULARY).verdict == gate.WRONG
    assert gate.judge(oracle, [1, 2, 3], VOCABULARY).verdict == gate.WRONG
    broken = oracle.exact.copy()
    broken[5, 7] = np.nan
    assert "NaN" in gate.judge(oracle, broken, VOCABULARY).reason


def test_a_quantised_engine_is_named_so_and_not_passed_off_as_exact() -> None:
    oracle, _ = demo()
    noisy = oracle.exact + np.random.default_rng(0).normal(0, 0.5, oracle.exact.shape).astype(np.float32)
    assert gate.judge(oracle, noisy, VOCABULARY, weights="q4_0").verdict == gate.QUANTISED
    assert gate.judge(oracle, noisy, VOCABULARY, weights="bf16").verdict == gate.WRONG


def test_a_nearly_right_engine_of_random_weights_is_caught(tmp_path: Path) -> None:
    """One of eight layers misses its norm's `1 +`: a subtle mistake on a model without any trained structure."""
    from bench_models import TOKENS, write_small

    folder = write_small(tmp_path / "small")
    shape = Shape.load(folder)
    weights = load_weights(folder, shape)
    tokens = prompt(GATE_TOKENS, 0, TOKENS)
    oracle = consult(weights, shape, tokens)
    parameters = Parameters.load(weights, shape, mtp=False)
    parameters.layers[3].post_attention_layernorm[:] = 0
    logits = model.forward(parameters, State.empty(shape), tokens, all_logits=True)
    assert gate.judge(oracle, logits, TOKENS).verdict == gate.WRONG
