"""The function that the checks let a model call, and whether a call of it is right.

All its values are from short lists, so that a server which constrains the arguments ends a call soon, even with a model
that makes no sense.
"""

from __future__ import annotations

import json
from typing import Any

from onekernel.probe.findings import Findings, shown

NAME = "get_weather"
DESCRIPTION = "The weather of the coming days."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Oslo"], "description": "where"},
        "days": {"type": "integer", "enum": [1, 2, 3], "description": "how many days"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
QUESTION = "What will the weather be in Oslo in the next 2 days? Use the tool."
MAX_TOKENS = 2048  # a model may think before it calls


def check_name(name: Any, findings: Findings) -> None:
    findings.require(name == NAME, f"the tool call names {shown(name)}, not the only tool there is, {NAME!r}")


def check_arguments(arguments: Any, findings: Findings) -> None:
    """`arguments` as text, the way of the OpenAI APIs."""
    if not findings.require(isinstance(arguments, str), f"tool arguments are {shown(arguments)}, not a string of JSON"):
        return
    try:
        value = json.loads(arguments)
    except ValueError:
        findings.fault(f"tool arguments are not JSON: {shown(arguments)}")
        return
    check_value(value, findings)


def check_value(value: Any, findings: Findings) -> None:
    """`value` as an object, the way of the Anthropic API."""
    if not findings.require(isinstance(value, dict), f"tool arguments are {shown(value)}, not an object"):
        return
    properties = SCHEMA["properties"]
    fitting = value.keys() == properties.keys() and all(value[name] in properties[name]["enum"] for name in properties)
    findings.require(fitting, f"tool arguments do not fit the schema of the tool: {shown(value)}")
