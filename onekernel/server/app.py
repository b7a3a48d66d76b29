"""The application: routes, and what stands before all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from onekernel.errors import OnekernelError
from onekernel.server import (
    chat_completions,
    chat_page,
    completions,
    errors,
    health,
    messages,
    models,
    responses,
    tokenize,
)
from onekernel.server.errors import RequestError
from onekernel.server.security import Guard
from onekernel.server.service import Service
from onekernel.server.streaming import ClientGone

ROUTES = (
    ("POST", "/v1/chat/completions", chat_completions.chat_completions),
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/responses", responses.responses),
    ("POST", "/v1/messages", messages.messages),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("POST", "/tokenize", tokenize.tokenize),
    ("POST", "/detokenize", tokenize.detokenize),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.get_model),
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
    ("GET", "/version", health.version),
    ("GET", "/props", health.props),
    ("GET", "/v1/props", health.props),
    ("GET", "/metrics", health.metrics),
    ("GET", "/", chat_page.page),
    ("GET", "/page/{name}", chat_page.page),
)
CLIENT_GONE = 499  # nobody reads it; it stands in the log


def make_app(service: Service) -> Starlette:
    """The ASGI application over one service. Whoever runs it closes the service afterwards."""
    app = Starlette(
        routes=[Route(path, handler, methods=[method]) for method, path, handler in ROUTES],
        middleware=[Middleware(Guard, settings=service.settings)],
        exception_handlers={
            OnekernelError: _failed,
            ClientGone: _client_gone,
            404: _not_found,
            405: _not_allowed,
            500: _bug,
        },
    )
    app.state.service = service
    app.state.page = chat_page.load_files()
    return app


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, OnekernelError)
    return errors.response(error, request.url.path)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _not_found(request: Request, error: Exception) -> Response:
    path = request.url.path
    return errors.response(RequestError(f"there is nothing at {path}", status=404, code="not_found"), path)


async def _not_allowed(request: Request, error: Exception) -> Response:
    path = request.url.path
    told = RequestError(f"{path} cannot be asked with {request.method}", status=405, code="method_not_allowed")
    response = errors.response(told, path)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error once more after this answer: its traceback belongs into the log."""
    told = RequestError("an error inside the server; its log says more", status=500, code="server_error")
    return errors.response(told, request.url.path)
