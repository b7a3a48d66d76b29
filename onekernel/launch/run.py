"""Writes a client's temporary configuration, runs the client, and removes the configuration."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from onekernel.errors import InvalidRequest, OnekernelError
from onekernel.launch.client import Client, Server, Setup
from onekernel.launch.clients import CLIENTS

REMOVALS, REMOVAL_S = 10, 0.05  # tries to remove the configuration, and seconds between them
NO_PROXY = "127.0.0.1,localhost,::1"


def run(name: str, server: Server, arguments: Sequence[str] = ()) -> int:
    """Run a client until it ends.

    Args:
        name: one of CLIENTS.
        server: what it is to talk to.
        arguments: passed to the client as they are; none starts it as a user would.

    Returns:
        The exit code of the client; 128 + n if signal n ended it.

    Raises:
        OnekernelError: the client is not installed, or needs a larger context; says what to do.
    """
    client = CLIENTS[name]
    executable = shutil.which(client.executable)
    if executable is None:
        raise OnekernelError(f"{client.title} is not installed ({client.executable} is not on PATH): {client.install}")
    if server.context < client.least_context:
        raise InvalidRequest(
            f"{client.title} needs a context of {client.least_context} tokens, but the server has {server.context}: "
            f"start the server with --max-context {client.least_context} or more"
        )
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_parent()))
    try:
        setup = client.setup(server, folder)
        for path, content in setup.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content, encoding="utf-8")
        command = [executable, *(arguments or client.arguments)]
        code = _wait(subprocess.Popen(command, env=environment(client, setup, os.environ)))
    finally:
        _remove(folder)
    return 128 - code if code < 0 else code


def environment(client: Client, setup: Setup, own: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without what would override the setup (keys of real accounts among it), and the setup."""
    kept = {name: value for name, value in own.items() if not name.startswith(client.owned or ("\0",))}
    # Loopback must not go through a proxy, whatever the clients' libraries make of one.
    addresses = ",".join(filter(None, (own.get("NO_PROXY") or own.get("no_proxy"), NO_PROXY)))
    return {**kept, "NO_PROXY": addresses, "no_proxy": addresses, **setup.environment}


def _parent() -> Path:
    """Where the temporary folders are made: readable by this user only, and not in the system's temporary folder, in
    which Codex refuses to put its helpers."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent = base / "onekernel" / "launch"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return parent


def _remove(folder: Path) -> None:
    """Also while a process that the client left behind (an update, an installation) still writes there for a moment."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(REMOVAL_S)
        if not folder.exists():
            return


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code. Ctrl-C is the client's: it reaches both of us, and only the client knows what to do with it. What
    ends only us (SIGTERM) is passed on, so that the configuration is removed after the client's end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.terminate()

    usual = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    usual[signal.SIGTERM] = signal.signal(signal.SIGTERM, pass_on)
    try:
        return process.wait()
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
