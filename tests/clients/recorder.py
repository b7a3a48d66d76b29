"""A proxy on the loopback interface that passes bytes through as they are, and keeps the requests."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import Any

BLOCK = 65536


class Recorder:
    """Between clients and a server; `requests` holds what the clients sent, in order of their connections."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._sent: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server))
            sent = bytearray()
            self._sent.append(sent)
            for source, target, kept in ((client, server, sent), (server, client, None)):
                threading.Thread(target=_pass_on, args=(source, target, kept), daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """method, path, headers (names in small letters) and body (parsed, if it is JSON)."""
        return [request for sent in self._sent for request in parse(bytes(sent))]


def _pass_on(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    with suppress(OSError):
        while data := source.recv(BLOCK):
            if kept is not None:
                kept += data
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def parse(data: bytes) -> list[dict[str, Any]]:
    """The complete requests of HTTP/1.1 in all that one connection sent."""
    found = []
    while b"\r\n\r\n" in data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "chunked" in headers.get("transfer-encoding", ""):
            body, data = _chunked(rest)
        else:
            length = int(headers.get("content-length", 0))
            body, data = rest[:length], rest[length:]
        try:
            parsed: Any = json.loads(body) if body else None
        except ValueError:
            parsed = body.decode("utf-8", "replace")
        found.append({"method": method, "path": path, "headers": headers, "body": parsed})
    return found


def _chunked(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        if length == 0:
            return body, data.removeprefix(b"\r\n")
        body, data = body + data[:length], data[length + 2 :]
