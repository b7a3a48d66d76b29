"""Where and with what a document was made: commit, system, versions. Nothing here names the user or the host."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import onekernel

ROOT = Path(__file__).parents[2]


def commit() -> dict[str, Any]:
    """The commit of the clone that this package runs from: "hash" (None outside of one), "changed" (files differ)."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (ROOT / ".git").exists():
        return {"hash": os.environ.get("ONEKERNEL_COMMIT"), "changed": None}
    return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def system() -> dict[str, Any]:
    """Operating system, processor count, Python and the versions that decide about speed."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {"onekernel": onekernel.__version__, "numpy": np.__version__},
    }


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
