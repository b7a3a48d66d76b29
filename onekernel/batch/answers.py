"""Answers to the lines of a batch: the same parsing, scheduler and replies as for requests to the server."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

from onekernel.batch.lines import CHAT, Line
from onekernel.errors import BackendError, OnekernelError
from onekernel.scheduler import ShuttingDown
from onekernel.server import chat_completions, chat_reply, completions
from onekernel.server.body import Fields, convert
from onekernel.server.chat_completions import ChatFields
from onekernel.server.completions import CompletionFields
from onekernel.server.errors import RequestError, as_request_error, openai_body
from onekernel.server.service import Answer, Service

T = TypeVar("T", bound=Fields)


class Answers:
    """Any number of lines at a time, in one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._made = 0  # tokens of the lines that are done
        self._running: list[Answer] = []

    @property
    def completion_tokens(self) -> int:
        """Of all lines so far, those that are being answered included."""
        return self._made + sum(answer.completion_tokens for answer in self._running)

    async def result(self, line: Line) -> dict[str, Any]:
        """The fields of the line of the output. What is wrong with the line becomes an error in it.

        Raises:
            BackendError, ShuttingDown: nothing is wrong with the line, but nobody can answer it.
        """
        head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
        if line.problem is not None:
            message = f"line {line.number}: {line.problem}"
            return {**head, "response": None, "error": {"code": "invalid_line", "message": message}}
        try:
            status, body = 200, await self._answer(line)
        except (BackendError, ShuttingDown):
            raise
        except OnekernelError as error:
            told = as_request_error(error)
            status, body = told.status, openai_body(told)
        response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
        return {**head, "response": response, "error": None}

    async def _answer(self, line: Line) -> dict[str, Any]:
        """The body of the response. Raises OnekernelError."""
        reply: chat_reply.Reply | completions.Reply
        if line.url == CHAT:
            chat = _fields(line, ChatFields)
            answers = self._service.answers(await chat_completions.to_asks(self._service, chat))
            reply = chat_reply.Reply(self._service, answers, logprobs=bool(chat.logprobs), include_usage=False)
        else:
            fields = _fields(line, CompletionFields)
            asks, texts = await completions.to_asks(self._service, fields)
            answers = self._service.answers(asks)
            reply = completions.Reply(self._service, fields, answers, texts)
        self._running += answers
        try:
            return await reply.whole()
        finally:
            for answer in answers:
                answer.cancel()
                self._running.remove(answer)
                self._made += answer.completion_tokens


def ignored_fields(line: Line) -> list[str]:
    """Fields of the body that its API does not know: other fields of a data set, or a slip of the pen."""
    known = (ChatFields if line.url == CHAT else CompletionFields).__struct_encode_fields__
    return [name for name in line.body if name not in known]


def _fields(line: Line, kind: type[T]) -> T:
    if line.body.get("stream"):
        raise RequestError("stream: an answer in a file comes whole: leave it out", parameter="stream")
    return convert(line.body, kind)
