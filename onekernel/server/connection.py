"""One connection of a client: uvicorn's, with limits on the size and the time of what uvicorn would wait for."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from onekernel.server.settings import Settings

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1"


class Connection(HttpToolsProtocol):
    """Ends a connection whose request does not arrive, or whose answer is not read. Subclassed by `limited`."""

    settings: ClassVar[Settings]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._in_head = True
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.settings.most_connections:
            self._refuse(TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._head_timer)
        self._stop(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.settings.header_bytes:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop(self._head_timer)
        # A head that came in one piece with its body.
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.settings.header_bytes:
            self._refuse(TOO_LARGE)
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop(self._stall_timer)
        self._stall_timer = self.loop.call_later(self.settings.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self._stall_timer)
        super().resume_writing()

    def _wait_for_head(self) -> None:
        self._stop(self._head_timer)
        self._head_timer = self.loop.call_later(self.settings.header_s, self._refuse, TOO_SLOW)

    def _refuse(self, status: bytes) -> None:
        self._refused = True
        self._stop(self._head_timer)
        if not self.transport.is_closing():
            self.transport.write(status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def limited(settings: Settings) -> type[Connection]:
    """The class of connections with these limits: uvicorn makes them, and passes nothing of ours on."""
    return type("LimitedConnection", (Connection,), {"settings": settings})
