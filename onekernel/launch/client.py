"""What a start of a client is made of: the server that it talks to, the client, and its temporary configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that answers the OpenAI and Anthropic APIs."""

    url: str
    """Without /v1 and without a slash at the end."""
    model: str
    context: int
    """Tokens of prompt and answer together."""
    key: str
    """Clients insist on one, also where the server wants none."""

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def max_output(self) -> int:
        """Tokens of one answer: a quarter of the context, so that a client compacts before there is no room."""
        return max(256, min(16_384, self.context // 4))


@dataclass(frozen=True)
class Setup:
    """The temporary configuration of one start."""

    environment: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    """Name in the temporary folder -> content."""


@dataclass(frozen=True)
class Client:
    """One program that can be started."""

    title: str
    executable: str
    install: str
    """The command that installs it."""
    setup: Callable[[Server, Path], Setup]
    """(the server, the temporary folder) -> the configuration."""
    owned: tuple[str, ...] = ()
    """Beginnings of the names of environment variables that would override the setup; they are not passed on."""
    arguments: tuple[str, ...] = ()
    """Those of a start without any of the user's."""
    least_context: int = 0
    """Tokens below which the client refuses to work."""
