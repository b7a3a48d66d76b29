"""Where what is made once is kept: the user's choice, else the place that the system has for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onekernel.cache import cache_folder


def test_the_users_choice_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONEKERNEL_CACHE", str(tmp_path))
    assert cache_folder("kernels") == tmp_path / "kernels"
    monkeypatch.setenv("ONEKERNEL_CACHE", "~/chosen")
    assert cache_folder("checkpoints") == Path.home() / "chosen" / "checkpoints"


@pytest.mark.skipif(sys.platform == "win32", reason="folders of XDG")
def test_the_users_cache_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEKERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_folder("kernels") == Path("/var/caches/onekernel/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("kernels") == Path.home() / ".cache" / "onekernel" / "kernels"
