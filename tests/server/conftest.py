"""Servers for the tests: one over the demo model for all of them, and any number that play fixed texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from serving import ServerThread, scripted_model

import onekernel


@pytest.fixture(scope="session")
def demo() -> Iterator[ServerThread]:
    """The demo model on the CPU."""
    with onekernel.load("demo", backend="cpu") as model, ServerThread(model) as server:
        yield server


@pytest.fixture
def scripted() -> Iterator[Callable[..., ServerThread]]:
    servers: list[ServerThread] = []

    def start(*answers: str, delay: float = 0.0, max_context: int = 32768, **settings: object) -> ServerThread:
        """A server whose model plays `answers`; `delay` in seconds is that of each call of the backend."""
        servers.append(ServerThread(scripted_model(*answers, delay=delay, max_context=max_context), **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        server.model.close()
