"""POST /v1/chat/completions: OpenAI's chat completions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.errors import OnekernelError
from onekernel.server import body, history, options
from onekernel.server.body import Fields
from onekernel.server.chat_reply import Reply
from onekernel.server.errors import RequestError
from onekernel.server.service import Ask, Service
from onekernel.server.streaming import EventStream, while_there
from onekernel.text.grammar import Compiled

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class StreamOptions(Fields):
    include_usage: bool | None = None


class ChatFields(Fields):
    """The body of a request. Those that other servers of open models have too: top_k, min_p, repetition_penalty,
    ignore_eos, priority, chat_template_kwargs.enable_thinking, thinking_token_budget and structured_outputs."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, and without effect on one local model.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    # Known, and not to be had here: an error if they ask for anything.
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, headers = await body.read(request, ChatFields)
    answers = service.answers(await to_asks(service, fields))
    with_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    reply = Reply(service, answers, logprobs=bool(fields.logprobs), include_usage=with_usage)
    if fields.stream:
        return EventStream(reply.stream(), answers, headers)
    return JSONResponse(await while_there(request, answers, reply.whole()), headers=headers)


async def to_asks(service: Service, fields: ChatFields) -> list[Ask]:
    """One for each choice. Raises RequestError and InvalidRequest."""
    check_supported(fields)
    count = 1 if fields.n is None else fields.n
    if not 1 <= count <= service.settings.most_choices:
        raise RequestError(f"n = {count} must be between 1 and {service.settings.most_choices}", parameter="n")
    tools = tool_option(fields)
    thinking = thinking_option(fields)
    grammar = await asyncio.to_thread(output_grammar, service, fields) if wants_grammar(fields) else None
    if grammar is not None and tools.choice not in (options.AUTO, options.NONE):
        raise RequestError("response_format and tool_choice cannot both decide the answer", parameter="tool_choice")
    shown = tools.tools if tools.choice != options.NONE else None
    sampling = options.sampling(
        service,
        {
            **options.openai_sampling(service, fields),
            "logprobs": (fields.top_logprobs or 0) if fields.logprobs else None,
        },
        {"logprobs": "top_logprobs"},
    )
    limit = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    name = "max_completion_tokens" if fields.max_completion_tokens is not None else "max_tokens"
    prompt, inside = await service.render(to_messages(fields.messages), shown, thinking.enabled)
    ask = Ask(
        prompt=prompt,
        sampling=sampling,
        max_tokens=options.most_tokens(limit, name),
        stop=options.stops(fields.stop),
        thinking=inside,
        thinking_tokens=thinking.tokens,
        tools=shown or None,
        several_calls=tools.several,
        grammar=grammar or await options.tool_grammar(service, tools),
        ignore_eos=bool(fields.ignore_eos),
        priority=fields.priority or 0,
    )
    if count == 1:
        return [ask]
    return [replace(ask, sampling=replace(sampling, seed=seed)) for seed in options.seeds(fields.seed, count)]


def check_supported(fields: ChatFields) -> None:
    for name in ("audio", "prediction", "web_search_options"):
        if getattr(fields, name):
            raise body.unsupported(name, "this model reads and writes text only, and has no other sources")
    for name in ("functions", "function_call"):
        if getattr(fields, name):
            raise body.unsupported(name, "use tools and tool_choice instead")
    if fields.modalities and fields.modalities != ["text"]:
        raise body.unsupported("modalities", "this model writes text only")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", parameter="top_logprobs")


def to_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the template takes them."""
    if not messages:
        raise RequestError("messages is empty: give at least one", parameter="messages")
    result = []
    for i, message in enumerate(messages):
        role, where = message.get("role"), f"messages[{i}]"
        if role not in ROLES:
            raise RequestError(f"{where}.role = {role!r} must be one of {', '.join(ROLES)}", parameter=f"{where}.role")
        told: dict[str, Any] = {
            "role": "tool" if role == "function" else role,
            "content": history.text_of(message.get("content"), f"{where}.content"),
        }
        if role == "assistant":
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            if isinstance(reasoning, str):
                told["reasoning_content"] = reasoning
            if message.get("tool_calls"):
                told["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
        result.append(told)
    return history.for_template(result)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list", parameter=where)
    result = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(call.get("custom"), dict):
            function = {"name": call["custom"].get("name"), "arguments": {"input": call["custom"].get("input", "")}}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] needs function.name and function.arguments", parameter=f"{where}[{i}]")
        result.append(history.call(function["name"], function.get("arguments") or {}))
    return result


def tool_option(fields: ChatFields) -> options.ToolOption:
    tools = []
    for i, tool in enumerate(fields.tools or []):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise RequestError(
                f"tools[{i}] is of type {tool.get('type')!r}: only functions can be called", parameter=f"tools[{i}]"
            )
        name, description = function.get("name"), function.get("description")
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{i}].function.name must be a name", parameter=f"tools[{i}].function.name")
        described = description if isinstance(description, str) else None
        tools.append(history.tool(name, described, function.get("parameters")))
    choice = fields.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") == "allowed_tools":
            raise RequestError("tool_choice of type 'allowed_tools' is not supported", parameter="tool_choice")
        if not isinstance(name, str):
            raise RequestError("tool_choice needs function.name", parameter="tool_choice")
        choice = name
    elif choice not in (None, options.AUTO, options.NONE, options.REQUIRED):
        raise RequestError(
            f"tool_choice = {choice!r} must be 'auto', 'none', 'required' or name a function", parameter="tool_choice"
        )
    several = fields.parallel_tool_calls is not False
    option = options.ToolOption(tools or None, choice or options.AUTO, several)
    options.check_tools(option)
    return option


def thinking_option(fields: ChatFields) -> options.ThinkingOption:
    option = options.effort(fields.reasoning_effort, "reasoning_effort")
    enabled = (fields.chat_template_kwargs or {}).get("enable_thinking")
    if isinstance(enabled, bool):
        option = replace(option, enabled=enabled)
    budget = fields.thinking_token_budget
    if budget is not None:
        if budget < 0:
            raise RequestError("thinking_token_budget must not be negative", parameter="thinking_token_budget")
        option = options.ThinkingOption(option.enabled if budget else False, budget)
    return option


def wants_grammar(fields: ChatFields) -> bool:
    return bool(fields.response_format or fields.structured_outputs)


def output_grammar(service: Service, fields: ChatFields) -> Compiled | None:
    form, other = fields.response_format, fields.structured_outputs
    if form and other:
        raise RequestError("response_format and structured_outputs exclude each other", parameter="response_format")
    try:
        if form:
            return _response_format(service, form)
        return _structured(service, other) if other else None
    except RequestError:
        raise
    except OnekernelError as error:
        raise RequestError(str(error), parameter="response_format" if form else "structured_outputs") from None


def _response_format(service: Service, form: dict[str, Any]) -> Compiled | None:
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return service.grammars.json_object()
    if kind == "json_schema" and isinstance(form.get("json_schema"), dict):
        return service.grammars.json_schema(form["json_schema"].get("schema", {}))
    raise RequestError(
        "response_format.type must be 'text', 'json_object' or 'json_schema' (with json_schema.schema)",
        parameter="response_format",
    )


def _structured(service: Service, given: dict[str, Any]) -> Compiled:
    grammars = service.grammars
    match given:
        case {"json": dict() as schema}:
            return grammars.json_schema(schema)
        case {"json_object": True}:
            return grammars.json_object()
        case {"regex": str() as pattern}:
            return grammars.regex(pattern)
        case {"grammar": str() as grammar}:
            return grammars.lark(grammar)
        case {"choice": [*choices]} if choices and all(isinstance(choice, str) and choice for choice in choices):
            return grammars.choice([str(choice) for choice in choices])
    raise RequestError(
        "structured_outputs needs one of json (a schema), json_object: true, regex, grammar (Lark) or choice",
        parameter="structured_outputs",
    )
