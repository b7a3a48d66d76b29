"""Many sequences at once on the GPU: parked states come back bit for bit, and company changes no token."""

from __future__ import annotations

import random

import pytest
from measures import greedy, random_tokens
from state_parts import state_bytes

import onekernel
from onekernel.gpu.parking import park, unpark

COUNT = 60


@pytest.mark.parametrize("tokens", [0, 1, 100, 5000])
def test_parked_states_come_back_bit_for_bit(demo, tokens: int) -> None:
    state, other = demo.new_state(), demo.new_state()
    prompt = random_tokens(demo.shape, tokens) if tokens else []
    for one in (state, other):
        if tokens:
            demo.consume(one, prompt)
    parked = park(demo, state)
    assert sum(part.nbytes for part in parked.parts) > 0
    back = unpark(demo, parked)
    assert back.position == other.position == tokens
    assert state_bytes(demo, back) == state_bytes(demo, other)
    assert list(greedy(demo, back, [5], 20)) == list(greedy(demo, other, [5], 20))
    assert state_bytes(demo, back) == state_bytes(demo, other)


def test_parking_frees_the_memory_of_the_gpu(demo) -> None:
    before = demo.gpu.memory_free()
    states = [demo.new_state() for _ in range(16)]
    with_states = demo.gpu.memory_free()
    parked = [park(demo, state) for state in states]
    freed = demo.gpu.memory_free()
    assert before - with_states > 2**20
    assert freed > with_states + (before - with_states) // 2
    del parked


@pytest.fixture(scope="module")
def model(gpu):
    with onekernel.load("demo", backend="cuda") as model:
        yield model


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5}])
def test_prompts_in_company_are_continued_as_alone(model, options) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(model.engine.shape.vocab // 2) for _ in range(rng.randint(1, 90))] for _ in range(COUNT)]
    many = model.generate_many(prompts, max_tokens=40, max_concurrent=24, **options)
    alone = model.generate_many(prompts, max_tokens=40, max_concurrent=1, **options)
    different = [i for i in range(COUNT) if many[i].tokens != alone[i].tokens]
    assert not different, f"{len(different)} of {COUNT} prompts: {different}"
