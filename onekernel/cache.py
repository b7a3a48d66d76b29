"""Where onekernel keeps what it makes once: compiled kernels and random checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(part: str) -> Path:
    """The folder of one part ("kernels", "checkpoints") in ONEKERNEL_CACHE, else in the user's cache folder."""
    if chosen := os.environ.get("ONEKERNEL_CACHE"):
        return Path(chosen).expanduser() / part
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "onekernel" / part
