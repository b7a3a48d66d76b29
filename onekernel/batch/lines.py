"""The lines of an input file: requests in OpenAI's batch format, or plain prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onekernel.errors import InvalidRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it at the start


@dataclass(frozen=True)
class Line:
    """Attributes:
    number: of the line in the file, from 1.
    digest: SHA-256 of what the answer depends on: the line, and for a plain prompt the options, too.
    custom_id: the name that the user gave the request; "line-N" for a plain prompt without one.
    url: of the API that the request is for.
    body: of the request, not checked yet.
    problem: why the line is no request; None if it is one.
    """

    number: int
    digest: str
    custom_id: str | None = None
    url: str = COMPLETIONS
    body: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class LineProblem(Exception):
    """The line is no request. Becomes Line.problem."""


def read_lines(path: Path, options: Mapping[str, Any]) -> Iterator[Line]:
    """The lines of a file that are not blank, as they are read.

    Args:
        options: fields of /v1/completions that plain prompts get, unless their line says otherwise.

    Raises:
        InvalidRequest: the file cannot be read.
    """
    names: dict[str, int] = {}  # custom_id -> the line that used it
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                content = (raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw).strip()
                if content:
                    yield parse_line(number, content, options, names)
    except OSError as error:
        raise InvalidRequest(f"the input {path} cannot be read: {error.strerror or error}") from None


def parse_line(number: int, content: bytes, options: Mapping[str, Any], names: dict[str, int]) -> Line:
    """One line, stripped and not empty.

    Args:
        options: see read_lines.
        names: each custom_id that was used, and the line that did; a new one is added.
    """
    digest = hashlib.sha256(content).hexdigest()
    custom_id = None
    try:
        value = _decode(content)
        if isinstance(value, str) or (isinstance(value, dict) and "prompt" in value and "body" not in value):
            fields = {"prompt": value} if isinstance(value, str) else dict(value)
            custom_id = _name(fields.pop("custom_id", f"line-{number}"), number, names)
            digest = hashlib.sha256(content + json.dumps(options, sort_keys=True).encode()).hexdigest()
            return Line(number, digest, custom_id, COMPLETIONS, {**options, **fields})
        if not isinstance(value, dict) or "body" not in value:
            raise LineProblem(
                'it is neither a request (an object with "custom_id", "url" and "body") nor a plain prompt '
                '(a string, or an object with "prompt")'
            )
        custom_id = _name(value.get("custom_id"), number, names)
        if value.get("method", "POST") != "POST":
            raise LineProblem(f"method = {value['method']!r} must be 'POST'")
        if value.get("url") not in URLS:
            raise LineProblem(f"url = {value.get('url')!r} must be one of {', '.join(URLS)}")
        if not isinstance(value["body"], dict):
            raise LineProblem("body must be an object")
        return Line(number, digest, custom_id, value["url"], value["body"])
    except LineProblem as problem:
        return Line(number, digest, custom_id, problem=str(problem))


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineProblem(f"it is not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise LineProblem("it is nested too deeply") from None
    except ValueError as error:
        raise LineProblem(f"it is not valid JSON: {error}; a plain prompt is a JSON string, in quotes") from None


def _name(given: Any, number: int, names: dict[str, int]) -> str:
    if not isinstance(given, str) or not given:
        raise LineProblem(f"custom_id = {given!r} must be a text that names the request")
    if given in names:
        raise LineProblem(f"custom_id {given!r} is that of line {names[given]} already: each must be another")
    names[given] = number
    return given
