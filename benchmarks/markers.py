"""Generated parts of documents: what stands between two lines of a file, made anew."""

from __future__ import annotations

from pathlib import Path


def between(text: str, begin: str, end: str, new: str) -> str:
    """`text` with `new` in place of what stands between the lines `begin` and `end`; SystemExit if it lacks them."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"there is no place for the tables: put the lines {begin} and {end} into it")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def put(file: Path, begin: str, end: str, new: str) -> None:
    file.write_text(between(file.read_text(encoding="utf-8"), begin, end, new), encoding="utf-8")
