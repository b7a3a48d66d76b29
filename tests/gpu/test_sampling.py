"""Sampling on the GPU against onekernel/sampling: the same tokens for the GPU's own logits, whatever the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import SIZES, VOCABULARY_SIZE, random_weights

import onekernel
from onekernel.backend.cuda import CudaBackend
from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights, load_weights
from onekernel.errors import BackendError, InvalidRequest
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu, find_gpu
from onekernel.gpu.layout import Layout
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler

pytestmark = pytest.mark.gpu

DEMO = Path(onekernel.__file__).parent / "demo"
DEMO_VOCABULARY = 3012
PROMPT = [5, 77, 301, 1024, 5, 9]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    try:
        return find_gpu()
    except BackendError as error:
        pytest.skip(str(error))


def load(gpu: Gpu, shape: Shape, vocabulary_size: int, weights: Weights, blocks: int | None = None) -> CudaBackend:
    layout = Layout.plan(shape, vocabulary_size, gpu.sm_count, gpu.shared_memory)
    if blocks is not None:
        layout = dataclasses.replace(layout, blocks=min(blocks, layout.blocks))
    return CudaBackend(Decoder(gpu, layout, weights), vocabulary_size)


@pytest.fixture(scope="module")
def demo(gpu: Gpu) -> Iterator[CudaBackend]:
    shape = Shape.load(DEMO)
    backend = load(gpu, shape, DEMO_VOCABULARY, load_weights(DEMO, shape))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def large_weights() -> tuple[Shape, Weights]:
    shape = dataclasses.replace(SIZES["0.8b"], layer_types=SIZES["0.8b"].layer_types[:4])
    return shape, random_weights(shape)


@pytest.fixture(scope="module", params=[None, 32], ids=["all blocks", "32 blocks"])
def large(gpu: Gpu, large_weights: tuple[Shape, Weights], request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    """The true vocabulary of 248,077 tokens. Random rows of the LM head occur many times: logits with many exact ties.

    32 blocks have more rows each than a block's histogram takes at once.
    """
    shape, weights = large_weights
    backend = load(gpu, shape, VOCABULARY_SIZE, weights, request.param)
    yield backend
    backend.close()


def generate(
    backend: CudaBackend,
    params: SamplingParams,
    count: int,
    per_launch: int = 64,
    stop_tokens: frozenset[int] = frozenset(),
    prompt: Sequence[int] = PROMPT,
) -> list[SampledToken]:
    """`count` tokens behind the prompt, in launches of at most `per_launch`."""
    state = backend.new_state()
    sampler = Sampler(params, backend.vocabulary_size, prompt)
    made: list[SampledToken] = []
    tokens = list(prompt)
    while len(made) < count:
        launch = min(per_launch, count - len(made))
        made += backend.decoder.generate(state, tokens, sampler, launch, stop_tokens)
        assert state.position == len(prompt) + len(made) - 1
        tokens = [made[-1].id]
        if made[-1].id in stop_tokens:
            break
    return made


def check(backend: CudaBackend, params: SamplingParams, made: list[SampledToken]) -> None:
    """Compare with the reference sampler on the GPU's own logits."""
    ids = [token.id for token in made]
    logits = backend.logits(backend.new_state(), [*PROMPT, *ids[:-1]])[len(PROMPT) - 1 :]
    sampler = Sampler(params, backend.vocabulary_size, PROMPT)
    expected = [sampler.choose(row, len(PROMPT) + i) for i, row in enumerate(logits)]
    wrong = [(i, e.id, g) for i, (e, g) in enumerate(zip(expected, ids, strict=True)) if e.id != g]
    assert not wrong, f"{len(wrong)} of {len(ids)} tokens differ; the first (index, expected, got): {wrong[:5]}"
    for index, (want, got) in enumerate(zip(expected, made, strict=True)):
        assert (got.logprob is None) == (want.logprob is None)
        if want.logprob is not None:
            assert got.logprob == pytest.approx(want.logprob, abs=1e-5, rel=0), index
        assert [i for i, _ in got.top_logprobs] == [i for i, _ in want.top_logprobs], index
        assert [p for _, p in got.top_logprobs] == pytest.approx([p for _, p in want.top_logprobs], abs=1e-5), index


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "hot": {"temperature": 100.0},
    "cold": {"temperature": 2e-6},
    "top_k 1": {"temperature": 1.0, "top_k": 1},
    "top_k 20": {"temperature": 1.5, "top_k": 20},
    "top_k 1000": {"temperature": 50.0, "top_k": 1000},
    "top_k nearly all": {"temperature": 50.0, "top_k": DEMO_VOCABULARY - 1},
    "top_k all": {"temperature": 50.0, "top_k": 10**9},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_p flat": {"temperature": 100.0, "top_p": 0.5},
    "top_p tiny": {"temperature": 3.0, "top_p": 1e-9},
    "top_p nearly 1": {"temperature": 3.0, "top_p": 0.9999999999},
    "min_p": {"temperature": 3.0, "min_p": 0.05},
    "all three": {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.3},
    "all penalties": {
        "temperature": 0.8,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "repetition_penalty": 0.9,
        "top_p": 0.95,
    },
    "bias": {"logit_bias": {7: 1000.0, 8: 1000.0, 9: -1000.0, 10: -np.inf}, "temperature": 2.0},
    "greedy logprobs": {"logprobs": 5},
    "logprobs": {"temperature": 1.0, "top_k": 40, "logprobs": 20},
    "logprobs of the token alone": {"temperature": 1.0, "logprobs": 0},
    "large seed": {"temperature": 1.0, "seed": 2**64 - 1},
}


@pytest.mark.parametrize("name", CASES)
def test_demo_tokens_are_those_of_the_reference(demo: CudaBackend, name: str) -> None:
    params = SamplingParams(**({"seed": 1234} | CASES[name]))
    check(demo, params, generate(demo, params, 200))


def random_params(random: np.random.Generator, vocabulary_size: int) -> SamplingParams:
    def sometimes(value: Any, otherwise: Any, probability: float = 0.4) -> Any:
        return value if random.random() < probability else otherwise

    biased = random.integers(0, vocabulary_size, random.integers(1, 200))
    # Few different values: with logits that rounding takes to the same number, many ties.
    bias = random.choice([-np.inf, -1000, -3, 0.5, 4, 999, 1000], len(biased))
    return SamplingParams(
        temperature=sometimes(float(random.choice([0, 1e-3, 0.1, 50])), float(random.uniform(0.2, 3))),
        top_k=sometimes(int(random.choice([1, 2, 5, 20, 64, 500, 2900])), 0, 0.6),
        top_p=sometimes(float(random.choice([0.01, 0.3, 0.8, 0.95, 0.999])), 1.0, 0.6),
        min_p=sometimes(float(random.uniform(0, 0.3)), 0.0),
        presence_penalty=sometimes(float(random.uniform(-2, 2)), 0.0, 0.3),
        frequency_penalty=sometimes(float(random.uniform(-1, 1)), 0.0, 0.3),
        repetition_penalty=sometimes(float(random.uniform(0.7, 1.5)), 1.0, 0.3),
        logit_bias=sometimes(dict(zip(biased.tolist(), bias.tolist(), strict=True)), {}, 0.3),
        seed=int(random.integers(0, 2**63)),
        logprobs=sometimes(int(random.integers(0, 21)), None, 0.3),
    )


@pytest.mark.parametrize("number", range(40))
def test_demo_random_parameters(demo: CudaBackend, number: int) -> None:
    random = np.random.default_rng(number)
    params = random_params(random, DEMO_VOCABULARY)
    check(demo, params, generate(demo, params, 100, int(random.choice([1, 7, 64, 100]))))


@pytest.mark.parametrize("number", range(8))
def test_any_number_of_tokens_per_launch(demo: CudaBackend, number: int) -> None:
    params = random_params(np.random.default_rng(100 + number), DEMO_VOCABULARY)
    once = generate(demo, params, 150, 150)
    for per_launch in (1, 7, 64):
        assert generate(demo, params, 150, per_launch) == once


@pytest.mark.parametrize(
    "name", ["temperature", "all three", "top_p flat", "all penalties", "logprobs", "top_p nearly 1"]
)
def test_true_vocabulary(large: CudaBackend, name: str) -> None:
    params = SamplingParams(**({"seed": 99} | CASES[name]))
    check(large, params, generate(large, params, 24))


@pytest.mark.parametrize("number", range(10))
def test_true_vocabulary_with_ties(large: CudaBackend, number: int) -> None:
    """Low temperatures, so that the cuts fall among a few thousand tokens, and cuts between equal logits."""
    random = np.random.default_rng(200 + number)
    params = dataclasses.replace(
        random_params(random, VOCABULARY_SIZE),
        temperature=float(random.choice([0.05, 0.3, 1])),
        top_k=int(random.choice([0, 3, 10, 33, 1001, 100_000])),
        logprobs=20,
    )
    check(large, params, generate(large, params, 12))


def test_ties_are_there(large: CudaBackend) -> None:
    """What the two tests above are good for."""
    row = large.logits(large.new_state(), PROMPT)[-1][:VOCABULARY_SIZE]
    assert len(np.unique(row)) < len(row) / 2


def test_a_stop_token_ends_a_sampled_launch(demo: CudaBackend) -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=3)
    ids = [token.id for token in generate(demo, params, 60)]
    stop = ids[40]
    made = generate(demo, params, 60, stop_tokens=frozenset({stop}))
    assert [token.id for token in made] == ids[: ids.index(stop) + 1]


def test_closing_stops_a_sampled_launch(demo: CudaBackend) -> None:
    params = SamplingParams(temperature=1.0, top_k=40, presence_penalty=0.5, seed=8, logprobs=2)
    expected = generate(demo, params, 40)
    state = demo.new_state()
    stream = demo.generate(state, PROMPT, [], params, 1000, frozenset())
    some = [next(stream) for _ in range(10)]
    stream.close()
    assert some == expected[:10]
    assert 10 + len(PROMPT) - 1 <= state.position < 1000
    assert generate(demo, params, 40) == expected


def test_a_bias_that_forbids_everything(demo: CudaBackend) -> None:
    bias = dict.fromkeys(range(DEMO_VOCABULARY), -np.inf)
    for params in ({}, {"temperature": 1.0, "seed": 0, "top_p": 0.5}):
        with pytest.raises(InvalidRequest, match="forbids every token"):
            generate(demo, SamplingParams(logit_bias=bias, **params), 5)
    params = SamplingParams(logit_bias=bias | {42: 0.0}, temperature=1.0, seed=0)
    assert {token.id for token in generate(demo, params, 5)} == {42}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(gpu: Gpu, bad: float) -> None:
    """Rows of a damaged LM head: the same errors as the reference's, and the engine goes on."""
    shape = dataclasses.replace(Shape.load(DEMO), tied=False)
    weights = load_weights(DEMO, Shape.load(DEMO))
    embedding = weights["embed_tokens.weight"]
    tensors = {name: weights[name] for name in weights}
    data = np.array(embedding.data)
    row = data[2000]
    if bad == np.inf:
        row[:] = np.where(row >> 15, 0xFF7F, 0x7F7F).astype(np.uint16)  # the largest bf16: some sums overflow
    else:
        row[:] = 0x7FC0
    tensors["lm_head.weight"] = Tensor("lm_head.weight", "BF16", embedding.shape, data)
    backend = load(gpu, shape, DEMO_VOCABULARY, Weights(tensors))
    logits = backend.logits(backend.new_state(), PROMPT)[-1][:DEMO_VOCABULARY]
    for params in (SamplingParams(), SamplingParams(temperature=1, seed=0, top_k=5), SamplingParams(logprobs=3)):
        if np.isfinite(logits.max()):
            assert bad == np.inf  # minus infinity is a logit like others
            check(backend, params, generate(backend, params, 1))
            continue
        with pytest.raises(BackendError) as expected:
            Sampler(params, DEMO_VOCABULARY, PROMPT).choose(logits, len(PROMPT))
        with pytest.raises(BackendError) as raised:
            generate(backend, params, 5)
        assert str(raised.value) == str(expected.value)
    backend.close()
