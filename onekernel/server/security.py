"""Who may ask: keys, and the Host and Origin of requests. A page in a browser must not reach a server on loopback.

A web page may send requests to 127.0.0.1, and with DNS rebinding it can even read the answers: a name of its own that
first leads to its server and then to 127.0.0.1. The browser then still sends that name as Host.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onekernel.errors import InvalidRequest
from onekernel.server import errors
from onekernel.server.errors import RequestError
from onekernel.server.settings import Settings

# Without a key: whether the server lives is no secret.
OPEN_PATHS = ("/health", "/ready")
# The page itself is no secret either; it asks its user for the key.
PAGE_PATHS = ("/", "/page/")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_address(settings: Settings) -> None:
    """Raises InvalidRequest if everybody could use the server and nobody said that this is meant."""
    if not is_loopback(settings.host) and not settings.keys and not settings.allow_public:
        raise InvalidRequest(
            f"--host {settings.host} can be reached from other machines, and there is no key: give --api-key-file, or "
            "--allow-public if everybody may use the model"
        )


def read_keys(path: Path, option: str) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and lines that begin with # are skipped.

    Args:
        option: that named the file, as errors call it.

    Raises:
        InvalidRequest: the file cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{option} {path} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InvalidRequest(f"{option} {path} holds no key: write one a line")
    return keys


class Guard:
    """Turns requests away before anything is done for them."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check_host(headers)
            if not _is_page(scope):  # anybody may link to it
                self._check_origin(origin, headers)
            if scope.get("method") == "OPTIONS" and origin is not None:
                await self._preflight(origin, headers)(scope, receive, send)
                return
            if not _is_open(scope["path"]):
                self._check_key(headers)
        except RequestError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
                return
            await errors.response(error, scope["path"])(scope, receive, send)
            return
        if origin is None or (origin not in self._settings.origins and "*" not in self._settings.origins):
            await self._app(scope, receive, send)
            return

        async def with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["access-control-allow-origin"] = origin
                answer["vary"] = "origin"
            await send(message)

        await self._app(scope, receive, with_origin)

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host", "")
        name = _host_of(given)
        if name and (is_loopback(name) or name in (self._settings.host, *self._settings.hosts)):
            return
        if self._listens_everywhere() and name and _is_address(name):
            return  # an address cannot be rebound
        raise RequestError(
            f"the Host {given!r} is not a name of this server: allow it with --allow-host", status=403, code="bad_host"
        )

    def _check_origin(self, origin: str | None, headers: Headers) -> None:
        if origin is None:  # not a page in a browser
            if headers.get("sec-fetch-site") == "cross-site":
                raise RequestError("other web pages may not ask this server", status=403, code="bad_origin")
            return
        allowed = self._settings.origins
        own = urlsplit(origin).netloc == headers.get("host") and urlsplit(origin).scheme in ("http", "https")
        if not own and origin not in allowed and "*" not in allowed:
            raise RequestError(
                f"the web page {origin} may not ask this server: allow it with --allow-origin",
                status=403,
                code="bad_origin",
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        bearer = headers.get("authorization", "")
        given = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
        # All keys are compared, each in constant time: the time tells nothing about them.
        matches = [hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key) for key in self._keys]
        if not any(matches):
            raise RequestError(
                "a key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                status=401,
                code="invalid_api_key",
            )

    def _preflight(self, origin: str, headers: Headers) -> Response:
        return Response(
            status_code=204,
            headers={
                "access-control-allow-origin": origin,
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": headers.get("access-control-request-headers", "content-type"),
                "access-control-max-age": "600",
                "vary": "origin",
            },
        )

    def _listens_everywhere(self) -> bool:
        return self._settings.host in ("0.0.0.0", "::", "")


def _is_open(path: str) -> bool:
    page, assets = PAGE_PATHS
    return path in (*OPEN_PATHS, page) or path.startswith(assets)


def _is_page(scope: Scope) -> bool:
    page, assets = PAGE_PATHS
    return scope.get("method") == "GET" and (scope["path"] == page or scope["path"].startswith(assets))


def _host_of(header: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
