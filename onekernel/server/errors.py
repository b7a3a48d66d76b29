"""Errors of a request, and the form that each API gives them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.errors import InvalidRequest, NotEnoughMemory, OnekernelError
from onekernel.scheduler import QueueFull, ShuttingDown

Handler = Callable[[Request], Awaitable[Response]]


class RequestError(OnekernelError):
    """Attributes:
    status: of HTTP.
    code: a word for programs, or None.
    parameter: the field that was wrong, or None.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, parameter: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.parameter = parameter


class ContextOverflow(RequestError):
    """The prompt does not fit. The numbers are in the message in the words that clients search for."""

    def __init__(self, prompt_tokens: int, max_context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_context} tokens, but the prompt has {prompt_tokens} tokens "
            f"and at least one is needed for the answer. prompt is too long: {prompt_tokens} tokens > "
            f"{max_context - 1} maximum",
            code="context_length_exceeded",
        )


def as_request_error(error: OnekernelError) -> RequestError:
    """The same error with its status."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InvalidRequest):
        return RequestError(str(error))
    if isinstance(error, QueueFull):
        return RequestError(str(error), status=429, code="rate_limit_exceeded")
    if isinstance(error, ShuttingDown):
        return RequestError(str(error), status=503, code="shutting_down")
    if isinstance(error, NotEnoughMemory):
        return RequestError(str(error), status=503, code="out_of_memory")
    return RequestError(str(error), status=500, code="server_error")


OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def openai_body(error: RequestError) -> dict[str, Any]:
    kind = OPENAI_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}}


def anthropic_body(error: RequestError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = f"{error.parameter}: {error}" if error.parameter else str(error)
    return {"type": "error", "error": {"type": kind, "message": message}}


def form_of(path: str) -> Callable[[RequestError], dict[str, Any]]:
    """The form of errors of the API that a path belongs to."""
    return anthropic_body if path.startswith("/v1/messages") else openai_body


def response(error: OnekernelError, path: str) -> Response:
    """The answer to a request that failed before it was answered."""
    told = as_request_error(error)
    headers = {}
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(error.retry_after_s)
    elif told.status == 503:
        headers["retry-after"] = "5"
    elif told.status == 401:
        headers["www-authenticate"] = "Bearer"
    elif told.status in (408, 413):  # the rest of the body is not waited for
        headers["connection"] = "close"
    return JSONResponse(form_of(path)(told), told.status, headers)
