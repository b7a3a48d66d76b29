"""The GPU through the public Python API and the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import onekernel
from onekernel.backend.choose import choose
from onekernel.engine import Engine

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def model(gpu):
    with onekernel.load("demo", backend="cuda") as model:
        yield model


def test_auto_chooses_the_gpu(gpu) -> None:
    choice = choose("auto")
    assert choice.name == "cuda"
    assert gpu.name in choice.reason


def test_greedy_text_equals_the_cpu_backend(model) -> None:
    on_the_gpu = model.generate(PROMPT, max_tokens=32, temperature=0)
    with onekernel.load("demo", backend="cpu") as reference:
        on_the_cpu = reference.generate(PROMPT, max_tokens=32, temperature=0)
    assert on_the_gpu.text == on_the_cpu.text
    assert on_the_gpu.usage == on_the_cpu.usage


def test_stop_string_ends_the_answer_before_it(model) -> None:
    whole = model.generate(PROMPT, max_tokens=200, temperature=0).text
    stop = whole[len(whole) // 3 :][:4]
    stopped = model.generate(PROMPT, max_tokens=200, temperature=0, stop=stop)
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_more_tokens_than_one_launch_makes(model) -> None:
    whole = model.generate(PROMPT, max_tokens=700, temperature=0)
    again = model.generate(PROMPT, max_tokens=700, temperature=0)
    assert whole.text == again.text
    short = model.generate(PROMPT, max_tokens=300, temperature=0)
    assert whole.text.startswith(short.text)


def test_device_time_is_most_of_wall_time_and_never_more(model, record_property) -> None:
    with model.engine.exclusive() as backend:
        before, start = backend.device_seconds, time.perf_counter()
    model.generate(PROMPT, max_tokens=600, temperature=0)
    with model.engine.exclusive() as backend:
        device, wall = backend.device_seconds - before, time.perf_counter() - start
    record_property("device_of_wall", round(device / wall, 3))
    assert 0.2 * wall < device < wall  # other processes may use the GPU meanwhile


def test_context_fills_to_its_last_token(gpu) -> None:
    with onekernel.load("demo", backend="cuda", max_context=64) as small:
        completion = small.generate([5, 6, 7], max_tokens=None, temperature=0)
        assert completion.finish_reason == "length" or completion.usage.completion_tokens < 62
        assert completion.usage.completion_tokens <= 62


def test_session_goes_on_after_a_stream_is_closed_early(model) -> None:
    """The backend ran ahead of the reader; what it made beyond is forgotten."""
    session = model.engine.new_session()
    session.extend([5, 80, 200])
    sampling = onekernel.SamplingParams(temperature=0)
    tokens = []
    with closing(session.stream(sampling, max_tokens=200)) as stream:
        for token in stream:
            tokens.append(token.id)
            if len(tokens) == 5:
                break
    tokens += [token.id for token in session.generate(sampling, max_tokens=20)]
    fresh = model.engine.new_session()
    fresh.extend([5, 80, 200])
    assert tokens == [token.id for token in fresh.generate(sampling, max_tokens=25)]


def test_sampling_with_a_seed_repeats(model) -> None:
    options = {"max_tokens": 40, "temperature": 0.8, "top_k": 20, "seed": 7}
    assert model.generate(PROMPT, **options).text == model.generate(PROMPT, **options).text


def test_logits_of_the_backend_are_close_to_the_cpu(model) -> None:
    from onekernel.backend.choose import load_backend
    from onekernel.checkpoint import hub

    assert isinstance(model.engine, Engine)
    folder = hub.resolve("demo")
    cpu = load_backend("cpu", folder, model.engine.shape, model.tokenizer.size, None)
    cuda = load_backend("cuda", folder, model.engine.shape, model.tokenizer.size, None)
    tokens = model.tokenizer.encode(PROMPT * 20)
    ours, theirs = cuda.logits(cuda.new_state(), tokens), cpu.logits(cpu.new_state(), tokens)
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
    cuda.close()


def test_async_stream_that_is_cancelled_frees_the_gpu(model) -> None:
    async def first_chunks() -> str:
        text = ""
        async for chunk in model.astream(PROMPT, max_tokens=1000, temperature=0):
            text += chunk.text
            if len(text) > 10:
                break
        return text

    text = asyncio.run(first_chunks())
    assert model.generate(PROMPT, max_tokens=200, temperature=0).text.startswith(text)


def test_command_line_uses_the_gpu(gpu) -> None:
    command = [sys.executable, "-m", "onekernel", "generate", "--max-tokens", "8", "--json", PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "cuda"
    assert gpu.name in done.stderr
