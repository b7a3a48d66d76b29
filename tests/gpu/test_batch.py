"""The batch kernel: every row against the float32 reference, and against the same row alone, bit by bit."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batch_rows import GREEDY, Row, advance, ids, new_row
from measures import greedy, random_tokens
from random_model import SIZES, VOCABULARY_SIZE, random_weights, shortened
from state_parts import errors, state_bytes
from test_demo_tokens import PROMPTS

from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.errors import InvalidRequest, NotEnoughMemory
from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.batch_layout import BUCKETS
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu
from onekernel.gpu.layout import Layout
from onekernel.gpu.memory import DeviceBuffer
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State as ReferenceState
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler
from onekernel.text.tokenizer import Tokenizer

LIMIT = 0.02  # relative error of a state, as in test_prefill.py
MOST_TURNED = 6  # times the error of a logit: more of a lead than errors of two logits turn around
TIE = 0.02  # of the standard deviation of the demo model's logits, as in test_demo_tokens.py
SHAPE = shortened("0.8b")
SOAK_TOKENS = int(os.environ.get("ONEKERNEL_BATCH_SOAK", "20000"))


def load(gpu: Gpu, shape: Shape, weights: Weights, vocabulary_size: int | None = None) -> Decoder:
    layout = Layout.plan(shape, vocabulary_size or shape.vocab, gpu.sm_count, gpu.shared_memory)
    return Decoder(gpu, layout, weights)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(SHAPE)


@pytest.fixture(scope="module")
def batch(gpu: Gpu, weights: Weights) -> Iterator[BatchDecoder]:
    made = BatchDecoder(load(gpu, SHAPE, weights), BUCKETS[-1])
    yield made
    made.close()
    made.decoder.close()


@pytest.fixture(scope="module")
def demo_batch(demo: Decoder) -> Iterator[BatchDecoder]:
    made = BatchDecoder(demo, 64)
    yield made
    made.close()


def compare(batch: BatchDecoder, weights: Weights, prompts: list[list[int]], rows: int, steps: int) -> dict[str, float]:
    """The worst relative errors of the first `rows` prompts' states, and of their logits the mean error in standard
    deviations, of this kernel and of that of single sequences: both against the reference, told the same tokens.

    The kernels multiply in bf16: of this model that moves a logit by 0.012 of the standard deviation (NumPy, products
    of rounded inputs), and so turns around leads of 0.03. Whose error is how large is what can be compared.
    """
    decoder, shape = batch.decoder, batch.decoder.shape
    parameters = Parameters.load(weights, shape, mtp=False)
    all_rows = [new_row(decoder, prompt, SamplingParams(logprobs=0)) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    scores: list[list[np.ndarray]] = [[] for _ in prompts[:rows]]
    for _ in range(steps):
        for tokens, new in zip(made, ids(advance(batch, all_rows, 1)), strict=True):
            tokens += new
        for place, ours in enumerate(scores):
            ours.append(batch._sampling[place].logits.read(np.float32, shape.vocab))
            assert made[place][-1] == np.argmax(ours[-1])
    worst: dict[str, float] = {}
    batched, single = [], []
    for row, prompt, tokens, ours in zip(all_rows[:rows], prompts, made, scores, strict=False):
        reference, alone = ReferenceState.empty(shape), decoder.new_state()
        if prompt[1:]:
            model.forward(parameters, reference, prompt[:-1])
        decoder.consume(alone, prompt[:-1])
        for token, logits in zip([prompt[-1], *tokens[:-1]], ours, strict=True):
            right = model.forward(parameters, reference, [token])
            batched.append(np.std(logits - right) / right.std())
            single.append(np.std(decoder.next_logits(alone, [token]) - right) / right.std())
            assert (right.max() - right[np.argmax(logits)]) / right.std() < MOST_TURNED * batched[-1]
        assert row.state.position == reference.position
        for part, values in errors(decoder, row.state, reference).items():
            worst[part] = max(worst.get(part, 0), max(values))
    return worst | {"logits": float(np.mean(batched)), "logits_of_single": float(np.mean(single))}


def check(found: dict[str, float], record_property) -> None:
    for part, error in found.items():
        record_property(f"error_{part}", float(f"{error:.3g}"))
    assert found["logits"] < 1.15 * found["logits_of_single"], found
    assert all(error < LIMIT for error in found.values()), found


@pytest.mark.parametrize("count", [1, 8, 32, 64])
def test_rows_are_those_of_the_reference(batch: BatchDecoder, weights: Weights, count: int, record_property) -> None:
    lengths = [1, 2, 63, 64, 65, 130, 5, 17][:count] + [9] * (count - 8)
    prompts = [random_tokens(SHAPE, length, seed=i) for i, length in enumerate(lengths)]
    check(compare(batch, weights, prompts, 8, 6), record_property)


@pytest.mark.parametrize("size", ["2b", "27b"])
def test_the_other_sizes(gpu: Gpu, size: str, record_property) -> None:
    shape = dataclasses.replace(shortened(size), layer_types=SIZES[size].layer_types[2:4])  # one of each kind
    decoder = load(gpu, shape, weights := random_weights(shape))
    batch = BatchDecoder(decoder, 32)
    prompts = [random_tokens(shape, 20 + i, seed=i) for i in range(20)]
    rows = [new_row(decoder, prompt) for prompt in prompts]
    alone = new_row(decoder, prompts[3])
    made = ids(advance(batch, rows, 4))
    assert ids(advance(batch, [alone], 4))[0] == made[3]
    assert state_bytes(decoder, alone.state) == state_bytes(decoder, rows[3].state)
    found = compare(batch, weights, prompts, 2, 4)
    batch.close()
    decoder.close()
    check(found, record_property)


@pytest.mark.parametrize("count", [8, 16, 32, 64, 128, 256])
def test_a_row_has_the_same_bits_alone_and_in_company(batch: BatchDecoder, count: int) -> None:
    prompt = random_tokens(SHAPE, 100, seed=77)
    alone = new_row(batch.decoder, prompt)
    expected = [*ids(advance(batch, [alone], 9))[0], *ids(advance(batch, [alone], 11))[0]]
    rows = [new_row(batch.decoder, random_tokens(SHAPE, 1 + i % 5, seed=i)) for i in range(count)]
    place = count * 3 // 4
    rows[place] = new_row(batch.decoder, prompt)
    rows[0].max_tokens = 3
    made = ids(advance(batch, rows, 20))
    assert made[place] == expected
    assert len(made[0]) == 3
    assert state_bytes(batch.decoder, rows[place].state) == state_bytes(batch.decoder, alone.state)


def test_long_contexts_are_split_the_same_for_all(batch: BatchDecoder) -> None:
    prompt = random_tokens(SHAPE, 5000, seed=5)
    alone, other = new_row(batch.decoder, prompt), new_row(batch.decoder, prompt)
    rows = [other, *(new_row(batch.decoder, random_tokens(SHAPE, 300, seed=i)) for i in range(3))]
    assert ids(advance(batch, rows, 5))[0] == ids(advance(batch, [alone], 5))[0]
    assert state_bytes(batch.decoder, other.state) == state_bytes(batch.decoder, alone.state)
    single = new_row(batch.decoder, prompt)
    expected = greedy(batch.decoder, single.state, single.tokens, 5)
    again = new_row(batch.decoder, prompt)
    assert ids(advance(batch, [again], 5))[0][0] == next(expected)


def test_stop_tokens_end_a_row_and_no_other(batch: BatchDecoder) -> None:
    prompts = [random_tokens(SHAPE, 10, seed=i) for i in range(4)]
    free = ids(advance(batch, [new_row(batch.decoder, prompt) for prompt in prompts], 12))
    rows = [new_row(batch.decoder, prompt) for prompt in prompts]
    rows[2].stop_tokens = frozenset([free[2][5], 4095])
    made = ids(advance(batch, rows, 12))
    first = free[2].index(free[2][5])
    assert made[2] == free[2][: first + 1]
    assert [made[i] for i in (0, 1, 3)] == [free[i] for i in (0, 1, 3)]
    assert rows[2].state.position == 9 + first + 1


def test_an_interruption_ends_the_launch_between_steps(batch: BatchDecoder) -> None:
    rows = [new_row(batch.decoder, random_tokens(SHAPE, 10, seed=i)) for i in range(8)]
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    steps = list(batch.run(rows, 250, interrupted))
    assert 3 <= len(steps) < 250
    assert all(row.state.position == 9 + len(steps) for row in rows)
    again = [new_row(batch.decoder, random_tokens(SHAPE, 10, seed=i)) for i in range(8)]
    advance(batch, again, len(steps))
    for row, other in zip(rows, again, strict=True):
        assert state_bytes(batch.decoder, row.state) == state_bytes(batch.decoder, other.state)


PARAMS = (
    SamplingParams(temperature=0.05, seed=1, logprobs=3),
    SamplingParams(temperature=1.0, seed=2, top_k=20, logprobs=2),
    SamplingParams(temperature=1.5, seed=3, top_p=0.7, logprobs=0),
    SamplingParams(temperature=0.8, seed=4, top_k=30, top_p=0.9, min_p=0.02, logprobs=20),
    SamplingParams(
        temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logprobs=1
    ),
    SamplingParams(logprobs=5),
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=2**63 + 5, logit_bias={7: 50.0, 9: -3.0}, logprobs=1),
    SamplingParams(temperature=2.0, seed=6, top_p=0.01, logprobs=1),
    SamplingParams(repetition_penalty=2.0, logprobs=1),
    SamplingParams(temperature=1.0, seed=7, min_p=0.3, logprobs=1),
)


def sampled_rows(decoder: Decoder) -> list[Row]:
    return [new_row(decoder, random_tokens(decoder.shape, 10, seed=i), params) for i, params in enumerate(PARAMS)]


def test_sampling_is_that_of_the_sampler_for_the_same_logits(gpu: Gpu) -> None:
    shape = dataclasses.replace(SIZES["0.8b"], layer_types=SIZES["0.8b"].layer_types[:4])
    decoder = load(gpu, shape, random_weights(shape), VOCABULARY_SIZE)
    batch = BatchDecoder(decoder, 16)
    rows = sampled_rows(decoder)
    by_step: list[list[int]] = [[] for _ in rows]
    for _ in range(3):
        twins = []
        for row in rows:
            twin = Sampler(row.sampler.params, VOCABULARY_SIZE)
            twin.seen, twin.generated = row.sampler.seen.copy(), row.sampler.generated.copy()
            twins.append(twin)
        for place, (tokens, row, twin) in enumerate(zip(advance(batch, rows, 1), rows, twins, strict=True)):
            (token,) = tokens
            by_step[place].append(token.id)
            if row.sampler.params.logprobs is None:
                continue
            logits = batch._sampling[place].logits.read(np.float32, shape.vocab)
            expected = twin.choose(logits, row.state.position)
            assert token.id == expected.id, row.sampler.params
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [i for i, _ in token.top_logprobs] == [i for i, _ in expected.top_logprobs]
    rows = sampled_rows(decoder)
    assert ids(advance(batch, rows, 3)) == by_step  # many steps a launch
    for place in (1, 3, 4):  # alone
        (row,) = [new_row(decoder, random_tokens(shape, 10, seed=place), PARAMS[place])]
        assert ids(advance(batch, [row], 3))[0] == by_step[place]
    batch.close()
    decoder.close()


def test_a_row_without_a_possible_token_fails_alone(batch: BatchDecoder) -> None:
    bias = {token: float("-inf") for token in range(SHAPE.vocab)}
    rows = [new_row(batch.decoder, [1, 2, 3]), new_row(batch.decoder, [1, 2, 3], SamplingParams(logit_bias=bias))]
    made = ids(advance(batch, rows, 3))
    assert len(made[0]) == 3
    assert made[1] == []
    assert isinstance(rows[1].error, InvalidRequest)
    assert rows[0].error is None


def test_too_little_memory_is_said_before_anything_moves(batch: BatchDecoder, monkeypatch) -> None:
    rows = [new_row(batch.decoder, [1, 2, 3]) for _ in range(3)]
    monkeypatch.setattr(Gpu, "memory_free", lambda _: 1234)
    monkeypatch.setattr(batch, "_held", lambda _: 0)
    with pytest.raises(NotEnoughMemory, match=r"a step of 8 sequences needs [\d,]+ more bytes .* and 1,234 are free"):
        batch.run(rows, 3)
    assert [row.state.position for row in rows] == [2, 2, 2]


LONGEST = 160  # tokens of a sequence
KINDS = 40  # of sequences, by prompt and parameters; half are greedy


def kinds(folder: Path) -> list[tuple[list[int], SamplingParams]]:
    """Starts of Python code, cut at random places."""
    tokenizer, draw = Tokenizer.load(folder), random.Random(1)
    texts = [*PROMPTS, *json.loads((Path(__file__).parents[1] / "demo_prompts.json").read_text())["prompts"]]
    found = []
    for i in range(KINDS):
        prompt = tokenizer.encode(texts[i % len(texts)])
        drawn = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=i)
        found.append((prompt[: draw.randint(1, 60)], GREEDY if i % 2 else drawn))
    return found


@pytest.fixture(scope="module")
def alone(demo: Decoder, demo_batch: BatchDecoder, demo_folder: Path) -> list[list[int]]:
    """What each kind makes alone, by the batch kernel."""
    return [ids(advance(demo_batch, [new_row(demo, *kind)], LONGEST))[0] for kind in kinds(demo_folder)]


def join_and_leave(
    batch: BatchDecoder, folder: Path, alone: list[list[int]], sequences: int, tokens: int, longest: int
) -> int:
    """Sequences of random kinds and lengths that join and leave, by launches of random numbers of steps, until so many
    have ended and so many tokens were made: each token must be the one that the sequence makes alone. The tokens.
    """
    draw, decoder, what = random.Random(1), batch.decoder, kinds(folder)
    running: list[tuple[int, Row, list[int]]] = []
    ended = total = 0
    while running or ended < sequences or total < tokens:
        while (ended + len(running) < sequences or total < tokens) and len(running) < draw.choice([1, 5, 17, 40, 64]):
            which = draw.randrange(KINDS)
            running.append((which, new_row(decoder, *what[which], max_tokens=draw.randint(1, longest)), []))
        draw.shuffle(running)
        made = ids(advance(batch, [row for _, row, _ in running], draw.randint(1, 24)))
        left = []
        for (which, row, so_far), more in zip(running, made, strict=True):
            so_far += more
            total += len(more)
            assert so_far == alone[which][: len(so_far)], (which, ended, total)
            if row.max_tokens:
                left.append((which, row, so_far))
            else:
                ended += 1
                row.state.buffer.free()
        running = left
    return total


@pytest.mark.timeout(600)
def test_sequences_that_join_and_leave_make_the_tokens_that_they_make_alone(
    demo_batch: BatchDecoder, demo_folder: Path, alone: list[list[int]], record_property
) -> None:
    record_property("tokens", join_and_leave(demo_batch, demo_folder, alone, 1000, 0, 60))


def test_greedy_tokens_are_those_of_the_single_decoder_but_for_ties(
    demo: Decoder, demo_folder: Path, demo_reference: Parameters, alone: list[list[int]], record_property
) -> None:
    """Where the two kernels part, float32 must see a tie: a lead that the rounding of one of them turns around."""
    same = [0, 0]
    for (prompt, params), tokens in zip(kinds(demo_folder), alone, strict=True):
        row = new_row(demo, prompt, params)
        made = [token.id for token in demo.generate(row.state, row.tokens, row.sampler, LONGEST, frozenset())]
        same[params.greedy] += made == tokens
        if params.greedy and made != tokens:
            at = next(i for i in range(LONGEST) if made[i] != tokens[i])
            state = ReferenceState.empty(demo.shape)
            scores = model.forward(demo_reference, state, [*prompt, *tokens[:at]])[: demo.layout.vocabulary_size]
            lead = abs(scores[made[at]] - scores[tokens[at]]) / scores.std()
            assert lead < TIE, (len(prompt), at, lead)
    record_property("greedy_sequences_equal", f"{same[1]} of {KINDS // 2}")
    record_property("sampled_sequences_equal", f"{same[0]} of {KINDS // 2}")
    assert same[1] >= KINDS // 4


def bytes_held(batch: BatchDecoder) -> int:
    """Of this process's buffers on the GPU; what the GPU says is free, other processes change as well.

    Without the batch's scratch, which grows to what the longest context of any step needed, and no further.
    """
    gc.collect()
    held = sum(o.nbytes for o in gc.get_objects() if isinstance(o, DeviceBuffer) and o.address)
    return held - sum(buffer.nbytes for buffer in batch.scratch.values())


@pytest.mark.timeout(1200)
def test_many_tokens_of_many_sequences(
    demo_batch: BatchDecoder, demo_folder: Path, alone: list[list[int]], record_property
) -> None:
    """No wrong token, no wait that never ends, no memory lost. run.py says how many tokens."""
    drawn = SamplingParams(temperature=0.8, seed=1)
    advance(demo_batch, [new_row(demo_batch.decoder, [5], drawn) for _ in range(64)], 1)
    join_and_leave(demo_batch, demo_folder, alone, 400, 0, LONGEST)  # what is kept for later is there, at its size
    before, start = bytes_held(demo_batch), time.monotonic()
    made = join_and_leave(demo_batch, demo_folder, alone, 0, SOAK_TOKENS, LONGEST)
    record_property("tokens", made)
    record_property("tokens_per_second", round(made / (time.monotonic() - start)))
    assert bytes_held(demo_batch) == before
