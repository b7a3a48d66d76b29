"""Tool calls: every format that models write, in any pieces, and malformed ones."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onekernel.text.tool_calls import CallArguments, CallEnd, CallStart, Event, Text, ToolCallParser, parameter_kinds

SCHEMA = {
    "type": "object",
    "properties": {
        "command": {"type": "string"},
        "count": {"type": "integer"},
        "on": {"type": "boolean"},
        "list": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mode": {"$ref": "#/$defs/mode"},
    },
    "$defs": {"mode": {"enum": ["a", "b"]}},
}
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": SCHEMA}}]


def written(name: str, parameters: dict[str, str]) -> str:
    """A call as the chat template writes it."""
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def parsed(text: str, pieces: int | None = None, seed: int = 0) -> list[Event]:
    """The events of a text that comes at once, or character by character (1), or in random pieces."""
    parser = ToolCallParser(TOOLS)
    events: list[Event] = []
    if pieces is None:
        events += parser.push(text)
    else:
        rest, chance = text, random.Random(seed)
        while rest:
            size = chance.randint(1, pieces)
            events += parser.push(rest[:size])
            rest = rest[size:]
    return events + parser.flush()


def summed(events: list[Event]) -> list[Any]:
    """Texts as strings; calls as [name, JSON of the arguments, complete]."""
    result: list[Any] = []
    for event in events:
        if isinstance(event, Text):
            if result and isinstance(result[-1], str):
                result[-1] += event.text
            else:
                result.append(event.text)
        elif isinstance(event, CallStart):
            result.append([event.name, "", None])
        elif isinstance(event, CallArguments):
            result[-1][1] += event.json
        elif isinstance(event, CallEnd):
            result[-1][2] = event.complete
    return result


def calls(text: str) -> list[tuple[str, Any]]:
    return [(part[0], json.loads(part[1])) for part in summed(parsed(text)) if isinstance(part, list)]


def test_values_have_the_types_of_the_schema() -> None:
    values = {"command": "ls -l", "count": "3", "on": "true", "list": '["a", 1]', "maybe": "null", "mode": "a"}
    assert calls(written("run", values)) == [
        ("run", {"command": "ls -l", "count": 3, "on": True, "list": ["a", 1], "maybe": None, "mode": "a"})
    ]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("command", "3", "3"),
        ("command", '{"a": 1}', '{"a": 1}'),
        ("command", "", ""),
        ("command", "two\nlines\n", "two\nlines\n"),
        ("command", 'say "hi"\t\\', 'say "hi"\t\\'),
        ("command", "a </parameter> b", "a </parameter> b"),
        ("command", "x\n</parameter>\ny", "x\n</parameter>\ny"),
        ("command", "<tool_call> in text", "<tool_call> in text"),
        ("on", "False", False),
        ("count", "many", "many"),
        ("count", "1e400", "1e400"),
        ("count", "NaN", "NaN"),
        ("maybe", "text", "text"),
        ("unknown", "7", 7),
        ("unknown", "seven", "seven"),
        ("unknown", '"quoted"', '"quoted"'),
    ],
)
def test_a_value_arrives_as_it_was_meant(name: str, text: str, value: object) -> None:
    assert calls(written("run", {name: text})) == [("run", {name: value})]


def test_text_around_calls_is_kept_without_the_space_of_the_format() -> None:
    text = f"First.\n\n{written('run', {'count': '1'})}\n{written('run', {})}"
    assert summed(parsed(text)) == ["First.", ["run", '{"count": 1}', True], ["run", "{}", True]]


def test_strings_stream_before_they_are_complete() -> None:
    parser = ToolCallParser(TOOLS)
    events = parser.push("<tool_call>\n<function=run>\n<parameter=command>\necho hello ")
    assert summed(events) == [["run", '{"command": "echo hello ', None]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Without its <tool_call>, as the coder models write it
        ("<function=run>\n<parameter=count>\n1\n</parameter>\n</function>", [["run", '{"count": 1}', True]]),
        # Of Qwen3 and others
        ('<tool_call>\n{"name": "run", "arguments": {"count": 1}}\n</tool_call>', [["run", '{"count": 1}', True]]),
        # Closing tags missing at the end
        ("<tool_call>\n<function=run>\n<parameter=count>\n1\n</parameter>", [["run", '{"count": 1}', True]]),
        ("<tool_call>\n<function=run>\n<parameter=on>\n1\n</parameter>\n</tool_call>", [["run", '{"on": 1}', True]]),
        # Cut off: nobody may run it, so its JSON stays open
        ("<tool_call>\n<function=run>\n<parameter=command>\nrm -rf /tm", [["run", '{"command": "rm -rf /tm', False]]),
        ("<tool_call>\n<function=run>\n<parameter=count>\n12", [["run", '{"count": ', False]]),
        # Not calls at all
        ("a < b and <tool", ["a < b and <tool"]),
        ("<function=unknown>x", ["<function=unknown>x"]),
        ("<tool_call>nonsense", ["<tool_call>nonsense"]),
        ("<tool_call>\n{broken\n</tool_call>", ["<tool_call>{broken\n</tool_call>"]),
        ("<tool_call>\n<function=", ["<tool_call>\n<function="]),
        # Garbage between parameters, a parameter twice
        (
            "<tool_call>\n<function=run>\noops <b>\n<parameter=count>\n1\n</parameter>\n"
            "<parameter=count>\n2\n</parameter>\n</function>\n</tool_call>",
            [["run", '{"count": 1}', True]],
        ),
    ],
)  # fmt: skip
def test_what_models_write_instead(text: str, expected: list[Any]) -> None:
    assert summed(parsed(text)) == expected
    assert summed(parsed(text, 1)) == expected


PARTS = [*'ab<>/=\n"\\ é🙂{}', "</parameter>", "<parameter=", "</function>"]
values = st.lists(st.sampled_from(PARTS)).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=4), st.integers(1, 12), st.integers())
def test_the_pieces_in_which_text_comes_do_not_matter(texts: list[str], pieces: int, seed: int) -> None:
    text = "intro " + "\n".join(written("run", {"command": value, "unknown": value}) for value in texts)
    assert summed(parsed(text, pieces, seed)) == summed(parsed(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from('<>/=\n toolcafunipremd_{}"'), max_size=60), st.integers())
def test_any_text_is_parsed_without_an_error(text: str, seed: int) -> None:
    parsed(text, 7, seed)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_string_without_tags_arrives_unchanged(value: str) -> None:
    if "<" not in value:
        assert calls(written("run", {"command": value})) == [("run", {"command": value})]


def test_kinds_of_parameters() -> None:
    assert parameter_kinds(SCHEMA) == {
        "command": "string",
        "count": "json",
        "on": "json",
        "list": "json",
        "maybe": "either",
        "mode": "string",
    }
    assert parameter_kinds({"properties": {"x": {"$ref": "#/properties/x"}}}) == {"x": "either"}
    assert parameter_kinds("nonsense") == {}
