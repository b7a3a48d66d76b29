"""Tokens in, tokens out: `Engine` is a loaded model on a backend, `Session` one token timeline on it."""

from onekernel.engine.engine import Engine
from onekernel.engine.session import Session, Snapshot

__all__ = ["Engine", "Session", "Snapshot"]
