"""The reference model against transformers' Qwen3_5 in float32, and its two delta rules against each other."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm, l2norm

from onekernel.checkpoint.shape import Shape
from onekernel.reference import attention, model, norm
from onekernel.reference.delta_rule import chunked_delta_rule, recurrent_delta_rule
from onekernel.reference.mtp import MTPState, mtp_hidden
from onekernel.reference.parameters import Parameters, parameter_count
from onekernel.reference.state import KeyValueCache, State

TOLERANCE = 1e-5  # norm of the difference over norm
LENGTHS = (1, 5, 63, 64, 65, 200)
VARIANTS = [(ratio, tied) for ratio in (1, 2, 3) for tied in (True, False)]  # value heads per key head


class Weight:
    """A tensor of a mapping as the checkpoint reader makes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.detach().numpy()
        self.shape = self.array.shape

    def float32(self) -> np.ndarray:
        return np.array(self.array, np.float32)


def make_config(ratio: int, tied: bool) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=5,
        layer_types=["linear_attention"] * 2 + ["full_attention", "linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=2,
        linear_num_value_heads=2 * ratio,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        },
        attn_implementation="eager",
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Values that make every parameter matter: norms far from their neutral value, decays from slow to fast."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):
            values = torch.log(0.01 + 4 * torch.rand(parameter.shape, generator=generator))
        elif "norm" in name:
            values = 0.5 * values + (1 if "linear_attn.norm" in name else 0)
        elif parameter.ndim == 2 and "embed" not in name:
            values = values * parameter.shape[1] ** -0.5
        elif "conv1d" in name:
            values = values * 0.5
        parameter.data = values


@cache
def pair(ratio: int, tied: bool) -> tuple[Qwen3_5ForCausalLM, Parameters]:
    """The same random model twice: transformers' and ours."""
    torch.set_num_threads(1)  # the tests run beside each other
    config = make_config(ratio, tied)
    theirs = Qwen3_5ForCausalLM(config).eval()
    randomise(theirs, seed=ratio)
    theirs.tie_weights()
    weights = {name.removeprefix("model."): Weight(tensor) for name, tensor in theirs.state_dict().items()}
    return theirs, Parameters.load(weights, Shape.from_config(config.to_dict()))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


@cache
def their_logits(ratio: int, tied: bool, length: int, seed: int) -> np.ndarray:
    """transformers' logits of `random_tokens(length, seed)`."""
    theirs, _ = pair(ratio, tied)
    with torch.no_grad():
        return theirs(torch.tensor([random_tokens(length, seed)]), use_cache=False).logits[0].numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("ratio", "tied"), VARIANTS)
def test_prefill_equals_transformers(ratio: int, tied: bool) -> None:
    _, parameters = pair(ratio, tied)
    for length in LENGTHS:
        tokens = random_tokens(length, seed=length)
        state = State.empty(parameters.shape)
        ours = model.forward(parameters, state, tokens, all_logits=True)
        assert relative_error(ours, their_logits(ratio, tied, length, seed=length)) <= TOLERANCE, length
        assert state.position == length
        last = model.forward(parameters, State.empty(parameters.shape), tokens)
        assert relative_error(last, ours[-1]) <= 1e-6


@pytest.mark.parametrize(("ratio", "tied"), VARIANTS)
@pytest.mark.parametrize("split", [1, 2, 3, 63, 64, 65, 130, 199])
def test_split_anywhere_equals_transformers(ratio: int, tied: bool, split: int) -> None:
    check_split(ratio, tied, [split])


def test_every_split_equals_transformers() -> None:
    for split in range(1, 130):
        check_split(3, False, [split], length=130)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(VARIANTS), st.sets(st.integers(1, 199), min_size=2, max_size=8))
def test_any_split_into_parts_equals_transformers(variant: tuple[int, bool], splits: set[int]) -> None:
    check_split(*variant, sorted(splits))


def check_split(ratio: int, tied: bool, splits: list[int], length: int = 200) -> None:
    """Prefill of `length` tokens, part by part."""
    _, parameters = pair(ratio, tied)
    tokens = random_tokens(length, seed=7)
    state = State.empty(parameters.shape)
    parts = [tokens[start:end] for start, end in pairwise([0, *splits, length])]
    ours = np.concatenate([model.forward(parameters, state, part, all_logits=True) for part in parts])
    assert relative_error(ours, their_logits(ratio, tied, length, seed=7)) <= TOLERANCE, splits


@pytest.mark.parametrize(("ratio", "tied"), VARIANTS)
def test_decode_equals_transformers(ratio: int, tied: bool) -> None:
    """A prompt of 70, then token by token; transformers does the same with its cache."""
    theirs, parameters = pair(ratio, tied)
    tokens = random_tokens(100, seed=9)
    state = State.empty(parameters.shape)
    ours = [model.forward(parameters, state, tokens[:70])]
    ours += [model.forward(parameters, state, [token]) for token in tokens[70:]]
    assert relative_error(np.stack(ours), their_logits(ratio, tied, 100, seed=9)[69:]) <= TOLERANCE
    their_cache = DynamicCache(config=theirs.config)
    with torch.no_grad():
        theirs(torch.tensor([tokens[:70]]), cache=their_cache)
        for token in tokens[70:]:
            result = theirs(torch.tensor([[token]]), cache=their_cache)
    assert relative_error(ours[-1], result.logits[0, -1].numpy()) <= TOLERANCE


def test_a_copy_of_a_state_goes_its_own_way() -> None:
    """Both go on in turns, beyond the capacity of the caches, and each equals a timeline that was never copied."""
    _, parameters = pair(2, False)
    states = [State.empty(parameters.shape) for _ in range(3)]
    for state in states:
        model.forward(parameters, state, random_tokens(30))
    copy = states[0].copy()
    for mine, yours in zip(random_tokens(40, seed=1), random_tokens(40, seed=2), strict=True):
        for state, untouched, token in ((states[0], states[1], mine), (copy, states[2], yours)):
            ours = model.forward(parameters, state, [token])
            np.testing.assert_array_equal(ours, model.forward(parameters, untouched, [token]))


def test_an_interrupted_pass_leaves_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, parameters = pair(2, False)
    state = State.empty(parameters.shape)
    model.forward(parameters, state, random_tokens(30))
    expected = model.forward(parameters, state.copy(), [5])

    calls = []

    def interrupted(*arguments: object) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    original = model.mlp
    monkeypatch.setattr(model, "mlp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.forward(parameters, state, [6])
    monkeypatch.undo()
    assert state.position == 30
    np.testing.assert_array_equal(model.forward(parameters, state, [5]), expected)


def test_attention_in_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    query = random.standard_normal((50, 4, 32), np.float32)
    keys, values = random.standard_normal((2, 2, 80, 32), np.float32)
    whole = attention.causal_attention(query, keys, values)
    for most in (1, 4 * 80 * 7, 4 * 80 * 49):  # 1, 7 and 49 queries at a time
        monkeypatch.setattr(attention, "MOST_SCORES", most)
        np.testing.assert_allclose(attention.causal_attention(query, keys, values), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 2e-5)])
@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 200, 1024])
def test_chunked_delta_rule_equals_recurrent(dtype: type, tolerance: float, tokens: int) -> None:
    random = np.random.default_rng(tokens)
    heads, dim = 2, 128
    query, key = random.standard_normal((2, tokens, heads, dim))
    query /= np.linalg.norm(query, axis=-1, keepdims=True) * dim**0.5
    key += 0.5 * random.standard_normal(dim)  # correlated keys make the triangular system matter
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = random.standard_normal((tokens, heads, dim))
    decay = -random.uniform(0.01, 16, heads) * np.logaddexp(0, random.standard_normal((tokens, heads)))
    decay[:, 0] /= 100  # one head forgets slowly
    beta = random.uniform(0, 1, (tokens, heads))
    state = random.standard_normal((heads, dim, dim))
    inputs = [x.astype(dtype) for x in (query, key, value, decay, beta, state)]
    untouched = inputs[-1].copy()
    outputs, final = recurrent_delta_rule(*inputs)
    chunked_outputs, chunked_final = chunked_delta_rule(*inputs)
    assert chunked_outputs.dtype == chunked_final.dtype == outputs.dtype == final.dtype == dtype
    scale = np.abs(final).max()
    np.testing.assert_allclose(chunked_outputs, outputs, rtol=0, atol=tolerance)
    np.testing.assert_allclose(chunked_final, final, rtol=0, atol=tolerance * max(scale, 1))
    np.testing.assert_array_equal(inputs[-1], untouched)


def test_strong_decay_neither_overflows_nor_warns() -> None:
    """Over a chunk the decay may reach exp(-1000); the differences above the diagonal would overflow."""
    ones = np.ones((70, 1, 128), np.float32)
    decay = np.full((70, 1), -20, np.float32)
    beta = np.full((70, 1), 0.5, np.float32)
    state = np.ones((1, 128, 128), np.float32)
    outputs, final = chunked_delta_rule(ones / 128, ones / 128**0.5, ones, decay, beta, state)
    expected, expected_final = recurrent_delta_rule(ones / 128, ones / 128**0.5, ones, decay, beta, state)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_allclose(final, expected_final, atol=1e-6)


def test_norms_of_small_inputs_equal_transformers() -> None:
    """Where eps decides: it is added to the sum of squares, or to their mean."""
    x = np.random.default_rng(0).standard_normal((3, 128), np.float32) * np.float32(1e-4)
    np.testing.assert_allclose(norm.l2_norm(x), l2norm(torch.tensor(x)).numpy(), rtol=1e-5)
    weight = np.linspace(-1, 1, 128, dtype=np.float32)
    theirs = Qwen3_5RMSNorm(128, eps=1e-6)
    theirs.weight.data = torch.tensor(weight)
    np.testing.assert_allclose(
        norm.rms_norm(x, weight, 1e-6), theirs(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-9
    )


def test_activations_at_the_ends() -> None:
    """No warning and no nan; softplus and silu are linear far right."""
    x = np.array([-1e4, -100, 0, 100, 1e4], np.float32)
    np.testing.assert_allclose(norm.sigmoid(x), [0, 0, 0.5, 1, 1], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(norm.silu(x), [0, 0, 0, 100, 1e4], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(norm.softplus(x), [0, 0, np.log(2), 100, 1e4], rtol=1e-6, atol=1e-30)


class TorchMTP(torch.nn.Module):
    """The MTP head from parts of transformers (which has no MTP for this family itself)."""

    def __init__(self, config: Qwen3_5TextConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(hidden, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(hidden, eps=config.rms_norm_eps)
        self.fc = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = torch.nn.ModuleList([Qwen3_5DecoderLayer(config, layer_idx=2)])  # a full_attention layer
        self.norm = Qwen3_5RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, theirs: Qwen3_5ForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits for all positions but the last."""
        hidden = theirs.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        embedding = theirs.model.embed_tokens(tokens[:, 1:])
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], dim=-1))
        positions = torch.arange(x.shape[1])[None]
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
        rotary = theirs.model.rotary_emb(x, positions[None])
        x = self.norm(self.layers[0](x, position_embeddings=rotary, attention_mask=mask, position_ids=positions))
        return x[0], theirs.lm_head(x)[0]


def test_mtp_head() -> None:
    theirs, parameters = pair(2, False)
    config = make_config(2, False)
    theirs_mtp = TorchMTP(config).eval()
    randomise(theirs_mtp, seed=5)
    weights = {name.removeprefix("model."): Weight(tensor) for name, tensor in theirs.state_dict().items()}
    weights |= {f"mtp.{name}": Weight(tensor) for name, tensor in theirs_mtp.state_dict().items()}
    shape = Shape.from_config({**config.to_dict(), "mtp_num_hidden_layers": 1})
    assert Parameters.load(weights, shape, mtp=False).mtp is None
    parameters = Parameters.load(weights, shape)
    assert parameter_count(shape) == sum(np.prod(weight.shape) for weight in weights.values())

    tokens = random_tokens(90)
    with torch.no_grad():
        expected_hidden, expected_logits = theirs_mtp(theirs, torch.tensor([tokens]))
    hidden = model.final_hidden(parameters, State.empty(shape), tokens)
    state = MTPState.empty(shape)
    first = mtp_hidden(parameters, state, hidden[:60], tokens[1:61])
    copy = state.copy()
    rest = [mtp_hidden(parameters, state, hidden[p : p + 1], [tokens[p + 1]]) for p in range(60, 89)]
    ours = np.concatenate([first, *rest])
    assert relative_error(ours, expected_hidden.numpy()) <= TOLERANCE
    assert relative_error(model.head(parameters, ours), expected_logits.numpy()) <= TOLERANCE
    again = mtp_hidden(parameters, copy, hidden[60:61], [tokens[61]])
    np.testing.assert_array_equal(again, rest[0])


def test_mtp_head_that_was_not_loaded() -> None:
    _, parameters = pair(1, True)
    state = MTPState(0, KeyValueCache.empty(2, 256))
    with pytest.raises(ValueError, match="without an MTP head"):
        mtp_hidden(parameters, state, np.zeros((1, 96), np.float32), [1])


@pytest.mark.parametrize(
    ("tied", "ratio", "hidden", "intermediate", "layers", "heads", "kv_heads", "text", "mtp"),
    [
        (True, 1, 1024, 3584, 24, 8, 2, 752_393_024, 20_452_864),
        (True, 1, 2048, 6144, 24, 8, 2, 1_881_825_088, 60_828_160),
        (True, 2, 2560, 9216, 32, 16, 4, 4_205_751_296, 120_599_552),
        (False, 2, 4096, 12288, 32, 16, 4, 8_953_803_264, 243_290_624),
        (False, 3, 5120, 17408, 64, 24, 4, 26_895_998_464, 424_699_392),
    ],
)
def test_parameter_count_of_the_released_sizes(
    tied: bool, ratio: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, text: int, mtp: int
) -> None:
    config = Qwen3_5TextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        linear_num_value_heads=16 * ratio,
        tie_word_embeddings=tied,
    )
    shape = Shape.from_config({**config.to_dict(), "mtp_num_hidden_layers": 1})
    assert parameter_count(shape, mtp=False) == text
    assert parameter_count(shape) == text + mtp
