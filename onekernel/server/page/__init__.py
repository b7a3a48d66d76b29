"""The chat page at `/`: six static files without dependencies, read once when the server starts.

No path of a request is ever opened: a name is looked up in a table. The content security policy lets the page load
and call its own server only, so that nothing in it, not even a bug, sends a conversation to another host.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CONTENT_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "highlight.js": "text/javascript; charset=utf-8",
}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """GET / and GET /page/NAME. They need no API key: the files are the same for everyone and hold no data."""
    folder = files("onekernel.server.page")
    contents = {name: (folder / name).read_bytes() for name in CONTENT_TYPES}

    def route(path: str, name: str) -> Route:
        async def answer(request: Request) -> Response:
            return Response(contents[name], headers=HEADERS, media_type=CONTENT_TYPES[name])

        return Route(path, answer, methods=["GET"], include_in_schema=False)

    return [route("/", "index.html"), *(route(f"/page/{name}", name) for name in CONTENT_TYPES if name != "index.html")]
