"""One line in the log for each request: what was asked, how it ended, how long it took. Never what was said."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("onekernel.server")
LONGEST_PATH = 200


class RequestLog:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # A path may hold line breaks and would then look like two lines.
            path = scope["path"][:LONGEST_PATH].encode("unicode_escape").decode()
            seconds = time.perf_counter() - started_at
            log.info("%s %s %s %.3f s", scope["method"], path, status or "-", seconds)
