"""The input of /v1/responses: its items as messages, its kinds of tools as functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onekernel.server import history, options
from onekernel.server.errors import RequestError

# Tools that the server of a provider would run itself. There are none here; clients that offer them can do without.
HOSTED_TOOLS = (
    "web_search",
    "web_search_preview",
    "file_search",
    "code_interpreter",
    "image_generation",
    "computer_use_preview",
    "local_shell",
    "mcp",
    "tool_search",
)
MESSAGE_ROLES = ("system", "developer", "user", "assistant")
# What a custom tool takes is one text: the model sees a function with this parameter.
INPUT = "input"


@dataclass
class Tools:
    """The tools of a request.

    Attributes:
        functions: all of them as functions, as the template takes them.
        namespaces: of functions that came in a namespace: the model's name -> (namespace, name in it).
        custom: names of those that take a text.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    custom: set[str] = field(default_factory=set)

    def add(self, tool: dict[str, Any], where: str, namespace: str | None = None) -> None:
        """Raises RequestError: it is of no known type, or has no name."""
        kind = tool.get("type", "function")
        if isinstance(kind, str) and kind.startswith(HOSTED_TOOLS):
            return
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}.name must be a name", parameter=f"{where}.name")
        if kind == "namespace":
            inner = tool.get("tools")
            for i, one in enumerate(inner if isinstance(inner, list) else []):
                if isinstance(one, dict):
                    self.add(one, f"{where}.tools[{i}]", name)
            return
        if kind not in ("function", "custom"):
            raise RequestError(
                f"{where} is of type {kind!r}: function, custom and namespace are supported", parameter=where
            )
        shown = self._name(name, namespace)
        described = tool.get("description")
        description = described if isinstance(described, str) else None
        parameters = tool.get("parameters")
        if kind == "custom":
            self.custom.add(shown)
            description = _custom_description(tool, description)
            parameters = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}
        self.functions.append(history.tool(shown, description, parameters))

    def _name(self, name: str, namespace: str | None) -> str:
        if namespace is None:
            return name
        taken = name in history.names_of(self.functions)
        shown = f"{namespace}__{name}" if taken else name
        self.namespaces[shown] = (namespace, name)
        return shown

    def shown_name(self, name: str, namespace: Any) -> str:
        """What the model calls a function of an earlier turn."""
        return next((shown for shown, known in self.namespaces.items() if known == (namespace, name)), name)


def _custom_description(tool: dict[str, Any], description: str | None) -> str:
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        syntax = form.get("syntax", "a")
        return f"{description or ''}\n\nThe input must be of this {syntax} grammar:\n{form['definition']}".strip()
    return description or ""


def to_messages(given: str | list[dict[str, Any]], instructions: str | None, tools: Tools) -> list[dict[str, Any]]:
    """As the template takes them."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
        return history.for_template(messages)
    for i, item in enumerate(given):
        _add_item(messages, item, f"input[{i}]", tools)
    return history.for_template(messages)


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str, tools: Tools) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in MESSAGE_ROLES:
            raise RequestError(
                f"{where}.role = {role!r} must be one of {', '.join(MESSAGE_ROLES)}", parameter=f"{where}.role"
            )
        text = history.text_of(item.get("content"), f"{where}.content")
        if role != "assistant":
            messages.append({"role": role, "content": text})
            return
        message = _assistant(messages, start_new_after_text=True)
        message["content"] = text
    elif kind == "reasoning":
        # The thinking begins a new message of the assistant.
        parts = item.get("content") or item.get("summary") or []
        text = history.text_of(parts, f"{where}.content")
        _assistant(messages, start_new_after_text=True)["reasoning_content"] = text
    elif kind in ("function_call", "custom_tool_call"):
        name = item.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}.name must be a name", parameter=f"{where}.name")
        arguments = item.get("arguments") if kind == "function_call" else {INPUT: item.get("input", "")}
        call = history.call(tools.shown_name(name, item.get("namespace")), arguments or {})
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "content": history.text_of(item.get("output"), f"{where}.output")})
    elif kind == "additional_tools":
        inner = item.get("tools")
        for i, tool in enumerate(inner if isinstance(inner, list) else []):
            if isinstance(tool, dict):
                tools.add(tool, f"{where}.tools[{i}]")
    elif not (isinstance(kind, str) and kind.removesuffix("_call").removesuffix("_output") in HOSTED_TOOLS):
        raise RequestError(f"{where} is of type {kind!r}, which is not supported", parameter=where)


def _assistant(messages: list[dict[str, Any]], start_new_after_text: bool = False) -> dict[str, Any]:
    """The message of the assistant that an item belongs to: thinking, text and calls of one turn are one message."""
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        if not (start_new_after_text and (last["content"] or last.get("tool_calls"))):
            return last
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def tool_choice(choice: str | dict[str, Any] | None, tools: Tools, several: bool) -> options.ToolOption:
    """Raises RequestError: the choice is not among the tools."""
    if isinstance(choice, dict):
        kind, name = choice.get("type"), choice.get("name")
        if kind in ("function", "custom") and isinstance(name, str):
            choice = tools.shown_name(name, choice.get("namespace"))
        elif isinstance(kind, str) and kind.startswith(HOSTED_TOOLS):
            raise RequestError(f"tool_choice of type {kind!r}: there is no such tool here", parameter="tool_choice")
        else:
            raise RequestError("tool_choice needs type 'function' and a name", parameter="tool_choice")
    elif choice not in (None, options.AUTO, options.NONE, options.REQUIRED):
        raise RequestError(
            f"tool_choice = {choice!r} must be 'auto', 'none', 'required' or name a function", parameter="tool_choice"
        )
    option = options.ToolOption(tools.functions or None, choice or options.AUTO, several)
    options.check_tools(option)
    return option
