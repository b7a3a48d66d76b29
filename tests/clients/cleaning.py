"""Requests of real clients, cleaned of everything personal, of this machine and of this moment, as files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "fixtures"
LONGEST = 100  # characters of a text: descriptions and system prompts are others' work, only their form matters here
KEPT_HEADERS = ("content-type", "accept", "user-agent", "anthropic-version", "anthropic-beta")
PATTERNS = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "00000000-0000-0000-0000-000000000000"),
    (r"\b[0-9a-f]{32,64}\b", "0" * 32),
    (r"\b(call|toolu|msg|resp|fc|rs|ses|chatcmpl)_?[0-9A-Za-z]{16,}\b", r"\1_0"),
    (r"\d{4}-\d{2}-\d{2}(T[\d:.]+(Z|[+-][\d:]+)?)?", "2026-01-01"),
    (r"(Mon|Tue|Wednes|Thurs|Fri|Satur|Sun)day,? [A-Z][a-z]+ \d+,? \d{4}", "Thursday, January 1, 2026"),
    (r"\b([Ll]inux) \d[\w.+-]*", r"\1"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:8000"),
)


def write_fixture(name: str, package: str, requests: Iterable[Mapping[str, Any]], paths: Mapping[str, str]) -> None:
    """Write fixtures/NAME.json; `paths` gives other names to folders of this machine."""
    kept = [
        {
            "method": request["method"],
            "path": request["path"],
            "headers": {key: clean(value, paths) for key, value in request["headers"].items() if key in KEPT_HEADERS},
            "body": clean(request["body"], paths),
        }
        for request in requests
        if not request["headers"].get("user-agent", "").startswith("python-httpx2")  # of `onekernel launch`
    ]
    text = json.dumps({"client": package, "requests": kept}, indent=1, ensure_ascii=False, sort_keys=True)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def clean(value: Any, paths: Mapping[str, str]) -> Any:
    """The same structure with cleaned and shortened texts."""
    if isinstance(value, dict):
        return {clean(key, paths): clean(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner, paths) for inner in value]
    if not isinstance(value, str):
        return value
    for path, other in paths.items():
        value = value.replace(path, other)
    for pattern, other in PATTERNS:
        value = re.sub(pattern, other, value)
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}…"


def load_fixtures() -> dict[str, list[dict[str, Any]]]:
    """Requests by client."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))["requests"] for path in sorted(FOLDER.glob("*.json"))
    }
