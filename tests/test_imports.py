"""The direction of imports: a folder imports only from those below it. Read from the sources, not by importing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "onekernel"
# From the bottom up. Those in one row do not import each other.
LAYERS = (
    ("cache", "errors"),
    ("sampling",),
    ("checkpoint",),
    ("gpu", "reference"),
    ("backend",),
    ("engine", "text"),
    ("scheduler", "stream"),
    ("many",),
    ("api",),
    ("conversation", "launch", "server"),
    ("batch", "bench", "probe"),
    ("cli", "ray"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Packages that only some of ours may import, and those that nothing may: torch and transformers are for the tests.
HOMES: dict[str, tuple[str, ...]] = {
    "cuda": ("gpu",),
    "rich": ("cli",),
    "httpx2": ("launch", "probe"),
    "jinja2": ("text",),
    "tokenizers": ("text",),
    "llguidance": ("text",),
    "starlette": ("server", "ray"),
    "uvicorn": ("server",),
    "msgspec": ("server",),
    "prometheus_client": ("server",),
    "ray": ("ray",),
    "torch": (),
    "transformers": (),
}
SOURCES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of onekernel that a file belongs to: its folder, or the file itself in the package's root."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(source: str) -> set[str]:
    """Dotted names of all that is imported anywhere in the source, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(part: str, source: str) -> list[str]:
    found = []
    for name in sorted(imported(source)):
        top, _, rest = name.partition(".")
        if top == "onekernel" and rest:
            target = rest.split(".")[0]
            if target in RANK and target != part and RANK[target] >= RANK[part]:
                found.append(f"{part} imports {name}")
        elif part not in HOMES.get(top, (part,)):
            found.append(f"{part} imports {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_below(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":  # of the package itself: it hands out public names of every layer
        return
    assert part in RANK, f"{part} is new: give it a place in LAYERS"
    assert violations(part, path.read_text(encoding="utf-8")) == []


def test_violations_are_found() -> None:
    assert violations("engine", "from onekernel.text.tokenizer import Tokenizer")
    assert violations("text", "def f():\n    from onekernel import engine")
    assert violations("reference", "import onekernel.backend.cpu")
    assert violations("reference", "import torch")
    assert violations("backend", "from cuda.core import Device")
    assert violations("api", "import rich.console")
    assert not violations("gpu", "from cuda.core import Device\nfrom onekernel.checkpoint.shape import Shape")
    assert not violations("cli", "import rich\nimport onekernel\nfrom onekernel.api import load")
