"""A small server of the three APIs, written for the tests of the probe: right as it is, or with one fault planted.

It knows no model: it counts, or calls the tool that it must call. `FAULTS` names what can be planted, and what the
probe must say of it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "small"
CONTEXT = 2000  # "tokens", which are words here
Named = tuple[str | None, Any]  # an event: (its name, its data; a string goes out as it is)

# fault -> a part of the sentence that must name it
FAULTS = {
    "chat: no [DONE]": "the stream does not end with [DONE]",
    "chat: usage missing": "usage is missing, though stream_options.include_usage asked for it",
    "chat: usage chunk with choices": "the chunk with the usage has choices that are not []",
    "chat: usage wrong": "usage does not add up",
    "chat: no finish_reason": "finish_reason is never given",
    "chat: finish_reason before the end": "deltas come after the finish_reason",
    "chat: no role": "the first delta does not give the role 'assistant'",
    "chat: ids differ": "the id differs from chunk to chunk",
    "chat: not JSON": "an event is not a JSON object",
    "chat: half an event": "the connection broke within the stream",
    "chat: max_tokens ignored": "were made, though max_tokens was 3",
    "chat: max_tokens refused": "max_tokens beyond the context is refused",
    "chat: stop ignored": "the stream holds the stop string",
    "chat: arguments not JSON": "tool arguments are not JSON",
    "chat: arguments an object": "tool arguments are {'city': 'Oslo', 'days': 2}, not a string of JSON",
    "chat: arguments of another schema": "tool arguments do not fit the schema",
    "chat: no index": "a piece of a tool call has no index",
    "chat: no tool call": "tool_choice 'required' brought no tool call",
    "chat: finish_reason of a call": "finish_reason is 'stop' with a tool call, not 'tool_calls'",
    "chat: developer refused": "the role 'developer' is refused: status 400",
    "chat: buffered": "the stream is buffered",
    "responses: order": "response.output_text.delta comes before response.content_part.added",
    "responses: no completed": "the stream does not end with response.completed",
    "responses: numbers": "sequence_number does not count the events from 0",
    "responses: item lost": "response.output_item.done never comes",
    "responses: text lost": "response.output_text.done does not hold what the deltas brought",
    "responses: names": "holds the type",
    "responses: usage details": "usage has no input_tokens_details.cached_tokens",
    "responses: list refused": "a result as a list is refused",
    "responses: no warm-up": "an empty input (a warm-up) is refused: status 500",
    "messages: order": "content_block_delta comes before content_block_start",
    "messages: no stop of a block": "content_block_stop is missing",
    "messages: no message_stop": "not message_stop",
    "messages: usage missing": "usage is missing in message_delta",
    "messages: arguments not JSON": "tool arguments are not JSON",
    "messages: stop_reason": "stop_reason is 'end_turn' with a tool call, not 'tool_use'",
    "messages: count": "count_tokens counts",
    "errors: 500": "chat: a body that is not JSON is answered by 500 instead of 400",
    "errors: 422": "is answered by 422 instead of 400",
    "errors: form": "the error has not the form",
    "errors: overflow": "responses: a prompt beyond the context is answered by 200 instead of 400",
    "errors: overflow code": "the code of the error is None, not 'context_length_exceeded'",
    "errors: path": "an unknown path is answered by 200 instead of 404",
    "keys: 403": "chat: a wrong key is answered by 403 instead of 401",
    "does not stop": "after the client of a stream has left",
    "does not stop, whole": "after the client of an answer that is not streamed has left",
    "does not stop, no metrics": "the server still generates after its clients have left",
    "models: empty id": "a model has no id",
    "health: 500": "GET /health answers 500",
}


class Wrong(Exception):
    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class SmallServer:
    def __init__(self, fault: str | None = None, key: str | None = None) -> None:
        assert fault is None or fault in FAULTS
        self.fault = fault
        self.key = key
        self.count = 0
        self.running = 0
        self.made = 0
        self.engine = asyncio.Lock()

    def has(self, fault: str) -> bool:
        assert fault in FAULTS
        return self.fault == fault

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/responses", self.guarded(self.responses), methods=["POST"]),
            Route("/v1/messages", self.guarded(self.messages), methods=["POST"]),
            Route("/v1/messages/count_tokens", self.guarded(self.count_tokens), methods=["POST"]),
        ]
        if self.has("errors: path"):
            routes.append(Route("/{path:path}", lambda request: PlainTextResponse("welcome")))
        return Starlette(routes=routes)

    # ---- what all APIs share

    def guarded(self, handler: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self.key is not None and given != self.key:
                    raise Wrong("wrong key", 403 if self.has("keys: 403") else 401)
                try:
                    body = json.loads(await request.body())
                except ValueError:
                    raise Wrong("not JSON", 500 if self.has("errors: 500") else 400) from None
                if not isinstance(body, dict):
                    raise Wrong("not an object")
                if not isinstance(body.get("temperature", 0), int | float):
                    raise Wrong("temperature must be a number", 422 if self.has("errors: 422") else 400)
                response: Response = await handler(body)
                return response
            except Wrong as error:
                return self.failed(request.url.path, error)

        return answer

    def failed(self, path: str, error: Wrong) -> Response:
        if self.has("errors: form"):
            return JSONResponse({"detail": str(error)}, error.status)
        inner = {"message": str(error), "type": "invalid_request_error"}
        if path.startswith("/v1/messages"):
            return JSONResponse({"type": "error", "error": inner}, error.status)
        return JSONResponse({"error": {**inner, "param": None, "code": error.code}}, error.status)

    def read(self, body: dict[str, Any], field: str, most: int) -> tuple[int, list[str]]:
        """(words of the prompt, the words of the answer)."""
        given = body.get(field)
        if not isinstance(given, list) and not (field == "input" and isinstance(given, str)):
            raise Wrong(f"{field} is missing or of the wrong type")
        prompt = len(json.dumps(given).split()) + 1
        if prompt >= CONTEXT and not (self.has("errors: overflow") and field == "input"):
            code = None if self.has("errors: overflow code") else "context_length_exceeded"
            raise Wrong(f"prompt is too long: {prompt} tokens > {CONTEXT} maximum", code=code)
        most = 48 if self.has("chat: max_tokens ignored") else most
        words = [f"{number} " for number in range(1, 1 + min(most, CONTEXT))]
        return prompt, words

    async def generate(self, words: list[str]) -> AsyncIterator[str]:
        """Words at the pace of a small model, one request at a time when there are no metrics."""
        self.running += 1
        try:
            for word in words:
                self.made += 1
                await asyncio.sleep(0.002)
                yield word
        finally:
            self.running -= 1

    def stream(self, events: AsyncIterator[Named]) -> Response:
        if self.has("does not stop") or self.has("does not stop, no metrics"):
            events = self.unstoppable(events)

        async def lines() -> AsyncIterator[str]:
            async for name, data in events:
                text = data if isinstance(data, str) else json.dumps(data)
                yield (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
                if self.has("chat: half an event") and name is None and self.made:
                    raise RuntimeError("planted")

        return StreamingResponse(lines(), media_type="text/event-stream")

    def unstoppable(self, events: AsyncIterator[Named]) -> AsyncIterator[Named]:
        queue: asyncio.Queue[Named | None] = asyncio.Queue()

        async def work() -> None:
            async with self.engine:
                async for event in events:
                    queue.put_nowait(event)
            queue.put_nowait(None)

        async def read() -> AsyncIterator[Named]:
            while (event := await queue.get()) is not None:
                yield event

        self.task = asyncio.ensure_future(work())
        return read()

    def id(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    # ---- the rest

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}, 500 if self.has("health: 500") else 200)

    async def metrics(self, request: Request) -> Response:
        if self.has("does not stop, no metrics"):
            return PlainTextResponse("none", 404)
        return PlainTextResponse(f"small_requests_running {self.running}\nsmall_generation_tokens_total {self.made}\n")

    async def models(self, request: Request) -> Response:
        entry = {"id": MODEL, "object": "model", "created": 1, "owned_by": "tests", "max_model_len": CONTEXT}
        more = [{"id": "", "object": "model"}] if self.has("models: empty id") else []
        return JSONResponse({"object": "list", "data": [entry, *more]})

    # ---- chat completions

    async def chat(self, body: dict[str, Any]) -> Response:
        most = body.get("max_tokens", 48)
        if self.has("chat: max_tokens refused") and most > CONTEXT:
            raise Wrong("max_tokens is too large")
        prompt, words = self.read(body, "messages", most)
        if self.has("chat: developer refused") and body["messages"][0]["role"] == "developer":
            raise Wrong("unknown role")
        head = {"id": self.id("chat"), "created": 1, "model": MODEL}
        called = body.get("tool_choice") == "required" and not self.has("chat: no tool call")
        stop = body.get("stop")
        if stop and not (self.has("chat: stop ignored") and body.get("stream")):
            text = "".join(words)
            words = [text.split(stop if isinstance(stop, str) else stop[0])[0]]
        usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
        if self.has("chat: usage wrong"):
            usage["total_tokens"] += 1
        if body.get("stream"):
            return self.stream(self.chat_events(head, words, usage, called, body))
        message: dict[str, Any] = {"role": "assistant", "content": "".join(words)}
        reason = "length" if len(words) == most else "stop"
        if called:
            message = {"role": "assistant", "content": None, "tool_calls": [self.chat_call()]}
            reason = "stop" if self.has("chat: finish_reason of a call") else "tool_calls"
        if self.has("does not stop, whole"):
            async for _ in self.generate(words):
                pass
        async with self.engine:
            choice = {"index": 0, "message": message, "finish_reason": reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def chat_call(self) -> dict[str, Any]:
        arguments: Any = '{"city": "Oslo", "days": 2}'
        if self.has("chat: arguments not JSON"):
            arguments = '{"city": "Oslo", "days": 2</parameter>'
        elif self.has("chat: arguments an object"):
            arguments = {"city": "Oslo", "days": 2}
        elif self.has("chat: arguments of another schema"):
            arguments = '{"city": "Oslo", "days": "2"}'
        return {"id": self.id("call"), "type": "function", "function": {"name": "get_weather", "arguments": arguments}}

    async def chat_events(
        self, head: dict[str, Any], words: list[str], usage: dict[str, int], called: bool, body: dict[str, Any]
    ) -> AsyncIterator[Named]:
        def chunk(delta: dict[str, Any], reason: str | None = None) -> Named:
            own = {**head, "id": self.id("chat")} if self.has("chat: ids differ") else head
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return None, {**own, "object": "chat.completion.chunk", "choices": [choice]}

        yield chunk({} if self.has("chat: no role") else {"role": "assistant", "content": ""})
        held = []
        if called:
            call = {"index": 0, **self.chat_call()}
            if self.has("chat: no index"):
                del call["index"]
            yield chunk({"tool_calls": [call]})
        else:
            async for word in self.generate(words):
                if self.has("chat: finish_reason before the end") and word == words[-1]:
                    yield chunk({}, "stop")
                if self.has("chat: buffered"):
                    held.append(chunk({"content": word}))
                    await asyncio.sleep(0.01)
                else:
                    yield chunk({"content": word})
        for event in held:
            yield event
        if self.has("chat: not JSON"):
            yield None, "{'id': 1}"
        if not self.has("chat: no finish_reason") and not self.has("chat: finish_reason before the end"):
            yield chunk({}, "tool_calls" if called else "stop")
        if (body.get("stream_options") or {}).get("include_usage") and not self.has("chat: usage missing"):
            choices = chunk({})[1]["choices"] if self.has("chat: usage chunk with choices") else []
            yield None, {**head, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
        if not self.has("chat: no [DONE]"):
            yield None, "[DONE]"

    # ---- responses

    async def responses(self, body: dict[str, Any]) -> Response:
        if self.has("responses: no warm-up") and body.get("input") == "":
            raise Wrong("no input", 500)
        prompt, words = self.read(body, "input", body.get("max_output_tokens", 48))
        results = [item for item in body["input"] if isinstance(item, dict) and "output" in item]
        if self.has("responses: list refused") and any(isinstance(item["output"], list) for item in results):
            raise Wrong("output must be a string")
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {} if self.has("responses: usage details") else {"cached_tokens": 0},
            "output_tokens": len(words),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + len(words),
        }
        if body.get("tool_choice") == "required":
            call = self.chat_call()
            names = {"name": "get_weather", "arguments": call["function"]["arguments"]}
            item = {"type": "function_call", "id": self.id("fc"), "call_id": call["id"], "status": "completed", **names}
        else:
            part = {"type": "output_text", "text": "".join(words), "annotations": [], "logprobs": []}
            item = {"type": "message", "id": self.id("msg"), "role": "assistant", "status": "completed"}
            item["content"] = [part]
        response = {"id": self.id("resp"), "object": "response", "created_at": 1, "model": MODEL, "status": "completed"}
        response |= {"output": [item], "usage": usage}
        if body.get("stream"):
            return self.stream(self.numbered(self.response_events(response, item, words)))
        return JSONResponse(response)

    async def numbered(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[Named]:
        number = 0
        async for event in events:
            kind = event["type"]
            name = "message" if self.has("responses: names") else kind
            yield name, {**event, "sequence_number": number}
            number += 2 if self.has("responses: numbers") else 1

    async def response_events(
        self, response: dict[str, Any], item: dict[str, Any], words: list[str]
    ) -> AsyncIterator[dict[str, Any]]:
        begun = {**response, "status": "in_progress", "output": [], "usage": None}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}}
        place = {"output_index": 0, "item_id": item["id"]}
        if item["type"] == "function_call":
            yield {"type": "response.function_call_arguments.delta", "delta": item["arguments"], **place}
            yield {"type": "response.function_call_arguments.done", "arguments": item["arguments"], **place}
        else:
            place["content_index"] = 0
            part = item["content"][0]
            added = {"type": "response.content_part.added", "part": {**part, "text": ""}, **place}
            if self.has("responses: order"):
                yield {"type": "response.output_text.delta", "delta": "", **place}
            yield added
            async for word in self.generate(words):
                if not (self.has("responses: text lost") and word == words[1]):
                    yield {"type": "response.output_text.delta", "delta": word, "logprobs": [], **place}
            yield {"type": "response.output_text.done", "text": part["text"], "logprobs": [], **place}
            yield {"type": "response.content_part.done", "part": part, **place}
        if not self.has("responses: item lost"):
            yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        if not self.has("responses: no completed"):
            yield {"type": "response.completed", "response": response}

    # ---- messages

    async def count_tokens(self, body: dict[str, Any]) -> Response:
        prompt, _ = self.read(body, "messages", 1)
        return JSONResponse({"input_tokens": prompt + self.has("messages: count")})

    async def messages(self, body: dict[str, Any]) -> Response:
        prompt, words = self.read(body, "messages", body.get("max_tokens", 48))
        called = (body.get("tool_choice") or {}).get("type") == "any"
        block: dict[str, Any] = {"type": "text", "text": "".join(words)}
        reason = "max_tokens"
        if called:
            arguments = {"city": "Oslo", "days": 2}
            block = {"type": "tool_use", "id": self.id("toolu"), "name": "get_weather", "input": arguments}
            reason = "end_turn" if self.has("messages: stop_reason") else "tool_use"
        usage = {"input_tokens": prompt, "output_tokens": len(words)}
        message = {"id": self.id("msg"), "type": "message", "role": "assistant", "model": MODEL, "content": [block]}
        message |= {"stop_reason": reason, "stop_sequence": None, "usage": usage}
        if body.get("stream"):
            return self.stream(self.message_events(message, block, words))
        return JSONResponse(message)

    async def message_events(
        self, message: dict[str, Any], block: dict[str, Any], words: list[str]
    ) -> AsyncIterator[Named]:
        begun = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
        yield "message_start", {"type": "message_start", "message": begun}
        yield "ping", {"type": "ping"}
        empty = {**block, "input": {}} if block["type"] == "tool_use" else {**block, "text": ""}
        start = "content_block_start", {"type": "content_block_start", "index": 0, "content_block": empty}

        def delta(**fields: Any) -> Named:
            return "content_block_delta", {"type": "content_block_delta", "index": 0, "delta": fields}

        if self.has("messages: order"):
            yield delta(type="text_delta", text="")
        yield start
        if block["type"] == "tool_use":
            text = json.dumps(block["input"])
            yield delta(type="input_json_delta", partial_json=text[:5])
            cut = text[5:-1] if self.has("messages: arguments not JSON") else text[5:]
            yield delta(type="input_json_delta", partial_json=cut)
        else:
            async for word in self.generate(words):
                yield delta(type="text_delta", text=word)
        if not self.has("messages: no stop of a block"):
            yield "content_block_stop", {"type": "content_block_stop", "index": 0}
        usage = {} if self.has("messages: usage missing") else {"usage": {"output_tokens": len(words)}}
        ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        yield "message_delta", {"type": "message_delta", "delta": ended, **usage}
        if not self.has("messages: no message_stop"):
            yield "message_stop", {"type": "message_stop"}


@contextmanager
def running(fault: str | None = None, key: str | None = None) -> Iterator[str]:
    """Its address, while it runs in a thread."""
    config = uvicorn.Config(SmallServer(fault, key).app(), port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(20)
