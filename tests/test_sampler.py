"""The sampler: its distribution, its sets of kept tokens, penalties, reproducibility, log-probabilities, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TopPLogitsWarper

from onekernel.errors import BackendError, InvalidRequest
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler, gumbel, keep, largest

VOCABULARY = 40
LOGITS = np.random.default_rng(4).normal(0, 1, VOCABULARY).astype(np.float32)


def choose(logits: np.ndarray | list[float], position: int = 0, prompt: tuple[int, ...] = (), **params: object) -> int:
    logits = np.asarray(logits, np.float32)
    return Sampler(SamplingParams(**params), len(logits), prompt).choose(logits, position).id  # type: ignore[arg-type]


def expected_probabilities(temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The plain definition: sort, cut, renormalise after each cut. Float64."""
    scaled = LOGITS.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = sorted(range(VOCABULARY), key=lambda i: (-LOGITS[i], i))
    if top_k:
        order = order[:top_k]
    kept, total, reached = [], probabilities[order].sum(), 0.0
    for i in order:
        kept.append(i)
        reached += probabilities[i] / total
        if reached >= top_p:
            break
    kept = [i for i in kept if probabilities[i] >= min_p * probabilities.max()]
    result = np.zeros(VOCABULARY)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1, 0, 1, 0), (0.6, 0, 1, 0), (2, 0, 1, 0), (1, 7, 1, 0), (0.8, 0, 0.7, 0), (1, 0, 1, 0.1), (1.5, 20, 0.9, 0.05)],
)
def test_frequencies(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Chi-square of 6000 draws at consecutive positions, as one generation makes them."""
    probabilities = expected_probabilities(temperature, top_k, top_p, min_p)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=11)
    sampler = Sampler(params, VOCABULARY)
    draws = 6000
    counts = np.bincount([sampler.choose(LOGITS, p).id for p in range(draws)], minlength=VOCABULARY)
    assert not counts[probabilities == 0].any()
    assert chi_square(counts, probabilities) > 1e-3


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of `counts` under `probabilities`; outcomes that are expected less than 5 times count as one."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    filled = expected > 0
    assert not observed[~filled].any()
    return float(stats.chisquare(observed[filled], expected[filled]).pvalue)


def test_frequencies_over_seeds() -> None:
    """Many requests, each with a seed of its own, sample the same position: neighbouring and random seeds."""
    probabilities = expected_probabilities(1.2, 12, 0.95, 0)
    random = np.random.default_rng(8).integers(0, 2**64, 4000, np.uint64)
    for seeds in (range(4000), [int(seed) for seed in random]):
        params = [SamplingParams(temperature=1.2, top_k=12, top_p=0.95, seed=seed) for seed in seeds]
        chosen = [Sampler(each, VOCABULARY).choose(LOGITS, 17).id for each in params]
        assert chi_square(np.bincount(chosen, minlength=VOCABULARY), probabilities) > 1e-3


def test_frequencies_of_neighbours() -> None:
    """The tokens at two consecutive positions are independent of each other."""
    logits = np.array([0.5, 0, -0.5, 1, 0.2], np.float32)
    single = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    sampler = Sampler(SamplingParams(temperature=1, seed=99), 5)
    chosen = np.array([sampler.choose(logits, position).id for position in range(12000)])
    pairs = np.bincount(5 * chosen[::2] + chosen[1::2], minlength=25)
    assert chi_square(pairs, np.outer(single, single).ravel().astype(np.float64)) > 1e-3


def test_frequencies_with_penalties_and_bias() -> None:
    """Of the second token, after a first one that is certain: the logits are adjusted before the draw."""
    base = np.array([1.0, 0.5, 0, -0.5, 2.0], np.float32)
    certain = np.array([0, 0, 90, 0, 0], np.float32)
    adjusted = base.astype(np.float64).copy()
    adjusted[[0, 4]] /= 1.3  # in the prompt, positive
    adjusted[3] *= 1.3  # in the prompt, negative
    adjusted[2] = adjusted[2] / 1.3 - 0.4 - 0.2  # generated once
    adjusted[1] += 0.7
    expected = np.exp(adjusted / 0.9) / np.exp(adjusted / 0.9).sum()
    counts = np.zeros(5, np.int64)
    for seed in range(5000):
        params = SamplingParams(
            temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
            logit_bias={1: 0.7}, seed=seed,
        )  # fmt: skip
        sampler = Sampler(params, 5, prompt=[0, 3, 4])
        assert sampler.choose(certain, 10).id == 2
        counts[sampler.choose(base, 11).id] += 1
    assert chi_square(counts, expected) > 1e-3


def test_noise_is_gumbel_and_independent() -> None:
    noise = np.stack([gumbel(5, position, np.arange(2000)) for position in range(20)])
    assert noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    for neighbours in (noise[:, 1:] * noise[:, :-1], noise[1:] * noise[:-1]):
        mean = stats.gumbel_r.mean()
        assert abs(neighbours.mean() - mean**2) < 5 * noise.var() / neighbours.size**0.5 + 0.02


def test_noise_depends_on_seed_position_and_id_alone() -> None:
    everything = gumbel(2**63 + 5, 2**33 + 1, np.arange(100))
    some = np.array([0, 3, 4, 5, 42, 99])
    np.testing.assert_array_equal(gumbel(2**63 + 5, 2**33 + 1, some), everything[some])
    for seed, position in ((5, 2**33 + 1), (2**63 + 5, 1), (2**63 + 5, 2**33 + 2), (2**63 + 6, 2**33 + 1)):
        assert (gumbel(seed, position, np.arange(100)) != everything).all()


def test_noise_is_frozen() -> None:
    """Seeds must give the same text in every release and on every backend."""
    bits = gumbel(1234, 56, np.array([0, 1, 2, 3, 4, 248_000])).view(np.uint32).tolist()
    assert bits == [0x3D69741E, 0xBF7AD693, 0xBF8C2F1E, 0x3F846598, 0x3D39DB51, 0x3DD5440D]


def test_same_seed_same_tokens() -> None:
    def generation(seed: int) -> list[SampledToken]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed, frequency_penalty=0.1), VOCABULARY)
        return [sampler.choose(LOGITS, position) for position in range(50)]

    assert generation(1) == generation(1)
    assert generation(1) != generation(2)


def naive_set(scores: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[list[int], list[int]]:
    """With exact fractions instead of rounding: what must be kept, and what may be (a cut that rounding decides)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: top_k or None]
    weights = {i: np.exp(float(scores[i])) for i in order}
    total = sum(weights.values())
    must, may, reached = [], [], 0.0
    for i in order:
        if i == order[0] or reached < (top_p - 1e-6) * total:
            must.append(i)
        if top_p == 1 or i == order[0] or reached < (top_p + 1e-6) * total:
            may.append(i)
        reached += weights[i]
    must = [i for i in must if weights[i] >= min_p * (1 + 1e-6)]
    return sorted(must), sorted(i for i in may if weights[i] >= min_p * (1 - 1e-6))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 0), min_size=1, max_size=60),
    st.integers(0, 70),
    st.floats(0.01, 1),
    st.floats(0, 0.99),
)
def test_kept_sets(eighths: list[int], top_k: int, top_p: float, min_p: float) -> None:
    scores = np.array(eighths, np.float32) / 8  # many ties
    scores -= scores.max()
    kept = keep(scores, top_k, top_p, min_p).tolist()
    must, may = naive_set(scores, top_k, top_p, min_p)
    assert kept == sorted(set(kept))
    assert set(must) <= set(kept) <= set(may)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 0.99])
def test_top_p_and_min_p_agree_with_transformers(p: float) -> None:
    scores = np.random.default_rng(1).normal(0, 3, 5000).astype(np.float32)
    scores -= scores.max()
    for warper, kept in ((TopPLogitsWarper(p), keep(scores, 0, p, 0)), (MinPLogitsWarper(p), keep(scores, 0, 1, p))):
        theirs = torch.isfinite(warper(torch.zeros(1, 1), torch.tensor(scores[None])))[0].nonzero()[:, 0]
        assert kept.tolist() == theirs.tolist()


def test_ties_go_to_the_lowest_id() -> None:
    assert choose([1, 3, 3, 3]) == 1
    flat = np.zeros(100, np.float32)
    assert largest(flat, 3).tolist() == [0, 1, 2]
    assert keep(flat, 3, 1, 0).tolist() == [0, 1, 2]
    assert keep(flat, 0, 0.05, 0).tolist() == [0, 1, 2, 3, 4]
    assert keep(np.array([-1, 0, -1, -1], np.float32), 3, 1, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0, 1e-6, 0.7, 100])
def test_one_candidate_is_always_chosen(temperature: float) -> None:
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999}):
        for seed in range(5):
            assert choose([0, 1, 9, 2], temperature=temperature, seed=seed, **params) == 2


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = np.array([2.0, 1.5, 0], np.float32)
    presence = Sampler(SamplingParams(presence_penalty=0.75), 3, prompt=[1, 1])
    assert [presence.choose(logits, p).id for p in range(3)] == [0, 1, 0]  # 2, then 1.25 < 1.5, then 1.25 > 0.75
    frequency = Sampler(SamplingParams(frequency_penalty=0.75), 3, prompt=[1, 1])
    assert [frequency.choose(logits, p).id for p in range(5)] == [0, 1, 0, 1, 0]


def test_frequency_penalty_grows_with_the_count() -> None:
    sampler = Sampler(SamplingParams(frequency_penalty=1), 2)
    assert [sampler.choose(np.array([3.5, 0.0]), p).id for p in range(6)] == [0, 0, 0, 0, 1, 0]


def test_repetition_counts_prompt_and_output() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    assert choose(logits, prompt=(0,), repetition_penalty=1.5) == 1  # 2 / 1.5 < 1.5
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), 4)
    assert [sampler.choose(logits, p).id for p in range(3)] == [0, 1, 0]
    assert choose(logits[2:], prompt=(0,), repetition_penalty=1.5) == 1  # -1 * 1.5 < -1.2
    assert choose(logits[2:], prompt=(0, 7), repetition_penalty=1.5) == 1  # 7: a row of padding in the prompt


def test_bias_comes_after_penalties_and_before_the_rest() -> None:
    assert choose([0, 1, 2], logit_bias={0: 2.5}) == 0
    assert choose([0, 1, 2], logit_bias={2: -np.inf}) == 1
    assert choose([0, 1, 2], logit_bias={0: 5}, temperature=1, top_k=1, seed=0) == 0
    # Bias first would make the logit of 0 positive and divide it.
    assert choose([-1, 3], prompt=(0,), logit_bias={0: 6}, repetition_penalty=2) == 0


def test_padding_is_never_chosen() -> None:
    logits = np.zeros(64, np.float32)
    logits[50:] = 30
    for params in (SamplingParams(), SamplingParams(temperature=100, seed=1), SamplingParams(top_k=1)):
        sampler = Sampler(params, 50)
        assert all(sampler.choose(logits, p).id < 50 for p in range(200))
    token = Sampler(SamplingParams(logprobs=20), 50).choose(logits, 0)
    assert token.logprob == pytest.approx(-np.log(50))
    assert all(i < 50 for i, _ in token.top_logprobs)
    with pytest.raises(InvalidRequest, match=r"logit_bias\[50\].*49"):
        Sampler(SamplingParams(logit_bias={50: 1}), 50)


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, seed=4, logprobs=3, logit_bias={5: -np.inf}, presence_penalty=1)
    token = Sampler(params, VOCABULARY).choose(LOGITS, 0)
    expected = torch.log_softmax(torch.tensor(LOGITS), 0)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
    top = torch.topk(expected, 3)
    assert [i for i, _ in token.top_logprobs] == top.indices.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert Sampler(SamplingParams(logprobs=0), VOCABULARY).choose(LOGITS, 0).top_logprobs == ()
    assert Sampler(SamplingParams(), VOCABULARY).choose(LOGITS, 0).logprob is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    for params in ({}, {"temperature": 1, "seed": 0}):
        with pytest.raises(BackendError, match=f"{bad} at position 17"):
            choose([0, bad, 1], position=17, **params)
    assert choose([-np.inf, 1, 0]) == 1


def test_a_bias_that_forbids_everything() -> None:
    for params in ({}, {"temperature": 1, "seed": 0, "top_p": 0.5}):
        with pytest.raises(InvalidRequest, match="forbids every token"):
            choose([0, 1], logit_bias={0: -np.inf, 1: -np.inf}, **params)


def test_sampling_needs_a_seed() -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        Sampler(SamplingParams(temperature=1), 5)
    Sampler(SamplingParams(), 5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 40),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1, exclude_max=True),
        presence_penalty=st.floats(-100, 100),
        frequency_penalty=st.floats(-100, 100),
        repetition_penalty=st.floats(0.01, 100),
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.none() | st.integers(0, 20),
    ),
)
def test_any_parameters_choose_a_token(values: list[float], params: SamplingParams) -> None:
    logits = np.array(values, np.float32)
    before = logits.copy()
    sampler = Sampler(params, len(logits), prompt=[0])
    for position in range(3):
        token = sampler.choose(logits, position)
        assert 0 <= token.id < len(logits)
        assert len(token.top_logprobs) == min(params.logprobs or 0, len(logits))
    np.testing.assert_array_equal(logits, before)


class Only:
    """A constraint: these tokens, and a record of what was chosen."""

    def __init__(self, *tokens: int) -> None:
        self.mask = np.isin(np.arange(VOCABULARY), tokens)
        self.chosen: list[int] = []

    def allowed(self) -> np.ndarray | None:
        return self.mask if self.mask.any() else None

    def accept(self, token: int) -> None:
        self.chosen.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_leaves_only_what_it_allows_and_hears_what_was_chosen(temperature: float) -> None:
    constraint = Only(3, 17)
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), VOCABULARY, constraint=constraint)
    chosen = [sampler.choose(LOGITS, position).id for position in range(40)]
    assert set(chosen) <= {3, 17}
    assert constraint.chosen == chosen
    assert temperature or set(chosen) == {max(3, 17, key=lambda token: LOGITS[token])}


def test_a_constraint_may_allow_everything() -> None:
    free = Sampler(SamplingParams(), VOCABULARY, constraint=Only()).choose(LOGITS, 0)
    assert free.id == int(LOGITS.argmax())


def test_log_probabilities_are_the_models_under_a_constraint_too() -> None:
    params = SamplingParams(logprobs=2)
    held = Sampler(params, VOCABULARY, constraint=Only(3)).choose(LOGITS, 0)
    free = Sampler(params, VOCABULARY).choose(LOGITS, 0)
    assert held.id == 3
    assert held.top_logprobs == free.top_logprobs
    assert held.logprob is not None
    assert held.logprob < held.top_logprobs[0][1]


def test_a_constraint_and_a_bias_that_leave_nothing_are_an_error() -> None:
    params = SamplingParams(logit_bias={3: -np.inf})
    with pytest.raises(InvalidRequest, match="forbids every token"):
        Sampler(params, VOCABULARY, constraint=Only(3)).choose(LOGITS, 0)


def test_tokens_generated_in_an_earlier_part_count_for_the_penalties() -> None:
    params = SamplingParams(frequency_penalty=1.0, presence_penalty=0.5)
    whole = Sampler(params, VOCABULARY, [1, 2])
    tokens = [1, 2]
    for position in range(2, 30):
        token = whole.choose(LOGITS, position).id
        part = Sampler(params, VOCABULARY, tokens, generated=position - 2)
        assert part.choose(LOGITS, position).id == token
        tokens.append(token)
