"""The same bits: run after run, whatever the number of tokens a launch, through snapshots and between sessions."""

from __future__ import annotations

import math
import time
from contextlib import closing

import numpy as np
import pytest
from measures import random_tokens
from random_model import random_weights, shortened
from state_parts import state_bytes

from onekernel.gpu.decoder import CANCEL, Decoder, State
from onekernel.gpu.layout import OUTPUT_RING

PROMPT = (5, 80, 200, 7, 1000)


@pytest.fixture(params=["demo", "0.8b"], scope="module")
def decoder(request, gpu, demo):
    """The demo model whole, and the 0.8B dimensions with four layers."""
    if request.param == "demo":
        yield demo
        return
    from onekernel.gpu.layout import Layout

    shape = shortened("0.8b")
    decoder = Decoder(gpu, Layout.plan(shape, shape.vocab, gpu.sm_count, gpu.shared_memory), random_weights(shape))
    yield decoder
    decoder.close()


def generate(decoder: Decoder, state: State, count: int, per_launch: int, prompt=PROMPT) -> list[int]:
    """`count` greedy tokens, `per_launch` at a time."""
    tokens, made = list(prompt), []
    while len(made) < count:
        some = list(decoder.greedy(state, tokens, min(per_launch, count - len(made)), frozenset()))
        made += some
        tokens = some[-1:]
    return made


def outcome(decoder: Decoder, per_launch: int, count: int = 129) -> tuple[list[int], bytes, bytes]:
    """Tokens, the state after them, and the logits that follow."""
    state = decoder.new_state()
    tokens = generate(decoder, state, count, per_launch)
    return tokens, state_bytes(decoder, state), decoder.next_logits(state, tokens[-1:]).tobytes()


def made_tokens(decoder: Decoder) -> int:
    """Tokens that the last launch has left in the mapped memory so far."""
    return int(decoder.mapped.words[:OUTPUT_RING].max()) >> 32


def test_twenty_runs_are_bitwise_equal(decoder: Decoder, record_property) -> None:
    runs = [outcome(decoder, 64) for _ in range(20)]
    record_property("runs", len(runs))
    assert all(run == runs[0] for run in runs[1:])


def test_tokens_per_launch_do_not_matter(decoder: Decoder) -> None:
    one, seven, many = (outcome(decoder, per_launch) for per_launch in (1, 7, 64))
    assert one == seven == many


def test_prompt_in_parts_is_bitwise_equal(decoder: Decoder) -> None:
    tokens = random_tokens(decoder.shape, 300)
    whole = decoder.new_state()
    decoder.consume(whole, tokens)
    parts = decoder.new_state()
    for start, end in ((0, 1), (1, 8), (8, 200), (200, 300)):
        decoder.consume(parts, tokens[start:end])
    assert state_bytes(decoder, whole) == state_bytes(decoder, parts)
    all_logits = decoder.new_state()
    decoder.logits(all_logits, tokens)
    assert state_bytes(decoder, whole) == state_bytes(decoder, all_logits)


def test_snapshot_and_restore_are_bitwise_equal(decoder: Decoder) -> None:
    state = decoder.new_state()
    decoder.consume(state, random_tokens(decoder.shape, 100))
    before = state_bytes(decoder, state)
    snapshot = decoder.snapshot(state)
    straight = generate(decoder, state, 50, 50)
    for _ in range(2):  # a snapshot is used more than once
        restored = decoder.restore(snapshot)
        assert (restored.position, state_bytes(decoder, restored)) == (100, before)
        assert generate(decoder, restored, 50, 50) == straight
        assert state_bytes(decoder, restored) == state_bytes(decoder, state)


def test_interleaved_sessions_do_not_touch_each_other(decoder: Decoder) -> None:
    prompts = [random_tokens(decoder.shape, 3 + 40 * i, seed=i) for i in range(4)]
    alone = [generate(decoder, decoder.new_state(), 40, 40, prompt) for prompt in prompts]
    states, turns = [decoder.new_state() for _ in prompts], [list(prompt) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    for _ in range(10):
        for i, state in enumerate(states):
            some = list(decoder.greedy(state, turns[i], 4, frozenset()))
            made[i] += some
            turns[i] = some[-1:]
    assert made == alone


def test_context_grows_past_its_first_capacity(decoder: Decoder, record_property) -> None:
    """The state moves into a larger cache at 4,096 positions, in the middle of a prompt or between two tokens."""
    tokens = random_tokens(decoder.shape, 4100)
    grown = decoder.new_state()
    decoder.consume(grown, tokens[:4000])
    decoder.consume(grown, tokens[4000:])
    roomy = decoder.new_state()
    decoder.reserve(roomy, 9000)
    assert roomy.capacity > grown.capacity > 4096
    decoder.consume(roomy, tokens)
    assert state_bytes(decoder, grown) == state_bytes(decoder, roomy)
    last = decoder.next_logits(grown, [1])
    assert np.array_equal(last, decoder.next_logits(roomy, [1]))
    record_property("position", grown.position)


def test_cancel_stops_within_one_token(decoder: Decoder, record_property) -> None:
    state = decoder.new_state()
    with closing(decoder.greedy(state, list(PROMPT), 1000, frozenset())) as made:
        start = time.perf_counter()
        first = [next(made) for _ in range(10)]
        for _ in range(100):
            next(made)
        token_seconds = (time.perf_counter() - start) / 110
        begin, before = time.perf_counter(), made_tokens(decoder)
        decoder.mapped.words[CANCEL] = 1
        python_seconds = time.perf_counter() - begin
    # Block 0 looks when it begins a token: the one that runs then is ended, and one more where it had just looked.
    after = made_tokens(decoder) - before
    record_property("tokens_after_the_cancel", after)
    record_property("tokens_in_the_time_that_python_took", round(python_seconds / token_seconds, 2))
    assert after <= 2 + math.ceil(python_seconds / token_seconds)
    assert state.position == len(PROMPT) + made_tokens(decoder) - 1
    # What was consumed is the timeline of greedy tokens, no more and no less.
    again = decoder.new_state()
    tokens = generate(decoder, again, state.position - len(PROMPT) + 1, 64)
    assert tokens[:10] == first
    assert again.position == state.position
    assert state_bytes(decoder, again) == state_bytes(decoder, state)


def test_launch_ends_at_max_tokens_and_at_end_tokens(decoder: Decoder) -> None:
    state = decoder.new_state()
    tokens = generate(decoder, state, 60, 60)
    assert state.position == len(PROMPT) + 59
    stop = next(token for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    at = tokens.index(stop)
    state = decoder.new_state()
    assert list(decoder.greedy(state, list(PROMPT), 60, frozenset({stop, decoder.shape.vocab - 1}))) == tokens[: at + 1]
    assert state.position == len(PROMPT) + at  # the end token itself is not consumed
