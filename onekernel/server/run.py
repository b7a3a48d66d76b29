"""Runs the application: one process, one event loop, one thread for the engine. Ends in good order on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable

import uvicorn

from onekernel.api import Model
from onekernel.errors import BackendError, InvalidRequest
from onekernel.server.app import make_app
from onekernel.server.connection import limited
from onekernel.server.security import check_address
from onekernel.server.service import Service
from onekernel.server.settings import Settings

SWITCH_S = 0.0005  # how long the engine's thread may keep the interpreter from the event loop
BACKLOG = 2048
LAST_WORDS_S = 5.0  # for the ends of streams to reach their readers, after the grace period


class Server(uvicorn.Server):
    """uvicorn, and the scheduler's end in step with its own."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers that end within the grace period do so; the streams of the others end with an error."""
        ended = asyncio.ensure_future(asyncio.to_thread(self._service.close, self._service.settings.grace_s))
        await super().shutdown(sockets)
        await ended
        # uvicorn would now kill the process with the signal that it got, as if it had not been handled.
        self._captured_signals.clear()


def listen(settings: Settings) -> socket.socket:
    """The socket of the server; port 0 takes a free one.

    Raises:
        InvalidRequest: everybody could use it (see check_address), or there is no such port.
        BackendError: the address cannot be had.
    """
    check_address(settings)
    if not 0 <= settings.port <= 65535:
        raise InvalidRequest(f"--port {settings.port} must be between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
    except OSError as error:
        raise BackendError(
            f"cannot listen on {settings.host} port {settings.port} ({error.strerror or error}): choose another --port"
        ) from None
    return listener


def make_server(model: Model, settings: Settings) -> Server:
    """A server over a loaded model; `run` it with a socket of `listen`."""
    service = Service(model, settings)
    config = uvicorn.Config(
        make_app(service),
        http=limited(settings),
        ws="none",
        loop="auto",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        backlog=BACKLOG,
        timeout_keep_alive=int(settings.header_s),
        timeout_graceful_shutdown=int(settings.grace_s + LAST_WORDS_S),
    )
    return Server(config, service)


def run(model: Model, settings: Settings, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or ctrl-C. `ready` is called with the URL once connections are taken."""
    sys.setswitchinterval(SWITCH_S)
    _allow_many_connections()
    listener.listen(BACKLOG)  # from here on, connections wait instead of being refused
    host, port = listener.getsockname()[:2]
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    make_server(model, settings).run([listener])


def _allow_many_connections() -> None:
    """As many open files as the system lets this process have."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
