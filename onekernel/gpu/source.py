"""The kernel source: one string for the compiler, assembled of the files in kernels/ and the constants of one model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files

KERNELS = files("onekernel") / "gpu" / "kernels"
INCLUDE = re.compile(r'#include "(.+)"')


def assemble(entry: str, constants: Mapping[str, int | float | bool | tuple[float, ...]], structs: str = "") -> str:
    """The source of kernel file `entry`: constants, structs, then the file with its includes in place, each once."""
    lines = [_constant(name, value) for name, value in constants.items()]
    return "\n".join([*lines, structs, *_expand(entry, set())]) + "\n"


def digest() -> str:
    """SHA-256 of all kernel files: says whether a report of a GPU run belongs to these sources."""
    total = hashlib.sha256()
    for name in _names(""):
        total.update(f"{name}\0".encode() + _read(name).encode() + b"\0")
    return total.hexdigest()


def _constant(name: str, value: int | float | bool | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"__device__ constexpr float {name}[] = {{{', '.join(f'{v!r}f' for v in value)}}};"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, float):
        return f"constexpr float {name} = {value!r}f;"
    kind, suffix = ("int", "") if value < 2**31 else ("unsigned long long", "ull")
    return f"constexpr {kind} {name} = {value}{suffix};"


def _expand(name: str, seen: set[str]) -> list[str]:
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(_read(name).splitlines(), 1):
        if included := INCLUDE.match(line):
            if included[1] in seen:
                lines.append("")
            else:
                seen.add(included[1])
                lines += [*_expand(included[1], seen), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if line.startswith("#pragma once") else line)
    return lines


def _names(folder: str) -> list[str]:
    place = KERNELS / folder if folder else KERNELS
    names = []
    for entry in sorted(place.iterdir(), key=lambda entry: entry.name):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            names += _names(name)
        elif name.endswith((".cu", ".cuh")):
            names.append(name)
    return names


def _read(name: str) -> str:
    return (KERNELS / name).read_text(encoding="utf-8")
