"""Messages to prompt text, by the model's own chat template.

Templates come from model repositories, so they run in jinja's immutable sandbox: no attributes of Python's insides, no
change of what they are given, ranges of at most 100,000 steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from onekernel.errors import CheckpointError, InvalidRequest

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, source: str, origin: str = "the chat template") -> None:
        """Compile a template.

        Raises:
            CheckpointError: `source` is not a template; names `origin`.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin} is not a valid jinja template ({error}); download it again") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read chat_template.jinja, or the field chat_template of tokenizer_config.json.

        Raises:
            CheckpointError: there is neither, or it is damaged.
        """
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path} is not UTF-8 ({error}); download the file again") from None
        path = folder / "tokenizer_config.json"
        template: Any = None
        if path.is_file():
            try:
                template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            except (ValueError, RecursionError, AttributeError) as error:
                raise CheckpointError(f"{path} is not a JSON object ({error}); download the file again") from None
        if isinstance(template, list):  # several named ones
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise CheckpointError(f"{folder} has no chat template (chat_template.jinja): this model cannot chat")
        return cls(template, str(path))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation, special tokens as text.

        Args:
            messages: {"role": ..., "content": ...}, with tool_calls, reasoning_content and so on as the template knows.
            tools: JSON descriptions of functions.
            add_generation_prompt: end with the beginning of the assistant's turn.
            enable_thinking: None leaves it to the template.
            extra: further variables for the template.

        Raises:
            InvalidRequest: a message is malformed (names its index), or the template refuses the conversation.
        """
        check_messages(messages)
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            **extra,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses the conversation: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template fails on this conversation ({type(error).__name__}: {error}); "
                "check the fields of the messages and tools"
            ) from None


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidRequest, naming the index, unless every message has a known role and usable content."""
    if not messages:
        raise InvalidRequest("messages is empty: give at least one message with role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{i}] is a {type(message).__name__}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequest(f"messages[{i}].role = {role!r} must be one of {', '.join(ROLES)}")
        if not (isinstance(content, str | list) or (content is None and role == "assistant")):
            raise InvalidRequest(f"messages[{i}].content is a {type(content).__name__}, not a text or a list of parts")


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # Plain JSON: jinja's own filter would escape for HTML.
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
