"""Requests that share the GPU: long answers, grammars beside others, kept prefixes, and clients that leave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

import onekernel
from onekernel.engine import Engine
from onekernel.sampling.params import SamplingParams
from onekernel.scheduler import Request, Scheduler, Ticket
from onekernel.text.grammar import Grammars

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "count", "ok"],
    "additionalProperties": False,
}
TEXTS = ("def fibonacci(n):", "import os\n", "class Stack:", "while True:\n    line =")
LIMIT = 60  # seconds for all requests of a test


@pytest.fixture(scope="module")
def model(gpu) -> Iterator[onekernel.Model]:
    with onekernel.load("demo", backend="cuda") as model:
        yield model


@pytest.fixture
def scheduler(model) -> Iterator[Scheduler]:
    scheduler = Scheduler(model.engine)
    yield scheduler
    scheduler.close()


def alone(engine: Engine, request: Request) -> list[int]:
    """The tokens of a request in a session of its own, made in one go."""
    session = engine.new_session()
    session.extend(request.prompt)
    stream = session.stream(request.sampling, request.max_tokens, request.stop_tokens, request.constraint)
    return [token.id for token in stream]


def served(scheduler: Scheduler, *requests: Request) -> list[tuple[Ticket, list[int]]]:
    """All requests at the same time; their tokens when all have ended."""
    news = threading.Event()
    tickets = [scheduler.submit(request, news.set) for request in requests]
    made: list[list[int]] = [[] for _ in tickets]
    open_tickets = set(range(len(tickets)))
    while open_tickets:
        assert news.wait(LIMIT), "no token came for a long time"
        news.clear()
        for i in sorted(open_tickets):
            ended = tickets[i].finish_reason is not None
            made[i] += [token.id for token in tickets[i].take()]
            if ended:
                open_tickets.discard(i)
    for ticket in tickets:
        assert ticket.error is None
    return list(zip(tickets, made, strict=True))


def test_one_request_alone_over_several_long_slices(model, scheduler) -> None:
    request = Request(tuple(model.tokenizer.encode(TEXTS[0])), max_tokens=1500)
    [(ticket, tokens)] = served(scheduler, request)
    assert ticket.finish_reason == "length"
    assert tokens == alone(model.engine, request)


def test_grammar_holds_in_slices_beside_others(model, scheduler, record_property) -> None:
    """The demo model would never write this JSON by itself."""
    grammar, ends = Grammars(model.tokenizer).json_schema(SCHEMA), model.stop_tokens
    prompt = tuple(model.tokenizer.encode("settings = "))

    def constrained(sampling: SamplingParams) -> Request:  # a constraint is of one answer
        return Request(prompt, sampling, max_tokens=300, stop_tokens=ends, constraint=grammar(None))

    hot = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
    plain = Request(prompt, max_tokens=120)
    *answers, (_, beside) = served(scheduler, *(constrained(one) for one in (SamplingParams(), *hot)), plain)
    assert len(beside) == 120
    for ticket, tokens in answers:
        assert ticket.finish_reason == "stop"
        value = json.loads(model.tokenizer.decode(tokens))
        assert set(value) == {"name", "count", "ok"}
        assert (type(value["name"]), type(value["count"]), type(value["ok"])) == (str, int, bool)
    record_property("constrained_tokens", sum(len(tokens) for _, tokens in answers))


def test_kept_prefix_goes_on_as_the_session_would(model, scheduler, record_property) -> None:
    """A second turn that repeats the first one reads only what is new, and its answer is that of a session that never
    left the GPU."""
    first = Request(tuple(model.tokenizer.encode("\n".join(TEXTS) + "\n")), max_tokens=90)
    session = model.engine.new_session()
    session.extend(first.prompt)
    answer = [token.id for token in session.stream(max_tokens=90)]
    more = tuple(model.tokenizer.encode("\n\ndef test_"))
    session.extend(more)
    expected = [token.id for token in session.stream(max_tokens=70)]

    assert [tokens for _, tokens in served(scheduler, first)] == [answer]
    second = Request((*first.prompt, *answer, *more), max_tokens=70)
    [(ticket, tokens)] = served(scheduler, second)
    assert ticket.cached_tokens == len(first.prompt) + len(answer)
    assert tokens == expected
    record_property("cached_tokens", ticket.cached_tokens)


def test_client_that_leaves_takes_nothing_from_the_others(model, scheduler) -> None:
    requests = [Request(tuple(model.tokenizer.encode(text)), max_tokens=200) for text in TEXTS[:2]]
    left = scheduler.submit(Request(tuple(model.tokenizer.encode(TEXTS[2])), max_tokens=2000), lambda: None)
    cancel = threading.Timer(0.02, left.cancel)
    cancel.start()
    for ticket, tokens in served(scheduler, *requests):
        assert (ticket.finish_reason, len(tokens)) == ("length", 200)
    cancel.join()
    deadline = threading.Event()
    for _ in range(500):
        if left.finish_reason is not None:
            break
        deadline.wait(0.01)
    assert left.finish_reason == "cancelled"
