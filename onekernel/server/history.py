"""Conversations as clients send them, in the form that the model's chat template takes.

Two requests that mean the same must become the same tokens, however they are written: a prefix that changes between
turns has to be read again. And the templates of Qwen3.5 take a system message at the beginning only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onekernel.server.errors import RequestError

SYSTEM_ROLES = ("system", "developer")
# Claude Code begins its system prompt with a line that differs in each session.
BILLING_HEADER = "x-anthropic-billing-header:"


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, or a list of parts.

    Raises:
        RequestError: a part is not text (an image, a sound); names `where`.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", parameter=where)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(
                f"{where}[{i}] is of type {kind!r}: this model reads text only",
                code="unsupported_content",
                parameter=f"{where}[{i}]",
            )
    return "\n".join(texts)


def for_template(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with `role`, `content` (text), `reasoning_content` and `tool_calls`, as the template takes them.

    The system messages at the beginning become one. A later one stays where it is, as a reminder of the user: moved to
    the front it would change what was read before.
    """
    system: list[str] = []
    rest: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] not in SYSTEM_ROLES:
            rest.append(dict(message))
        elif rest:
            reminder = f"<system-reminder>\n{message['content']}\n</system-reminder>"
            rest.append({"role": "user", "content": reminder})
        elif not message["content"].lstrip().startswith(BILLING_HEADER):
            system.append(message["content"])
    head = "\n\n".join(text for text in system if text)
    if not any(message["role"] == "user" for message in rest):
        # The template needs one; so do warm-up requests, which have nothing else.
        rest.append({"role": "user", "content": ""})
    return [{"role": "system", "content": head}, *rest] if head else rest


def arguments_of(text: Any) -> dict[str, Any]:
    """The arguments of an earlier call. What is no JSON object (models err) must not make the conversation invalid."""
    value = text
    if isinstance(text, str):
        try:
            value = json.loads(text) if text.strip() else {}
        except ValueError:
            value = text
    return value if isinstance(value, dict) else {"arguments": value}


def call(name: str, arguments: Any) -> dict[str, Any]:
    """A tool call of an assistant's message, as the template takes it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments_of(arguments)}}


def tool(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A tool, as the template takes it."""
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = parameters if isinstance(parameters, dict) else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]
