"""Tokens in, tokens out: `Engine` is a loaded model on a backend, `Session` one token timeline on it."""

from onekernel.engine.engine import Engine
from onekernel.engine.session import Session, Snapshot
from onekernel.engine.together import Member, run_together

__all__ = ["Engine", "Member", "Session", "Snapshot", "run_together"]
