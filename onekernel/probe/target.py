"""The server under test: requests to it, whole or as a stream of events, with the times at which they came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from onekernel.probe.findings import Absent


@dataclass
class Answer:
    status: int
    content_type: str
    text: str
    data: Any
    """The text as parsed JSON; None if it is none."""


@dataclass
class Event:
    name: str | None
    """Of the line `event:`; None without one."""
    text: str
    data: Any
    """The text as parsed JSON; None if it is none."""
    at: float
    """Seconds since the request."""


@dataclass
class EventStream:
    status: int
    content_type: str
    text: str = ""
    """The body of an answer that is an error."""
    events: list[Event] = field(default_factory=list)
    strange_lines: list[str] = field(default_factory=list)
    """Lines that server-sent events do not have."""
    broken: str | None = None
    """How the connection failed, if it did."""
    seconds: float = 0.0


class Target:
    """A server, the model to ask for, and the key."""

    def __init__(self, url: str, model: str, key: str | None = None, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.key = key
        # No proxies of the environment, and no reuse of connections: a check must not inherit what another one left.
        self._client = httpx2.Client(
            base_url=self.url, timeout=timeout_s, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0)
        )

    def close(self) -> None:
        self._client.close()

    def headers(self, key: str | None = None) -> dict[str, str]:
        """Both ways of giving a key, as the APIs differ in it."""
        key = key or self.key
        named = {"authorization": f"Bearer {key}", "x-api-key": key} if key else {}
        return {"content-type": "application/json", "anthropic-version": "2023-06-01", **named}

    def get(self, path: str) -> Answer:
        return _answer(self._client.get(path, headers=self.headers()))

    def post(self, path: str, body: Any, key: str | None = None) -> Answer:
        """Send `body`, as JSON unless it is bytes already."""
        return _answer(self._client.post(path, content=_encoded(body), headers=self.headers(key)))

    def need(self, path: str, body: Mapping[str, Any]) -> Answer:
        """As `post`, but raises Absent if the server does not know the path."""
        answer = self.post(path, body)
        if answer.status in (404, 405, 501):
            raise Absent(f"POST {path} answers {answer.status}")
        return answer

    def leave(self, path: str, body: Mapping[str, Any], after_s: float) -> bool:
        """Ask, and close the connection after so many seconds; whether that was before the answer came."""
        try:
            self._client.post(path, content=_encoded(body), headers=self.headers(), timeout=after_s)
        except httpx2.TimeoutException:
            return True
        return False

    def stream(self, path: str, body: Mapping[str, Any], most_events: int | None = None) -> EventStream:
        """All events of an answer, or the first `most_events`, after which the connection is closed.

        Raises:
            Absent: the server does not know the path.
        """
        began = time.perf_counter()
        request = self._client.stream("POST", path, content=_encoded({**body, "stream": True}), headers=self.headers())
        with request as response:
            stream = EventStream(response.status_code, response.headers.get("content-type", ""))
            if response.status_code in (404, 405, 501):
                raise Absent(f"POST {path} answers {response.status_code}")
            if response.status_code != 200:
                response.read()
                stream.text = response.text
                return stream
            try:
                for event in _events(response.iter_lines(), stream.strange_lines, began):
                    stream.events.append(event)
                    if len(stream.events) == most_events:
                        break
            except httpx2.RequestError as error:
                stream.broken = f"{type(error).__name__}: {error}"
        stream.seconds = time.perf_counter() - began
        return stream


def _encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def _answer(response: httpx2.Response) -> Answer:
    return Answer(response.status_code, response.headers.get("content-type", ""), response.text, parsed(response.text))


def parsed(text: str) -> Any:
    """The value of a JSON text, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _events(lines: Iterator[str], strange: list[str], began: float) -> Iterator[Event]:
    """Server-sent events of lines, as in https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    name: str | None = None
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                text = "\n".join(data)
                yield Event(name, text, parsed(text), time.perf_counter() - began)
            name, data = None, []
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif line.startswith("event:"):
            name = line[6:].removeprefix(" ")
        elif not line.startswith((":", "id:", "retry:")):
            strange.append(line)
    if data:
        strange.append("an event without the empty line that ends it")
