"""The tool calls of Qwen3.5, parsed as they come.

    <tool_call>
    <function=NAME>
    <parameter=PARAMETER>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value of a string parameter is plain text, every other one is JSON. The APIs want the arguments of a call as one JSON
object, in text: it is made piece by piece, strings without waiting for their end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onekernel.text.thinking import overlap

CALL, CALL_END, FUNCTION, FUNCTION_END = "<tool_call>", "</tool_call>", "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
LONGEST_NAME = 256
# A value may hold `</parameter>` itself: only one that the format goes on after is the end.
VALUE_END = re.compile(r"\n?</parameter>\s*(?=<parameter=|</function>|</tool_call>)")
STRING, JSON, EITHER = "string", "json", "either"


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. Those that follow belong to it until its end."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments."""

    json: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is over. If it is not complete, neither is the JSON of its arguments: nobody should run it."""

    complete: bool


Event = Text | CallStart | CallArguments | CallEnd


class ToolCallParser:
    """Feeds on text and gives the events that are certain."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Args:
        tools: {"type": "function", "function": {"name": ..., "parameters": JSON schema}}, as the template takes them.
        """
        self._kinds = {name: parameter_kinds(parameters) for name, parameters in map(_signature, tools)}
        self._held = ""
        self._state = self._text
        self._events: list[Event] = []
        self._wrapped = False  # in <tool_call>
        self._name = ""
        self._seen: set[str] = set()  # parameters of this call
        self._parameter = ""
        self._value: list[str] = []  # of a parameter that is not a string, so far

    def push(self, text: str) -> list[Event]:
        self._held += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[Event]:
        """What was held back, once no more will come. A call without its end tags is not complete."""
        if self._state in (self._text, self._wrapper):
            self._give_text(("" if self._state == self._text else CALL) + self._held)
        elif self._state == self._head:
            self._give_text((CALL + "\n" if self._wrapped else "") + FUNCTION + self._held)
        elif self._state == self._json_call:
            self._finish_json_call(self._held)
        elif self._state == self._body and not self._held.strip():
            self._end_call(complete=True)  # all parameters are there, only closing tags are not
        elif self._state == self._body and CALL_END.startswith(self._held.strip()):
            self._end_call(complete=True)
        elif self._state in (self._body, self._string, self._other, self._skipped):
            self._finish_value_at_the_end()
        self._held = ""
        self._state = self._text
        events, self._events = self._events, []
        return events

    # The states: each looks at the text held, takes what is certain, and returns whether there may be more to do.

    def _text(self) -> bool:
        """Outside of calls."""
        found = [(at, tag) for tag in (CALL, FUNCTION) if (at := self._held.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            self._give_text(self._held[:at].rstrip() if tag == CALL else self._held[:at])
            self._held = self._held[at + len(tag) :]
            self._wrapped = tag == CALL
            self._state = self._wrapper if self._wrapped else self._head
            return True
        keep = max(overlap(self._held, CALL), overlap(self._held, FUNCTION))
        final = self._held[: len(self._held) - keep]
        # The white space before a call belongs to the format.
        final = final.rstrip()
        self._give_text(final)
        self._held = self._held[len(final) :]
        return False

    def _wrapper(self) -> bool:
        """After <tool_call>."""
        inner = self._held.lstrip()
        if inner.startswith(FUNCTION):
            self._held = inner[len(FUNCTION) :]
            self._state = self._head
            return True
        if inner.startswith("{"):  # the format of Qwen3 and others
            self._held = inner
            self._state = self._json_call
            return True
        if FUNCTION.startswith(inner):
            return False
        self._give_text(CALL + self._held)
        self._held = ""
        self._state = self._text
        return True

    def _json_call(self) -> bool:
        body, end, rest = self._held.partition(CALL_END)
        if not end:
            return False
        self._finish_json_call(body)
        self._held = rest
        self._state = self._after
        return True

    def _head(self) -> bool:
        """The name of the function, after <function=."""
        name, end, rest = self._held.partition(">")
        if not end and len(name) <= LONGEST_NAME and "\n" not in name:
            return False
        name = name.strip().strip("\"'")
        certain = name in self._kinds or (self._wrapped and name and end and "\n" not in name)
        if not certain:
            self._give_text((CALL + "\n" if self._wrapped else "") + FUNCTION + self._held)
            self._held = ""
            self._state = self._text
            return True
        self._name, self._held = name, rest
        self._seen.clear()
        self._events.append(CallStart(name))
        self._state = self._body
        return True

    def _body(self) -> bool:
        """Between parameters."""
        inner = self._held.lstrip()
        if inner.startswith(PARAMETER):
            name, end, rest = inner[len(PARAMETER) :].partition(">")
            if not end:
                return False
            self._begin_parameter(name.strip().strip("\"'"))
            self._held = rest
            return True
        for end in (FUNCTION_END, CALL_END):
            if inner.startswith(end):
                self._end_call(complete=True)
                self._held = inner[len(end) :]
                self._state = self._after if end == FUNCTION_END and self._wrapped else self._text
                return True
        if any(tag.startswith(inner) for tag in (PARAMETER, FUNCTION_END, CALL_END)):
            return False
        # Not of the format: dropped up to the next tag.
        at = inner.find("<", 1)
        self._held = inner[at:] if at >= 0 else ""
        return at >= 0

    def _after(self) -> bool:
        """After </function>: its </tool_call>, if it comes."""
        inner = self._held.lstrip()
        if CALL_END.startswith(inner) and inner != CALL_END:
            return False
        self._held = inner.removeprefix(CALL_END)
        if inner == self._held and inner.startswith(FUNCTION):  # a second function in one <tool_call>
            self._held = inner[len(FUNCTION) :]
            self._state = self._head
            return True
        self._held = self._held.lstrip("\n")
        self._state = self._text
        return True

    def _string(self) -> bool:
        """The value of a string parameter: given out as it comes."""
        value, ended = self._value_so_far()
        self._give_string(value)
        if ended:
            self._events.append(CallArguments('"'))
            self._state = self._body
        return ended

    def _other(self) -> bool:
        """The value of any other parameter: given out when it is whole."""
        value, ended = self._value_so_far()
        self._value.append(value)
        if ended:
            self._events.append(CallArguments(self._as_json("".join(self._value).removeprefix("\n"))))
            self._state = self._body
        return ended

    def _skipped(self) -> bool:
        """A value that nobody gets."""
        _, ended = self._value_so_far()
        if ended:
            self._state = self._body
        return ended

    def _value_so_far(self) -> tuple[str, bool]:
        """Takes (the part of the value that is certain, whether it is the last)."""
        end = VALUE_END.search(self._held)
        at = end.start() if end else self._first_possible_end()
        value = self._held[:at]
        self._held = self._held[end.end() if end else at :]
        return value, end is not None

    def _first_possible_end(self) -> int:
        """Where in the text held an end of the value might begin."""
        for match in re.finditer(r"\n?</parameter>", self._held):
            rest = self._held[match.end() :].lstrip()
            if any(tag.startswith(rest) for tag in (PARAMETER, FUNCTION_END, CALL_END)):
                return match.start()
        tail = max(overlap(self._held, "\n" + PARAMETER_END), overlap(self._held, PARAMETER_END))
        return len(self._held) - tail

    def _begin_parameter(self, name: str) -> None:
        separator = ", " if self._seen else "{"
        self._parameter = name
        self._kind = self._kinds.get(self._name, {}).get(name, EITHER)
        if name in self._seen:  # a second time: JSON has no place for it
            self._kind = STRING
            self._state = self._skipped
            return
        self._seen.add(name)
        self._events.append(CallArguments(f"{separator}{json.dumps(name, ensure_ascii=False)}: "))
        if self._kind == STRING:
            self._events.append(CallArguments('"'))
            self._at_start = True
        self._value = []
        self._state = self._string if self._kind == STRING else self._other

    def _give_text(self, text: str) -> None:
        if text:
            self._events.append(Text(text))

    def _give_string(self, text: str) -> None:
        if self._at_start and text:
            text, self._at_start = text.removeprefix("\n"), False
        if text:
            self._events.append(CallArguments(json.dumps(text, ensure_ascii=False)[1:-1]))

    def _as_json(self, text: str) -> str:
        """A value that need not be a string. What is no JSON is taken as a string."""
        plain = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
        try:
            value = json.loads(plain)
            written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            return json.dumps(text, ensure_ascii=False)
        if self._kind == EITHER and isinstance(value, str):
            return json.dumps(text, ensure_ascii=False)  # quotes are part of a plain string
        return written

    def _end_call(self, complete: bool) -> None:
        if complete:
            self._events.append(CallArguments("}" if self._seen else "{}"))
        self._events.append(CallEnd(complete))

    def _finish_value_at_the_end(self) -> None:
        closed = re.fullmatch(r"(?s)(.*?)\n?</parameter>\s*", self._held)
        if closed and self._state == self._string:
            self._give_string(closed[1])
            self._events.append(CallArguments('"'))
        elif closed and self._state == self._other:
            self._events.append(CallArguments(self._as_json("".join([*self._value, closed[1]]).removeprefix("\n"))))
        elif self._state == self._string:
            self._give_string(self._held)
        self._end_call(complete=closed is not None and self._state in (self._string, self._other))

    def _finish_json_call(self, body: str) -> None:
        try:
            call = json.loads(body)
        except ValueError:
            call = None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            self._give_text(CALL + body + CALL_END)
            return
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._events += [CallStart(call["name"]), CallArguments(text), CallEnd(complete=True)]


def parameter_kinds(schema: Any) -> dict[str, str]:
    """Of each parameter of a function: STRING, JSON, or EITHER if its schema allows both (or says nothing)."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {name: _kind(property, schema, 0) for name, property in properties.items()}


def _kind(schema: Any, root: Mapping[str, Any], depth: int) -> str:
    if not isinstance(schema, Mapping) or depth > 8:
        return EITHER
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return _kind(target, root, depth + 1)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            kinds = {_kind(option, root, depth + 1) for option in schema[name]}
            return kinds.pop() if len(kinds) == 1 else EITHER
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        strings = [isinstance(value, str) for value in values]
        return STRING if all(strings) else EITHER if any(strings) else JSON
    types = schema.get("type")
    if isinstance(types, list):
        return STRING if types == ["string"] else EITHER if "string" in types else JSON
    return EITHER if types is None else STRING if types == "string" else JSON


def _signature(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool.get("function", tool)
    return str(function.get("name", "")), function.get("parameters") or {}
