"""POST /v1/responses: OpenAI's Responses, as Codex uses them. Nothing is stored between requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.errors import OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.server import body, options, responses_input
from onekernel.server.body import Fields
from onekernel.server.errors import RequestError, as_request_error
from onekernel.server.logprobs import entries
from onekernel.server.responses_events import ResponseEvents
from onekernel.server.service import Answer, Ask, Service
from onekernel.server.streaming import EventStream, event, while_there
from onekernel.text.grammar import Compiled

LOGPROBS = "message.output_text.logprobs"  # in `include`


class Reasoning(Fields):
    effort: str | None = None
    summary: str | None = None


class ResponseFields(Fields):
    """The body of a request."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None
    # Known, and without effect on one local model that stores nothing.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    stream_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    # Known, and not to be had here: an error if they ask for anything.
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = None


async def responses(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, headers = await body.read(request, ResponseFields)
    tools = responses_input.Tools()
    ask = await to_ask(service, fields, tools)
    answers = service.answers([ask])
    events = ResponseEvents(echoed(service, fields), tools, _logprobs(service, fields))
    if fields.stream:
        return EventStream(_stream(events, answers[0]), answers, headers)
    return JSONResponse(await while_there(request, answers, _whole(events, answers[0])), headers=headers)


async def to_ask(service: Service, fields: ResponseFields, tools: responses_input.Tools) -> Ask:
    """Fills `tools`. Raises RequestError and InvalidRequest."""
    check_supported(fields)
    for i, tool in enumerate(fields.tools or []):
        tools.add(tool, f"tools[{i}]")
    messages = responses_input.to_messages(fields.input, fields.instructions, tools)
    choice = responses_input.tool_choice(fields.tool_choice, tools, fields.parallel_tool_calls is not False)
    grammar = await asyncio.to_thread(output_grammar, service, fields) if fields.text else None
    if grammar is not None and choice.choice not in (options.AUTO, options.NONE):
        raise RequestError("text.format and tool_choice cannot both decide the answer", parameter="tool_choice")
    thinking = options.effort(fields.reasoning.effort if fields.reasoning else None, "reasoning.effort")
    shown = choice.tools if choice.choice != options.NONE else None
    sampling = options.sampling(
        service,
        {
            "temperature": fields.temperature,
            "top_p": fields.top_p,
            "top_k": fields.top_k,
            "seed": fields.seed,
            "logprobs": (fields.top_logprobs or 0) if _wants_logprobs(fields) else None,
        },
        {"logprobs": "top_logprobs"},
    )
    prompt, inside = await service.render(messages, shown, thinking.enabled)
    return Ask(
        prompt=prompt,
        sampling=sampling,
        max_tokens=options.most_tokens(fields.max_output_tokens, "max_output_tokens"),
        thinking=inside,
        thinking_tokens=thinking.tokens,
        tools=shown,
        several_calls=choice.several,
        grammar=grammar or await options.tool_grammar(service, choice),
    )


def check_supported(fields: ResponseFields) -> None:
    for name in ("background", "previous_response_id", "conversation", "prompt"):
        if getattr(fields, name):
            raise body.unsupported(name, "this server stores nothing between requests: send the whole input")
    if fields.max_tool_calls is not None:
        raise body.unsupported("max_tool_calls", "it limits tools that the server runs, and there are none here")
    if fields.truncation not in (None, "auto", "disabled"):
        raise RequestError("truncation must be 'auto' or 'disabled'", parameter="truncation")


def output_grammar(service: Service, fields: ResponseFields) -> Compiled | None:
    form = (fields.text or {}).get("format")
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return None
    try:
        if kind == "json_object":
            return service.grammars.json_object()
        if kind == "json_schema":
            return service.grammars.json_schema(form.get("schema", {}))
    except OnekernelError as error:
        raise RequestError(str(error), parameter="text.format") from None
    raise RequestError("text.format.type must be 'text', 'json_object' or 'json_schema'", parameter="text.format")


def echoed(service: Service, fields: ResponseFields) -> dict[str, Any]:
    """The fields of the request that the response repeats."""
    effort = fields.reasoning.effort if fields.reasoning else None
    return {
        "model": service.settings.model_name,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": fields.temperature,
        "text": {"format": (fields.text or {}).get("format") or {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": fields.top_p,
        "truncation": "disabled",
    }


async def _stream(events: ResponseEvents, answer: Answer) -> AsyncGenerator[bytes, None]:
    def encoded(one: dict[str, Any]) -> bytes:
        return event(one["type"], one)

    batches = answer.batches()
    try:
        for one in events.begin():
            yield encoded(one)
        async for batch in batches:
            if batch.heartbeat:
                yield encoded(events.heartbeat())
            elif made := b"".join(encoded(one) for one in events.add(batch)):
                yield made
        yield b"".join(encoded(one) for one in events.end(answer))
    except OnekernelError as error:
        told = as_request_error(error)
        yield encoded(events.fail(told.code or "server_error", str(told)))
    finally:
        await batches.aclose()


async def _whole(events: ResponseEvents, answer: Answer) -> dict[str, Any]:
    async for batch in answer.batches():
        for _ in events.add(batch):
            pass
    for _ in events.end(answer):
        pass
    return events.response


def _wants_logprobs(fields: ResponseFields) -> bool:
    return fields.top_logprobs is not None or LOGPROBS in (fields.include or [])


def _logprobs(service: Service, fields: ResponseFields) -> Any:
    wanted = _wants_logprobs(fields)

    def made(tokens: list[SampledToken]) -> list[dict[str, Any]]:
        return entries(service.model.tokenizer, tokens) if wanted else []

    return made
