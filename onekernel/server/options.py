"""Fields that several APIs share: sampling, stop strings, thinking, tools and structured output."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SamplingParams
from onekernel.server.errors import RequestError
from onekernel.server.history import names_of
from onekernel.server.service import Service
from onekernel.text.grammar import Compiled

# Most tokens of thinking for each effort that the APIs have words for.
EFFORTS: dict[str, int | None] = {
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": 32768,
    "max": None,
}
NO_EFFORT = ("none", "minimal")
MOST_STOPS = 16
AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclass(frozen=True)
class ThinkingOption:
    """Attributes:
    enabled: None leaves it to the model's template.
    tokens: most tokens; None: no limit.
    """

    enabled: bool | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class ToolOption:
    """Attributes:
    tools: as the template takes them; None: none.
    choice: AUTO, NONE, REQUIRED or the name of a function.
    several: whether one answer may hold more than one call.
    """

    tools: list[dict[str, Any]] | None = None
    choice: str = AUTO
    several: bool = True


def sampling(service: Service, given: Mapping[str, Any], names: Mapping[str, str] | None = None) -> SamplingParams:
    """The model's defaults with what the request gives (None: not given).

    Args:
        names: how the request calls a field, where it is not the name in SamplingParams.

    Raises:
        RequestError: a value is out of range; names the field of the request.
    """
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(options.get("seed"), int):
        options["seed"] %= 2**64  # clients send negative ones too
    try:
        return dataclasses.replace(service.model.tokenizer.default_sampling, **options)
    except InvalidRequest as error:
        field = str(error).split(" ", 1)[0].split("[", 1)[0]
        field = (names or {}).get(field, field)
        raise RequestError(str(error), parameter=field) from None


class OpenAIFields(Protocol):
    """What OpenAI's chat completions and completions ask of sampling in the same words."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: dict[str, float] | None
    seed: int | None


def openai_sampling(service: Service, fields: OpenAIFields) -> dict[str, Any]:
    """These fields for `sampling`. Raises RequestError: a key of logit_bias is no token id."""
    return {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": None if fields.top_k is None else max(0, fields.top_k),  # -1 is "all" in other servers
        "min_p": fields.min_p,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "repetition_penalty": fields.repetition_penalty,
        "logit_bias": logit_bias(service, fields.logit_bias),
        "seed": fields.seed,
    }


def seeds(first: int | None, count: int) -> list[int]:
    """One for each of several choices, so that they differ; with a seed given, the same each time."""
    first = secrets.randbits(63) if first is None else first
    return [(first + i) % 2**64 for i in range(count)]


def logit_bias(service: Service, given: Mapping[str, float] | None) -> dict[int, float] | None:
    """Token ids are strings in JSON."""
    if given is None:
        return None
    result = {}
    for name, bias in given.items():
        if not name.isascii() or not name.isdigit() or int(name) >= service.model.tokenizer.size:
            raise RequestError(
                f"logit_bias: {name!r} is not a token id from 0 to {service.model.tokenizer.size - 1}",
                parameter="logit_bias",
            )
        result[int(name)] = bias
    return result


def stops(given: str | Sequence[str] | None, name: str = "stop") -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given or ())
    if len(found) > MOST_STOPS:
        raise RequestError(f"{name} holds {len(found)} strings, but at most {MOST_STOPS} can be used", parameter=name)
    if not all(found):
        raise RequestError(f"{name} holds an empty string: it would end every answer at once", parameter=name)
    return found


def most_tokens(given: int | None, name: str) -> int | None:
    if given is not None and given < 1:
        raise RequestError(f"{name} = {given} must be at least 1", parameter=name)
    return given


def effort(given: str | None, name: str) -> ThinkingOption:
    """Thinking by the word for an effort."""
    if given is None:
        return ThinkingOption()
    if given in NO_EFFORT:
        return ThinkingOption(False)
    if given not in EFFORTS:
        known = ", ".join([*NO_EFFORT, *EFFORTS])
        raise RequestError(f"{name} = {given!r} must be one of {known}", parameter=name)
    return ThinkingOption(True, EFFORTS[given])


def check_tools(option: ToolOption, field: str = "tool_choice") -> None:
    """Raises RequestError if the choice is not among the tools."""
    names = names_of(option.tools or [])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tools holds two functions with the name {twice!r}", parameter="tools")
    if option.choice in (AUTO, NONE):
        return
    if not names:
        raise RequestError(f"{field} asks for a call, but there are no tools", parameter=field)
    if option.choice != REQUIRED and option.choice not in names:
        raise RequestError(
            f"{field} names the function {option.choice!r}, but tools has only {', '.join(names)}", parameter=field
        )


async def tool_grammar(service: Service, option: ToolOption) -> Compiled | None:
    """What enforces a choice of REQUIRED or of one function; None if the model is free."""
    if option.choice in (AUTO, NONE) or not option.tools:
        return None
    tools = [tool for tool in option.tools if option.choice == REQUIRED or tool["function"]["name"] == option.choice]
    several = option.several and option.choice == REQUIRED
    return await asyncio.to_thread(service.grammars.tool_calls, tools, several=several)
