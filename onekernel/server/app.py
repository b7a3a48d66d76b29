"""The application: routes, and what stands before all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from onekernel.errors import OnekernelError
from onekernel.server import chat_page, errors, openapi
from onekernel.server.errors import RequestError
from onekernel.server.request_log import RequestLog
from onekernel.server.routes import OPERATIONS
from onekernel.server.security import Guard
from onekernel.server.service import Service
from onekernel.server.streaming import ClientGone

CLIENT_GONE = 499  # nobody reads it; it stands in the log


def make_app(service: Service) -> Starlette:
    """The ASGI application over one service. Whoever runs it closes the service afterwards."""
    routes = [Route(one.path, one.handler, methods=[one.method]) for one in OPERATIONS]
    app = Starlette(
        routes=[*routes, Route(openapi.PATH, openapi.openapi, methods=["GET"])],
        middleware=[Middleware(RequestLog), Middleware(Guard, settings=service.settings)],
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
