"""A struct declared once, as a list of C types and names, for both sides: a ctypes.Structure and its C++ text."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

Declared = Sequence[tuple[str, str]]  # (C type, name); the name of an array carries its length: "stops[8]"
NUMBERS: dict[str, Any] = {"int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double}
NUMBERS["unsigned long long"] = ctypes.c_uint64


def ctypes_fields(declared: Declared, *structures: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """`_fields_` of the structure; pointers are device addresses. `structures` are those that it may contain."""
    known = NUMBERS | {structure.__name__: structure for structure in structures}
    fields = []
    for kind, name in declared:
        number = ctypes.c_uint64 if kind.endswith("*") else known[kind]
        array = re.fullmatch(r"(\w+)\[(\d+)\]", name)
        fields.append((array[1], number * int(array[2])) if array else (name, number))
    return fields


def source_of(structure: Any) -> str:
    """The C++ definition of a structure that keeps its declaration in `_FIELDS_IN_C`; compiling it checks the size."""
    name = structure.__name__
    fields = (f"    {kind} {field};" for kind, field in structure._FIELDS_IN_C)
    check = f'static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "the host sees another {name}");'
    return "\n".join([f"struct {name} {{", *fields, "};", check])
