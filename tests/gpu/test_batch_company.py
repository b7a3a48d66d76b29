"""Many sequences of the demo model in changing company: each makes the tokens that it makes alone."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_rows import GREEDY, Row, advance, ids, new_row
from test_demo_tokens import PROMPTS

from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.memory import DeviceBuffer
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State as ReferenceState
from onekernel.sampling.params import SamplingParams
from onekernel.text.tokenizer import Tokenizer

TIE = 0.02  # of the standard deviation of the demo model's logits, as in test_demo_tokens.py
SOAK_TOKENS = int(os.environ.get("ONEKERNEL_BATCH_SOAK", "20000"))
LONGEST = 160  # tokens of a sequence
KINDS = 40  # of sequences, by prompt and parameters; half are greedy


@pytest.fixture(scope="module")
def demo_batch(demo: Decoder) -> Iterator[BatchDecoder]:
    made = BatchDecoder(demo, 64)
    yield made
    made.close()


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


def bytes_held() -> int:
    """Of this process's buffers on the GPU; what the GPU says is free, other processes change as well."""
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if isinstance(o, DeviceBuffer) and o.address)


@pytest.mark.timeout(1200)
def test_many_tokens_of_many_sequences(
    demo_batch: BatchDecoder, demo_folder: Path, alone: list[list[int]], record_property
) -> None:
    """No wrong token, no wait that never ends, no memory lost. run.py says how many tokens."""
    drawn = SamplingParams(temperature=0.8, seed=1)
    advance(demo_batch, [new_row(demo_batch.decoder, [5], drawn) for _ in range(64)], 1)
    join_and_leave(demo_batch, demo_folder, alone, 400, 0, LONGEST)  # what is kept for later is there, at its size
    before, start = bytes_held(), time.monotonic()
    made = join_and_leave(demo_batch, demo_folder, alone, 0, SOAK_TOKENS, LONGEST)
    record_property("tokens", made)
    record_property("tokens_per_second", round(made / (time.monotonic() - start)))
    assert bytes_held() == before
