"""Model.generate_many: the same answers as one by one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import WatchedBackend

from onekernel import Completion, Model
from onekernel.engine import Engine
from onekernel.errors import InvalidRequest
from onekernel.text.tokenizer import Tokenizer


@pytest.fixture
def make(text_folder: Path) -> Callable[..., Model]:
    """Models whose next token depends on all that came before."""

    def model(**options: object) -> Model:
        tokenizer = Tokenizer.load(text_folder)
        return Model("fake", Engine(WatchedBackend(tokenizer.size, **options)), tokenizer, text_folder)

    return model


def untimed(completion: Completion) -> Completion:
    return dataclasses.replace(completion, ttft_s=None, decode_tokens_per_s=None)


PROMPTS = [f"prompt number {i} " * (1 + i % 7) for i in range(30)]


@pytest.mark.parametrize("concurrent", [1, 3, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 20},
        {"max_tokens": 1, "logprobs": 2},
        {"max_tokens": 40, "temperature": 1.5, "seed": 5, "frequency_penalty": 0.5},
        {"max_tokens": 60, "stop": ["a", "Q", "7"]},
    ],
)
def test_each_prompt_is_answered_as_it_would_be_alone(make, concurrent, options) -> None:
    prompts = [*PROMPTS, [1, 2, 3]]
    many = make().generate_many(prompts, max_concurrent=concurrent, **options)
    model = make()
    assert [untimed(one) for one in many] == [untimed(model.generate(prompt, **options)) for prompt in prompts]
    if "stop" in options:
        assert {one.finish_reason for one in many} == {"stop", "length"}
    assert all(one.ttft_s is not None and one.ttft_s >= 0 for one in many)


def test_no_prompts_no_answers(make) -> None:
    assert make().generate_many([]) == []


def test_a_bad_prompt_is_named_by_its_place_and_nothing_is_left_running(make) -> None:
    others = set(threading.enumerate())  # servers of other tests keep theirs
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]: the prompt is empty"):
        make().generate_many(["a", "", "b"])
    with pytest.raises(InvalidRequest, match=r"prompts\[0\]: token id 99999 is outside"):
        make().generate_many([[99999]])
    started = set(threading.enumerate()) - others
    assert not [thread for thread in started if thread.name == "onekernel-scheduler"]


def test_wrong_arguments_are_told(make) -> None:
    with pytest.raises(TypeError, match="for one text there is `generate`"):
        make().generate_many("text")
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        make().generate_many(["a"], temprature=1)
    with pytest.raises(InvalidRequest, match="max_concurrent = 0 must be at least 1"):
        make().generate_many(["a"], max_concurrent=0)


def test_a_failure_of_the_engine_is_raised(make) -> None:
    model = make()
    model.close()
    with pytest.raises(Exception, match="closed"):
        model.generate_many(["a", "b"])
