"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, in the words of llama.cpp and vLLM."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.server import body, chat_completions
from onekernel.server.body import Fields
from onekernel.server.errors import RequestError
from onekernel.server.logprobs import token_bytes
from onekernel.server.service import Service


class TokenizeFields(Fields):
    """One of content (or prompt, which is the same) and messages (a conversation, through the chat template)."""

    content: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None  # this tokenizer adds none


class DetokenizeFields(Fields):
    tokens: list[int]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, _ = await body.read(request, TokenizeFields)
    given = [name for name in ("content", "prompt", "messages") if getattr(fields, name) is not None]
    if len(given) != 1:
        raise RequestError("give one of content, prompt and messages", parameter="content")
    if fields.messages is not None:
        like_chat = chat_completions.ChatFields(messages=fields.messages, tools=fields.tools)
        tools = chat_completions.tool_option(like_chat).tools
        tokens, _ = await service.render(chat_completions.to_messages(fields.messages), tools, None, check=False)
    else:
        text = fields.content if fields.content is not None else fields.prompt or ""
        tokens = await service.encode(text, parse_special=fields.parse_special is not False)
    answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_context}
    if fields.return_token_strs:
        tokenizer = service.model.tokenizer
        answer["token_strs"] = [token_bytes(tokenizer, token).decode("utf-8", "replace") for token in tokens]
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, _ = await body.read(request, DetokenizeFields)
    text = service.model.tokenizer.decode(fields.tokens, skip_special=False)
    return JSONResponse({"content": text, "prompt": text})
