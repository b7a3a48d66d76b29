"""The body of a request: read within limits, and checked against the fields of its API."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from onekernel.server.errors import RequestError

IGNORED = "x-onekernel-ignored"  # names the fields of the request that had no effect
MOST_IGNORED = 32
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Fields(msgspec.Struct, kw_only=True):
    """Base of the fields of an API. Unknown ones are accepted (clients send many) and named in the header above."""


T = TypeVar("T", bound=Fields)


async def read(request: Request, kind: type[T]) -> tuple[T, dict[str, str]]:
    """The fields of the JSON body, and headers for the answer: they name the fields that `kind` does not know.

    Raises:
        RequestError: the body is too large or too slow, not JSON, or a field has the wrong type; names the field.
    """
    settings = request.app.state.service.settings
    try:
        async with asyncio.timeout(settings.body_s):
            body = await _read(request, settings.body_bytes)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {settings.body_s:g} s", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client left before its request was complete") from None
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object")
    known = frozenset(kind.__struct_encode_fields__)
    return convert(raw, kind), _ignored([name for name in raw if name not in known])


def convert(raw: Any, kind: type[T]) -> T:
    """`raw` as `kind`. Raises RequestError, naming the field."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        field = path.rstrip("`").removeprefix("$").lstrip(".") or None
        if field is None and message.endswith("required field") is False and "missing required field" in message:
            field = message.split("`")[-2]
        raise RequestError(f"{field + ': ' if field else ''}{message}", parameter=field) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def unsupported(name: str, why: str) -> RequestError:
    """The error for a field that would change the answer and that this server cannot honour."""
    return RequestError(f"{name} is not supported: {why}", code="unsupported_parameter", parameter=name)


def _ignored(names: list[str]) -> dict[str, str]:
    # Not every string can stand in a header.
    told = [name if PLAIN_NAME.fullmatch(name) else "?" for name in names[:MOST_IGNORED]]
    return {IGNORED: ", ".join(told)} if told else {}


async def _read(request: Request, limit: int) -> bytes:
    too_large = RequestError(f"the body is larger than {limit} bytes", status=413, code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)
