"""What happens when the GPU fails: bounded, named, and nobody pretends that it still works. Each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measures import greedy

from onekernel.errors import InvalidRequest, NotEnoughMemory
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu

# A block that publishes nothing from layer 2 on: all others wait for it.
DEAD_BARRIER = """
import dataclasses, json, sys, time
from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.errors import BackendError
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import find_gpu
from onekernel.gpu.layout import Layout
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

def greedy(decoder, state, tokens, count):
    return decoder.generate(state, tokens, Sampler(SamplingParams(), shape.vocab), count, frozenset())

folder = hub.resolve("demo")
shape = Shape.load(folder)
gpu = find_gpu()
layout = Layout.plan(shape, shape.vocab, gpu.sm_count, gpu.shared_memory)
weights = load_weights(folder, shape)
sound = Decoder(gpu, layout, weights)
list(greedy(sound, sound.new_state(), [1, 2, 3], 5))
decoder = Decoder(gpu, dataclasses.replace(layout, dead_block=layout.blocks // 2, dead_layer=2), weights, int(5e8))
state = decoder.new_state()
start, messages = time.monotonic(), []

def failing(action):
    try:
        action()
    except BackendError as error:
        messages.append(str(error))
    else:
        messages.append("no error")

failing(lambda: list(greedy(decoder, state, [1], 5)))
seconds = time.monotonic() - start
failing(lambda: decoder.next_logits(state, [1]))
failing(decoder.new_state)
failing(lambda: decoder.snapshot(state))
failing(lambda: list(greedy(sound, state, [1], 5)))
failing(lambda: Decoder(find_gpu(), layout, weights))
decoder.close()
sound.close()
json.dump({"seconds": seconds, "messages": messages, "dead": layout.blocks // 2}, sys.stdout)
"""


def in_a_process(code: str) -> dict:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(120)
def test_dead_barrier_is_reported_in_bounded_time_with_phase_layer_and_block(gpu: Gpu, record_property) -> None:
    found = in_a_process(DEAD_BARRIER)
    first, *later = found["messages"]
    record_property("seconds", round(found["seconds"], 3))
    record_property("message", first)
    assert "the decode kernel stopped itself: waiting for the delta rule in layer 2, block " in first
    assert f"block {found['dead']} " not in first  # that one is not waiting
    assert 0.4 < found["seconds"] < 5  # the limit is 0.5 s; the rest is starting, and sharing the GPU
    # The CUDA context is lost for the process, and everything afterwards says so.
    assert all("this process cannot use the GPU any more" in message for message in (first, *later)), later


def test_too_little_memory_is_refused_with_the_numbers(gpu: Gpu, demo: Decoder, demo_weights, monkeypatch) -> None:
    demo.pool.clear()
    monkeypatch.setattr(Gpu, "memory_free", lambda _: 2**20)
    with pytest.raises(NotEnoughMemory, match=r"needs 0\.\d GiB of GPU memory, and 0\.0 GiB are free on"):
        Decoder(gpu, demo.layout, demo_weights)
    with pytest.raises(NotEnoughMemory, match=r"a context of 4096 tokens needs a cache of 0\.01 GiB .* 0\.00 GiB"):
        demo.new_state()


def test_context_too_large_for_the_gpu_leaves_the_state_as_it_was(demo: Decoder) -> None:
    state = demo.new_state()
    before = list(greedy(demo, state, [1, 2, 3], 20))
    snapshot = demo.snapshot(state)
    capacity = state.capacity
    with pytest.raises(NotEnoughMemory, match=r"a context of \d+ tokens needs a cache of \d+\.\d\d GiB on the GPU"):
        demo.reserve(state, 2**28)
    assert state.capacity == capacity
    expected = list(greedy(demo, demo.restore(snapshot), before[-1:], 20))
    assert list(greedy(demo, state, before[-1:], 20)) == expected


def test_prompt_that_is_too_long_is_refused_before_anything_is_consumed(gpu: Gpu, demo_folder, demo_shape) -> None:
    from onekernel.backend.cuda import CudaBackend

    backend = CudaBackend.load(demo_folder, demo_shape, demo_shape.vocab, max_context=100)
    state = backend.new_state()
    with pytest.raises(InvalidRequest, match="101, but the context holds 100"):
        backend.prefill(state, [1] * 101)
    assert state.position == 0
    backend.prefill(state, [1] * 100)
    backend.close()
