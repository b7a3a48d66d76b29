"""POST /v1/completions: OpenAI's completions of plain text, without a chat template."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.errors import OnekernelError
from onekernel.sampling.params import SampledToken
from onekernel.server import body, chat_completions, options
from onekernel.server.body import Fields
from onekernel.server.chat_completions import StreamOptions
from onekernel.server.chat_reply import HEARTBEAT
from onekernel.server.errors import RequestError, as_request_error, openai_body
from onekernel.server.logprobs import finite, token_bytes
from onekernel.server.merge import merged
from onekernel.server.service import Answer, Ask, Batch, Service
from onekernel.server.streaming import EventStream, data, while_there
from onekernel.text.tool_calls import Text

DEFAULT_MAX_TOKENS = 16  # as OpenAI has it
FINISH = {"stop": "stop", "stop_string": "stop", "length": "length"}
MOST_LOGPROBS = 5


class CompletionFields(Fields):
    """The body of a request. A prompt is a text or token ids, or a list of either."""

    prompt: str | list[Any]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
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
    logprobs: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    structured_outputs: dict[str, Any] | None = None
    # Known, and without effect on one local model.
    user: str | None = None
    # Known, and not to be had here: an error if it asks for anything.
    suffix: str | None = None


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    fields, headers = await body.read(request, CompletionFields)
    asks, texts = await to_asks(service, fields)
    answers = service.answers(asks)
    reply = Reply(service, fields, answers, texts)
    if fields.stream:
        return EventStream(reply.stream(), answers, headers)
    return JSONResponse(await while_there(request, answers, reply.whole()), headers=headers)


async def to_asks(service: Service, fields: CompletionFields) -> tuple[list[Ask], list[str]]:
    """One for each choice, and the texts of their prompts. Raises RequestError and InvalidRequest."""
    if fields.suffix:
        raise body.unsupported("suffix", "the model continues text, it does not fill gaps")
    count = 1 if fields.n is None else fields.n
    if fields.best_of not in (None, count):
        raise body.unsupported("best_of", "ask for n choices and take the best")
    if fields.logprobs is not None and not 0 <= fields.logprobs <= MOST_LOGPROBS:
        raise RequestError(f"logprobs = {fields.logprobs} must be between 0 and {MOST_LOGPROBS}", parameter="logprobs")
    if fields.echo and fields.logprobs is not None:
        raise body.unsupported("echo", "log-probabilities of the prompt are not computed")
    prompts = await _prompts(service, fields.prompt)
    most = service.settings.most_choices
    if count < 1 or count * len(prompts) > most:
        raise RequestError(f"n = {count} for {len(prompts)} prompts: 1 to {most} choices in all", parameter="n")
    grammar = None
    if fields.structured_outputs:
        like_chat = chat_completions.ChatFields(messages=[], structured_outputs=fields.structured_outputs)
        grammar = await asyncio.to_thread(chat_completions.output_grammar, service, like_chat)
    sampling = options.sampling(service, {**options.openai_sampling(service, fields), "logprobs": fields.logprobs})
    limit = options.most_tokens(fields.max_tokens, "max_tokens")
    seeds = options.seeds(fields.seed, count) if count > 1 else [sampling.seed]
    asks, texts = [], []
    for prompt in prompts:
        service.check_fits(prompt)
        for seed in seeds:
            asks.append(
                Ask(
                    prompt=prompt,
                    sampling=replace(sampling, seed=seed),
                    max_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
                    stop=options.stops(fields.stop),
                    grammar=grammar,
                    ignore_eos=bool(fields.ignore_eos),
                    priority=fields.priority or 0,
                )
            )
            texts.append(service.model.tokenizer.decode(prompt, skip_special=False) if fields.echo else "")
    return asks, texts


async def _prompts(service: Service, given: str | list[Any]) -> list[tuple[int, ...]]:
    several = given if isinstance(given, list) and not all(type(part) is int for part in given) else [given]
    prompts = []
    for part in several:
        if isinstance(part, str):
            prompts.append(await service.encode(part))
        elif isinstance(part, list) and all(type(token) is int for token in part):
            prompts.append(tuple(part))
        else:
            raise RequestError("prompt must be a text, token ids, or a list of either", parameter="prompt")
        if not prompts[-1]:
            raise RequestError("prompt is empty: the model needs at least one token", parameter="prompt")
    return prompts


class Reply:
    """What goes back to the client, whole or in chunks."""

    def __init__(self, service: Service, fields: CompletionFields, answers: list[Answer], texts: list[str]) -> None:
        self._service = service
        self._answers = answers
        self._offsets = [len(text) for text in texts]  # where the next token's text begins
        self._prompt_texts = texts
        self._with_logprobs = fields.logprobs is not None
        self._include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            for index, text in enumerate(self._prompt_texts):
                if text:
                    yield self._chunk(index, text)
            async for index, batch in merged(self._answers):
                if batch is None:
                    reason = FINISH.get(self._answers[index].finish_reason, "stop")
                    yield self._chunk(index, "", finish_reason=reason)
                elif batch.heartbeat:
                    yield HEARTBEAT
                elif (text := _text(batch)) or self._with_logprobs:
                    yield self._chunk(index, text, self._logprobs(index, batch.tokens))
            if self._include_usage:
                yield data({**self._head, "choices": [], "usage": usage(self._answers)})
            yield b"data: [DONE]\n\n"
        except OnekernelError as error:
            yield data(openai_body(as_request_error(error)))

    async def whole(self) -> dict[str, Any]:
        texts = [[text] for text in self._prompt_texts]
        tokens: list[list[SampledToken]] = [[] for _ in self._answers]
        async for index, batch in merged(self._answers):
            if batch is not None:
                texts[index].append(_text(batch))
                tokens[index] += batch.tokens
        choices = [
            {
                "index": i,
                "text": "".join(texts[i]),
                "logprobs": self._logprobs(i, tokens[i][: answer.completion_tokens]),
                "finish_reason": FINISH.get(answer.finish_reason, "stop"),
            }
            for i, answer in enumerate(self._answers)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._answers)}

    def _chunk(self, index: int, text: str, logprobs: Any = None, finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return data({**self._head, "choices": [choice]})

    def _logprobs(self, index: int, tokens: list[SampledToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = self._name(token.id)
            made["tokens"].append(text)
            made["token_logprobs"].append(finite(token.logprob))
            made["top_logprobs"].append({self._name(other): finite(logprob) for other, logprob in token.top_logprobs})
            made["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return made

    def _name(self, token: int) -> str:
        return token_bytes(self._service.model.tokenizer, token).decode("utf-8", "replace")


def _text(batch: Batch) -> str:
    return "".join(event.text for event in batch.events if isinstance(event, Text))


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Choices of one prompt share it, so it counts once."""
    prompts = {answer.ask.prompt: answer for answer in answers}.values()
    prompt = sum(answer.prompt_tokens for answer in prompts)
    completion = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in prompts)},
    }
