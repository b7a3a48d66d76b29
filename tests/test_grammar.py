"""Grammars: only what they allow is sampled, whatever the model prefers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import onekernel
from onekernel.backend.fake import FakeBackend
from onekernel.engine import Engine
from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SamplingParams
from onekernel.text.grammar import Compiled, Grammars
from onekernel.text.tokenizer import Tokenizer
from onekernel.text.tool_calls import CallArguments, CallEnd, CallStart, ToolCallParser

DEMO = Path(onekernel.__file__).parent / "demo"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "parameters": {
                "type": "object",
                "properties": {
                    "where": {"enum": ["left", "right"]},
                    "far": {"type": "integer", "minimum": 1, "maximum": 9},
                    "why": {"type": "string"},
                },
                "required": ["where", "far"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


def sampled(tokenizer: Tokenizer, grammar: Compiled, seed: int, count: int = 400, after: str = "") -> str:
    """What comes of logits that prefer nothing."""

    def flat(_: Sequence[int], __: int) -> int:
        return tokenizer.size + 1  # a row of padding: never chosen

    backend = FakeBackend(tokenizer.size, next_token=flat)
    session = Engine(backend).new_session()
    session.extend([1])
    end = tokenizer.token_id(after) if after else None
    sampling = SamplingParams(temperature=1.0, seed=seed)
    tokens = list(session.stream(sampling, count, tokenizer.stop_token_ids, grammar(end)))
    assert tokens[-1].id in tokenizer.stop_token_ids, "it did not come to an end"
    return tokenizer.decode([token.id for token in tokens])


@pytest.mark.parametrize("seed", range(5))
def test_json_is_of_its_schema(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "numbers": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3},
            "name": {"type": "string", "maxLength": 5},
        },
        "required": ["kind", "numbers", "name"],
        "additionalProperties": False,
    }
    value = json.loads(sampled(tokenizer, grammars.json_schema(schema), seed))
    assert value["kind"] in ("a", "b")
    assert len(value["numbers"]) <= 3
    assert len(value["name"]) <= 5


def test_regular_expressions_choices_and_lark(tokenizer: Tokenizer, grammars: Grammars) -> None:
    assert sampled(tokenizer, grammars.regex("[ab]{4}"), 1).strip("ab") == ""
    assert sampled(tokenizer, grammars.choice(["yes", 'n"o']), 2) in ("yes", 'n"o')
    assert sampled(tokenizer, grammars.lark('start: "x" ("y" | "z")'), 3) in ("xy", "xz")


@pytest.mark.parametrize("seed", range(6))
def test_calls_are_of_the_tools(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    # Without the free text: from logits that prefer nothing, its end would be long in coming.
    short = json.loads(json.dumps(TOOLS))
    del short[0]["function"]["parameters"]["properties"]["why"]
    text = sampled(tokenizer, grammars.tool_calls(short, several=seed % 2 == 0), seed)
    parser = ToolCallParser(short)
    events = parser.push(text) + parser.flush()
    starts = [event.name for event in events if isinstance(event, CallStart)]
    assert starts
    assert set(starts) <= {"move", "stop"}
    assert seed % 2 == 0 or len(starts) == 1
    assert all(event.complete for event in events if isinstance(event, CallEnd))
    if starts[0] == "move":
        arguments = "".join(event.json for event in events if isinstance(event, CallArguments)).split("}")[0] + "}"
        value = json.loads(arguments)
        assert value["where"] in ("left", "right")
        assert 1 <= value["far"] <= 9


def test_a_free_text_parameter_may_hold_anything_but_its_end(tokenizer: Tokenizer, grammars: Grammars) -> None:
    constraint = grammars.tool_calls(TOOLS, several=False)(None)
    text = (
        "<tool_call>\n<function=move>\n<parameter=where>\nleft\n</parameter>\n<parameter=far>\n3\n</parameter>\n"
        "<parameter=why>\nif a < b:\n  </para> \"x\"\n</parameter>\n</function>\n</tool_call>"
    )  # fmt: skip
    for token in tokenizer.encode(text):
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed[token]
        constraint.accept(token)
    allowed = constraint.allowed()
    assert allowed is not None
    assert allowed[sorted(tokenizer.stop_token_ids)].all()


def test_an_unknown_function_cannot_be_begun(tokenizer: Tokenizer, grammars: Grammars) -> None:
    constraint = grammars.tool_calls(TOOLS, several=False)(None)
    for token in tokenizer.encode("<tool_call>\n<function="):
        constraint.accept(token)
    allowed = constraint.allowed()
    assert allowed is not None
    assert not allowed[tokenizer.encode("z")[0]]


def test_thinking_is_free_but_must_come_to_an_end(tokenizer: Tokenizer, grammars: Grammars) -> None:
    end = tokenizer.token_id("</think>")
    assert end is not None
    constraint = grammars.json_object()(end)
    free = constraint.allowed()
    assert free is not None
    assert not free[sorted(tokenizer.stop_token_ids)].any()
    assert free.sum() == tokenizer.size - len(tokenizer.stop_token_ids)
    for token in [*tokenizer.encode("any thing"), end]:
        constraint.accept(token)
    held = constraint.allowed()
    assert held is not None
    assert held[tokenizer.encode("{")[0]]
    assert not held[tokenizer.encode("a")[0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda grammars: grammars.json_schema({"type": "nonsense"}), "JSON schema"),
        (lambda grammars: grammars.json_schema([]), "JSON schema is a list"),
        (lambda grammars: grammars.regex("(["), "regular expression"),
        (lambda grammars: grammars.lark("start: missing"), "grammar"),
    ],
)
def test_what_cannot_be_enforced_is_refused(grammars: Grammars, make: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(grammars)
