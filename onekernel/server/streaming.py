"""Server-sent events, and what happens to an answer when its reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from onekernel.server.service import Answer

T = TypeVar("T")
encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def data(value: object) -> bytes:
    """An event without a name."""
    return b"data: " + encode(value) + b"\n\n"


def event(name: str, value: object) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


class EventStream(Response):
    """Sends events as they are made. When the client leaves, the generator is closed and the answers end."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        answers: Sequence[Answer],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache, no-store",
                "x-accel-buffering": "no",
                **(headers or {}),
            }
        )
        self._events = events
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancelled_when_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            await self._events.aclose()
            for answer in self._answers:  # a generator that had not begun has not done it
                answer.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_there(request: Request, answers: Sequence[Answer], work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClientGone, and cancels it and the answers, when the client leaves."""
    try:
        return await cancelled_when_gone(request.receive, work)
    finally:
        for answer in answers:
            answer.cancel()


async def cancelled_when_gone(receive: Receive, work: Awaitable[T]) -> T:
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                await asyncio.wait((pending,))


async def _gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
