"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, as Claude Code uses them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.errors import OnekernelError
from onekernel.server import body, history, options
from onekernel.server.body import Fields
from onekernel.server.errors import RequestError, anthropic_body, as_request_error
from onekernel.server.messages_events import PING, MessageEvents
from onekernel.server.service import Answer, Ask, Service
from onekernel.server.streaming import EventStream, event, while_there
from onekernel.text.grammar import Compiled

ROLES = ("user", "assistant", "system")


class CountFields(Fields):
    """The body of a request to count_tokens."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    # Known, and without effect on one local model.
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    betas: list[str] | None = None


class MessageFields(CountFields):
    """The body of a request."""

    max_tokens: int | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    # Known, and not to be had here: an error if they ask for anything.
    container: str | dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None


async def messages(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, headers = await body.read(request, MessageFields)
    answers = service.answers([await to_ask(service, fields)])
    shown = (fields.thinking or {}).get("display") != "omitted"
    events = MessageEvents(service.settings.model_name, shown)
    if fields.stream:
        return EventStream(_stream(events, answers[0]), answers, headers)
    return JSONResponse(await while_there(request, answers, _whole(events, answers[0])), headers=headers)


async def count_tokens(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, _ = await body.read(request, CountFields)
    prompt, _, _ = await _prompt(service, fields, check=False)
    return JSONResponse({"input_tokens": len(prompt)})


async def to_ask(service: Service, fields: MessageFields) -> Ask:
    """Raises RequestError and InvalidRequest."""
    for name in ("container", "mcp_servers"):
        if getattr(fields, name):
            raise body.unsupported(name, "this server runs no tools itself")
    prompt, inside, choice = await _prompt(service, fields)
    thinking = thinking_option(fields)
    wanted = fields.output_format or fields.output_config
    grammar = await asyncio.to_thread(output_grammar, service, fields) if wanted else None
    if grammar is not None and choice.choice not in (options.AUTO, options.NONE):
        raise RequestError("output_format and tool_choice cannot both decide the answer", parameter="tool_choice")
    sampling = options.sampling(
        service, {"temperature": fields.temperature, "top_p": fields.top_p, "top_k": fields.top_k}
    )
    return Ask(
        prompt=prompt,
        sampling=sampling,
        max_tokens=options.most_tokens(fields.max_tokens, "max_tokens"),
        stop=options.stops(fields.stop_sequences, "stop_sequences"),
        thinking=inside,
        thinking_tokens=thinking.tokens,
        tools=choice.tools if choice.choice != options.NONE else None,
        several_calls=choice.several,
        grammar=grammar or await options.tool_grammar(service, choice),
    )


async def _prompt(
    service: Service, fields: CountFields, check: bool = True
) -> tuple[tuple[int, ...], bool, options.ToolOption]:
    """(the prompt, whether it opens the thinking, the tools)."""
    choice, deferred = tool_option(fields)
    told = to_messages(fields, deferred)
    shown = [tool for tool in choice.tools or [] if tool["function"]["name"] not in deferred]
    if choice.choice == options.NONE:
        shown = []
    prompt, inside = await service.render(told, shown or None, thinking_option(fields).enabled, check=check)
    return prompt, inside, choice


def thinking_option(fields: CountFields) -> options.ThinkingOption:
    given = fields.thinking or {}
    kind, budget = given.get("type"), given.get("budget_tokens")
    effort = (fields.output_config or {}).get("effort")
    tokens = options.EFFORTS.get(effort) if isinstance(effort, str) else None
    if kind in (None, "adaptive"):  # the model decides, or its template
        return options.ThinkingOption(None, tokens)
    if kind == "disabled":
        return options.ThinkingOption(False)
    if kind == "enabled" and isinstance(budget, int) and budget > 0:
        return options.ThinkingOption(True, budget)
    raise RequestError(
        "must be 'disabled', 'adaptive', or 'enabled' with budget_tokens of at least 1", parameter="thinking.type"
    )


def tool_option(fields: CountFields) -> tuple[options.ToolOption, dict[str, dict[str, Any]]]:
    """(the tools, those of them that the prompt does not show before a tool has found them)."""
    tools, deferred = [], {}
    for i, tool in enumerate(fields.tools or []):
        name, kind = tool.get("name"), tool.get("type")
        if kind not in (None, "custom"):
            raise RequestError(
                f"of type {kind!r}: this server runs no tools itself, only custom tools can be called",
                parameter=f"tools.{i}",
            )
        if not isinstance(name, str) or not name:
            raise RequestError("must be a name", parameter=f"tools.{i}.name")
        description = tool.get("description")
        made = history.tool(name, description if isinstance(description, str) else None, tool.get("input_schema"))
        tools.append(made)
        if tool.get("defer_loading") is True:
            deferred[name] = made
    given = fields.tool_choice or {"type": options.AUTO}
    kind = given.get("type")
    if kind == "tool" and isinstance(given.get("name"), str):
        choice = given["name"]
    elif kind in ("auto", "any", "none"):
        choice = {"auto": options.AUTO, "any": options.REQUIRED, "none": options.NONE}[kind]
    else:
        raise RequestError("must be auto, any, none, or tool with a name", parameter="tool_choice.type")
    option = options.ToolOption(tools or None, choice, given.get("disable_parallel_tool_use") is not True)
    options.check_tools(option)
    return option, deferred


def to_messages(fields: CountFields, deferred: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """As the template takes them."""
    if not fields.messages:
        raise RequestError("at least one message is required", parameter="messages")
    told: list[dict[str, Any]] = []
    blocks = [fields.system] if isinstance(fields.system, str) else fields.system or []
    for i, block in enumerate(blocks):
        told.append({"role": "system", "content": history.text_of([block], f"system.{i}")})
    for i, message in enumerate(fields.messages):
        role, content, where = message.get("role"), message.get("content"), f"messages.{i}"
        if role not in ROLES:
            raise RequestError(f"{role!r} must be one of {', '.join(ROLES)}", parameter=f"{where}.role")
        if role == "assistant":
            told.append(_assistant(content, f"{where}.content"))
        elif role == "system":
            told.append({"role": role, "content": history.text_of(content, f"{where}.content")})
        else:
            told += _user(content, f"{where}.content", deferred)
    return history.for_template(told)


def _assistant(content: Any, where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts, thinking, calls = [], [], []
    for i, block in enumerate(content if isinstance(content, list) else [{"type": "text", "text": content}]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thinking.append(str(block.get("thinking", "")))
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            calls.append(history.call(block["name"], block.get("input") or {}))
        elif kind != "redacted_thinking":
            texts.append(history.text_of([block], f"{where}.{i}"))
    message["content"] = "\n".join(texts)
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(content: Any, where: str, deferred: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own for the template."""
    if not isinstance(content, list):
        return [{"role": "user", "content": history.text_of(content, where)}]
    told: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(content):
        if isinstance(block, dict) and block.get("type") == "tool_result":
            told.append({"role": "tool", "content": _result(block, f"{where}.{i}.content", deferred)})
        else:
            texts.append(history.text_of([block], f"{where}.{i}"))
    if texts or not told:
        told.append({"role": "user", "content": "\n".join(texts)})
    return told


def _result(block: dict[str, Any], where: str, deferred: dict[str, dict[str, Any]]) -> str:
    content = block.get("content")
    if not isinstance(content, list):
        text = history.text_of(content, where)
    else:
        parts = []
        for i, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") == "tool_reference":
                # A tool that was found: here it is shown, so that the head of the prompt stays as it was.
                found = deferred.get(str(part.get("tool_name")))
                parts.append(json.dumps(found, ensure_ascii=False) if found else f"no tool {part.get('tool_name')!r}")
            else:
                parts.append(history.text_of([part], f"{where}.{i}"))
        text = "\n".join(parts)
    return f"Error: {text}" if block.get("is_error") is True else text


def output_grammar(service: Service, fields: CountFields) -> Compiled | None:
    form = fields.output_format or (fields.output_config or {}).get("format")
    if not form:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise RequestError("type must be 'json_schema'", parameter="output_format")
    try:
        return service.grammars.json_schema(form.get("schema", {}))
    except OnekernelError as error:
        raise RequestError(str(error), parameter="output_format.schema") from None


async def _stream(events: MessageEvents, answer: Answer) -> AsyncGenerator[bytes, None]:
    def encoded(one: dict[str, Any]) -> bytes:
        return event(one["type"], one)

    begun = False
    batches = answer.batches()
    try:
        async for batch in batches:
            made = b""
            if not begun:
                begun = True
                made = encoded(events.begin(answer)) + encoded(PING)
            elif batch.heartbeat:
                made = encoded(PING)
            if made := made + b"".join(encoded(one) for one in events.add(batch)):
                yield made
        yield b"".join(encoded(one) for one in events.end(answer))
    except OnekernelError as error:
        yield event("error", anthropic_body(as_request_error(error)))
    finally:
        await batches.aclose()


async def _whole(events: MessageEvents, answer: Answer) -> dict[str, Any]:
    async for batch in answer.batches():
        for _ in events.add(batch):
            pass
    for _ in events.end(answer):
        pass
    return events.message
