"""A hub on this machine: it speaks what a download needs of the protocol, and notes what it was asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) as the one model `name`."""

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.files = files
        self.status: int | None = None  # answers everything with this status
        self.token: str | None = None  # without it, the model does not exist
        self.cut_after: dict[str, int] = {}  # the connection breaks once after so many bytes of a file
        self.stall = False  # at the cut the connection does not break, but nothing more comes
        self.stalled = threading.Event()
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range

    @property
    def downloaded(self) -> set[str]:
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return {path.split(f"/{COMMIT}/")[1] for path in paths}

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process that is to use this hub, and an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {
            **kept,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **more,
        }


@contextmanager
def serving(name: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(name, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        allowed = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.status is not None:
            self._answer(hub.status, b"{}")
        elif not (allowed and path.startswith((f"/api/models/{hub.name}/", f"/{hub.name}/resolve/"))):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif re.search(r"/revision/(main|v1|" + COMMIT + ")$", path):
            self._answer(200, json.dumps({"id": hub.name, "sha": COMMIT, "siblings": []}).encode())
        elif "/revision/" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            self._answer(200, json.dumps(entries).encode())
        else:
            self._file(path.split(f"/{COMMIT}/")[1])

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, data[start:], headers)
        elif self.command == "GET" and name in self.server.cut_after:
            self._answer(200, data, headers, send=self.server.cut_after.pop(name))
        else:
            self._answer(200, data, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, send: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        if send is not None:
            self.wfile.flush()
            self.server.stalled.set()
            if self.server.stall:
                with contextlib.suppress(ConnectionError):
                    self.connection.recv(1)  # until the other side has gone
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
