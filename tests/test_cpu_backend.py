"""The CPU backend: generate, snapshots, limits, memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel.backend import cpu
from onekernel.backend.base import Backend
from onekernel.backend.cpu import CpuBackend, memory_needed
from onekernel.backend.memory import available_memory
from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory
from onekernel.reference import model
from onekernel.reference.parameters import Parameters, parameter_count
from onekernel.reference.state import State
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

SHAPE = Shape(
    hidden=32,
    intermediate=48,
    layer_types=(LINEAR, LINEAR, LINEAR, FULL),
    vocab=120,
    tied=True,
    heads=2,
    kv_heads=1,
    head_dim=32,
    rotary_dim=8,
    rope_theta=1e7,
    key_heads=1,
    value_heads=2,
    key_head_dim=16,
    value_head_dim=16,
    conv_kernel=4,
    norm_eps=1e-6,
    max_context=2000,
    mtp_layers=0,
    eos_token_ids=(),
)
VOCABULARY = 100
NEVER: frozenset[int] = frozenset()
SAMPLED = SamplingParams(temperature=1, seed=3, repetition_penalty=1.2, logprobs=2)


class RandomWeights(dict[str, "RandomWeight"]):
    """Any name, with the dimensions that the name stands for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dims = {
            "embed_tokens": (shape.vocab, shape.hidden),
            "gate_proj": (shape.intermediate, shape.hidden),
            "up_proj": (shape.intermediate, shape.hidden),
            "down_proj": (shape.hidden, shape.intermediate),
            "in_proj_qkv": (shape.conv_dim, shape.hidden),
            "in_proj_z": (shape.value_dim, shape.hidden),
            "in_proj_a": (shape.value_heads, shape.hidden),
            "in_proj_b": (shape.value_heads, shape.hidden),
            "conv1d": (shape.conv_dim, 1, shape.conv_kernel),
            "A_log": (shape.value_heads,),
            "dt_bias": (shape.value_heads,),
            "linear_attn.norm": (shape.value_head_dim,),
            "out_proj": (shape.hidden, shape.value_dim),
            "q_proj": (2 * shape.query_dim, shape.hidden),
            "k_proj": (shape.kv_dim, shape.hidden),
            "v_proj": (shape.kv_dim, shape.hidden),
            "o_proj": (shape.hidden, shape.query_dim),
            "q_norm": (shape.head_dim,),
            "k_norm": (shape.head_dim,),
            "layernorm": (shape.hidden,),
            "norm": (shape.hidden,),
        }

    def __missing__(self, name: str) -> RandomWeight:
        dims = next(dims for part, dims in self.dims.items() if name.removesuffix(".weight").endswith(part))
        self[name] = RandomWeight(dims, seed=len(self))
        return self[name]


class RandomWeight:
    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape = shape
        self.seed = seed

    def float32(self) -> np.ndarray:
        values = np.random.default_rng(self.seed).standard_normal(self.shape, np.float32)
        return values / np.float32(self.shape[-1] ** 0.5) if len(self.shape) > 1 else values


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return Parameters.load(RandomWeights(SHAPE), SHAPE)


@pytest.fixture
def backend(parameters: Parameters) -> CpuBackend:
    return CpuBackend(parameters, VOCABULARY)


def prompt(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def test_it_is_a_backend(backend: CpuBackend) -> None:
    checked: Backend = backend  # mypy checks the protocol
    assert (checked.name, checked.shape, checked.max_context) == ("cpu", SHAPE, 2000)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED])
def test_generate_is_forward_and_sampler_in_turns(backend: CpuBackend, sampling: SamplingParams) -> None:
    history, tokens = prompt(5, seed=1), prompt(20)
    state = backend.new_state()
    backend.prefill(state, history)
    ours = list(backend.generate(state, tokens, history, sampling, 10, NEVER))
    assert state.position == 34  # all but the last token

    expected_state = State.empty(SHAPE)
    sampler = Sampler(sampling, VOCABULARY, history + tokens)
    model.forward(backend.parameters, expected_state, history)
    logits = model.forward(backend.parameters, expected_state, tokens)
    expected = []
    for position in range(25, 35):
        expected.append(sampler.choose(logits, position))
        logits = model.forward(backend.parameters, expected_state, [expected[-1].id])
    assert ours == expected


def test_a_seed_does_not_depend_on_how_the_prompt_was_consumed(backend: CpuBackend) -> None:
    tokens = prompt(40)
    results = []
    for split in (0, 1, 39):
        state = backend.new_state()
        backend.prefill(state, tokens[:split])
        results.append([t.id for t in backend.generate(state, tokens[split:], tokens[:split], SAMPLED, 15, NEVER)])
    assert results[0] == results[1] == results[2]


def test_going_on_after_generate(backend: CpuBackend) -> None:
    """The last yielded token is not consumed: handing it in goes on as if generation had never stopped."""
    tokens = prompt(9)
    state = backend.new_state()
    whole = [t.id for t in backend.generate(state, tokens, [], SamplingParams(), 12, NEVER)]
    state = backend.new_state()
    first = [t.id for t in backend.generate(state, tokens, [], SamplingParams(), 5, NEVER)]
    rest = backend.generate(state, first[-1:], tokens + first[:-1], SamplingParams(), 7, NEVER)
    assert first + [t.id for t in rest] == whole


def test_stop_tokens(backend: CpuBackend) -> None:
    tokens = prompt(9)
    whole = [t.id for t in backend.generate(backend.new_state(), tokens, [], SAMPLED, 12, NEVER)]
    stop = whole[6]
    state = backend.new_state()
    stopped = [t.id for t in backend.generate(state, tokens, [], SAMPLED, 12, frozenset({stop}))]
    assert stopped == whole[: whole.index(stop) + 1]
    assert state.position == 9 + len(stopped) - 1


def test_closing_early(backend: CpuBackend) -> None:
    tokens = prompt(9)
    whole = [t.id for t in backend.generate(backend.new_state(), tokens, [], SamplingParams(), 12, NEVER)]
    state = backend.new_state()
    stream = backend.generate(state, tokens, [], SamplingParams(), 12, NEVER)
    assert [t.id for t in islice(stream, 4)] == whole[:4]
    stream.close()
    assert state.position == 12
    rest = backend.generate(state, whole[3:4], tokens + whole[:3], SamplingParams(), 8, NEVER)
    assert [t.id for t in rest] == whole[4:]


def test_no_tokens_wanted(backend: CpuBackend) -> None:
    state = backend.new_state()
    assert list(backend.generate(state, prompt(3), [], SamplingParams(), 0, NEVER)) == []
    assert state.position == 3


def test_snapshot_and_restore_are_exact(backend: CpuBackend) -> None:
    tokens = prompt(70)
    state = backend.new_state()
    backend.prefill(state, tokens)
    snapshot = backend.snapshot(state)
    expected = list(backend.generate(state, [1], tokens, SAMPLED, 20, NEVER))
    for _ in range(2):
        restored = backend.restore(snapshot)
        assert restored.position == 70
        logits = backend.logits(backend.restore(snapshot), [5, 6])
        assert list(backend.generate(restored, [1], tokens, SAMPLED, 20, NEVER)) == expected
        np.testing.assert_array_equal(backend.logits(backend.restore(snapshot), [5, 6]), logits)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(1, 70)),
        st.tuples(st.just("generate"), st.integers(1, 4)),
        st.tuples(st.just("logits"), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(STEPS, STEPS, st.integers(0, 5))
def test_a_restored_state_goes_on_bit_for_bit_whatever_the_original_did(
    parameters: Parameters, steps: list[tuple[str, int]], detour: list[tuple[str, int]], at: int
) -> None:
    """`steps` without interruption, against the same with a snapshot amid them, a detour, and the way back."""
    backend = CpuBackend(parameters, VOCABULARY)

    def go(state: State, steps: list[tuple[str, int]], seed: int) -> list[object]:
        results: list[object] = []
        for number, (step, count) in enumerate(steps):
            tokens = prompt(count, seed=seed + number)
            if step == "prefill":
                backend.prefill(state, tokens)
            elif step == "generate":
                results += backend.generate(state, tokens[:1], [], SAMPLED, count, NEVER)
            else:
                results.append(backend.logits(state, tokens).tobytes())
        return [*results, state.position, backend.logits(state.copy(), [1]).tobytes()]

    at = min(at, len(steps))
    plain = backend.new_state()
    go(plain, steps[:at], 0)
    expected = go(plain, steps[at:], 100)

    state = backend.new_state()
    go(state, steps[:at], 0)
    snapshot = backend.snapshot(state)
    go(state, detour, 200)
    first, second = backend.restore(snapshot), backend.restore(snapshot)
    backend.prefill(second, prompt(3, seed=400))
    backend.prefill(first, prompt(4, seed=401))  # at the same positions as the other one
    following = [backend.logits(state, [7]) for state in (second, first)]
    for state, tokens, logits in zip(
        (second, first), (prompt(3, seed=400), prompt(4, seed=401)), following, strict=True
    ):
        alone = backend.restore(snapshot)
        backend.prefill(alone, tokens)
        np.testing.assert_array_equal(backend.logits(alone, [7]), logits)
        assert state.position == alone.position
    assert go(backend.restore(snapshot), steps[at:], 100) == expected


def test_long_prompts_go_in_chunks(parameters: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(parameters, VOCABULARY)
    tokens = prompt(150)
    expected = model.forward(parameters, State.empty(SHAPE), tokens, all_logits=True)
    lengths = []

    def recorded(parameters: Parameters, state: State, tokens: list[int]) -> np.ndarray:
        lengths.append(len(tokens))
        return original(parameters, state, tokens)

    original = model.final_hidden
    monkeypatch.setattr(cpu, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(model, "final_hidden", recorded)
    logits = backend.logits(backend.new_state(), tokens)
    assert logits.shape == (150, SHAPE.vocab)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    state = backend.new_state()
    backend.prefill(state, tokens)
    assert lengths == [64, 64, 22] * 2
    assert state.position == 150


def test_a_timeline_that_is_too_long(parameters: Parameters) -> None:
    backend = CpuBackend(parameters, VOCABULARY, max_context=12)
    state = backend.new_state()
    backend.prefill(state, prompt(5))
    for call in (
        lambda: backend.prefill(state, prompt(8)),
        lambda: backend.logits(state, prompt(8)),
        lambda: backend.generate(state, prompt(8), [], SamplingParams(), 1, NEVER),
    ):
        with pytest.raises(InvalidRequest, match=r"5 tokens of context and 8 new ones are 13.*holds 12"):
            call()
    assert state.position == 5
    # Generation ends when the state is full: 12 tokens are consumed, and the last one is yielded only.
    assert len(list(backend.generate(state, prompt(3), [], SamplingParams(), 100, NEVER))) == 5
    assert state.position == 12


def test_requests_that_cannot_run(backend: CpuBackend, parameters: Parameters) -> None:
    state = backend.new_state()
    with pytest.raises(InvalidRequest, match="tokens is empty"):
        backend.generate(state, [], [], SamplingParams(), 1, NEVER)
    for token in (-1, 120):
        with pytest.raises(InvalidRequest, match=f"token {token} does not exist: ids go from 0 to 119"):
            backend.prefill(state, [3, token])
    with pytest.raises(InvalidRequest, match=r"logit_bias\[100\]"):
        backend.generate(state, [1], [], SamplingParams(logit_bias={100: 1}), 1, NEVER)
    with pytest.raises(InvalidRequest, match="max_context = 2001 must be between 1 and the model's 2000"):
        CpuBackend(parameters, VOCABULARY, max_context=2001)
    with pytest.raises(InvalidRequest, match="121 tokens, but the model has 120"):
        CpuBackend(parameters, 121)
    assert state.position == 0


def test_close(backend: CpuBackend) -> None:
    state = backend.new_state()
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.prefill(state, [1])


def test_memory_refusal_comes_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 3 * 2**30)
    large = replace(SHAPE, hidden=4096, intermediate=12288, vocab=248320)
    assert memory_needed(large) > 4 * parameter_count(large, mtp=False) > 3 * 2**30
    with pytest.raises(InvalidRequest, match="max_context = 0"):
        CpuBackend.load(tmp_path / "missing", large, VOCABULARY, max_context=0)
    with pytest.raises(NotEnoughMemory, match=r"needs [\d.]+ GiB.*3\.0 GiB are available"):
        CpuBackend.load(tmp_path / "missing", large, VOCABULARY)


def test_memory_of_the_smallest_released_size() -> None:
    shape = replace(
        SHAPE, hidden=1024, intermediate=3584, layer_types=(LINEAR, LINEAR, LINEAR, FULL) * 6, vocab=248320, heads=8,
        kv_heads=2, head_dim=256, key_heads=16, value_heads=16, key_head_dim=128, value_head_dim=128,
        max_context=262144,
    )  # fmt: skip
    assert 752_393_024 * 4 < memory_needed(shape) < 752_393_024 * 4 * 1.15


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  1000 kB\nMemAvailable:     600 kB\nHugePages_Free: 0\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 600 * 1024),
        # Version 2, no limit of its own but one in the group above.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1000\n",
                "sys/fs/cgroup/a/memory.max": "500000\n",
                "sys/fs/cgroup/a/memory.current": "300000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 100000\ninactive_file 150000\nactive_file 50000\n",
            },
            400_000,
        ),
        # Version 1 in a container that sees the path of its host.
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/docker/123\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "450000\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
            },
            51_000,
        ),
        # More used than allowed, and a limit beyond what the machine has.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "450000\n",
            },
            600 * 1024,
        ),
    ],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(write(tmp_path, MEMINFO | files)) == expected


def test_available_memory_where_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = available_memory(tmp_path)
    assert physical is not None
    assert physical > 2**30
    monkeypatch.delattr("os.sysconf_names")
    assert available_memory(tmp_path) is None
