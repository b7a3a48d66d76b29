"""GET / and /page/NAME: the chat page, if it is there. Its files are read once, so no request ever opens one."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from onekernel.server.errors import RequestError

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
# The page loads nothing from elsewhere, sends nothing elsewhere, and is shown in no other page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def load_files(folder: Path = FOLDER) -> dict[str, bytes]:
    """The files of the page by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


async def page(request: Request) -> Response:
    name = request.path_params.get("name", INDEX)
    content = request.app.state.page.get(name)
    if content is None:
        raise RequestError(f"there is nothing at {request.url.path}", status=404, code="not_found")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(content, media_type=kind, headers=headers)
