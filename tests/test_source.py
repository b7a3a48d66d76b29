"""The one string that goes to the compiler, and the digest of the files it is made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onekernel.gpu import source


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernel files in place of ours: a.cu includes b and c, b includes c."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.cu").write_text('// a\n#include "sub/b.cuh"\n#include "c.cuh"\nint a;\n')
    (tmp_path / "sub" / "b.cuh").write_text('#pragma once\n#include "c.cuh"\nint b;\n')
    (tmp_path / "c.cuh").write_text("#pragma once\nint c;\n")
    (tmp_path / "notes.txt").write_text("not a kernel")
    monkeypatch.setattr(source, "KERNELS", tmp_path)
    return tmp_path


def test_includes_are_in_place_and_once(kernels: Path) -> None:
    text = source.assemble("a.cu", {})
    assert "#include" not in text
    assert [line for line in text.splitlines() if line.startswith("int ")] == ["int c;", "int b;", "int a;"]
    assert "#pragma once" not in text


def test_line_directives_name_the_place_of_every_line(kernels: Path) -> None:
    """A compiler that counts from each #line comes to the line that the file has there."""
    name, number, seen = "", 0, 0
    for line in source.assemble("a.cu", {"N": 1}, "struct S {};").splitlines():
        if directive := re.fullmatch(r'#line (\d+) "(.+)"', line):
            number, name = int(directive[1]), directive[2]
            continue
        if name and line:
            assert (kernels / name).read_text().splitlines()[number - 1] == line
            seen += 1
        number += 1
    assert seen == 4  # a comment and three declarations


def test_constants_come_first_with_their_types(kernels: Path) -> None:
    text = source.assemble("a.cu", {"ON": True, "COUNT": 7, "MASK": 2**40, "EPS": 1e-6}, "struct S {};")
    assert text.splitlines()[:5] == [
        "constexpr bool ON = true;",
        "constexpr int COUNT = 7;",
        f"constexpr unsigned long long MASK = {2**40}ull;",
        "constexpr float EPS = 1e-06f;",
        "struct S {};",
    ]


def test_digest_changes_with_any_kernel_file_and_with_nothing_else(kernels: Path) -> None:
    before = source.digest()
    (kernels / "notes.txt").write_text("still not a kernel")
    assert source.digest() == before
    (kernels / "sub" / "b.cuh").write_text("int b2;\n")
    changed = source.digest()
    assert changed != before
    (kernels / "sub" / "b.cuh").rename(kernels / "sub" / "b2.cuh")
    assert source.digest() not in (before, changed)


def test_digest_is_of_text_and_not_of_line_ends(kernels: Path) -> None:
    """A checkout on Windows has the same digest."""
    before = source.digest()
    (kernels / "c.cuh").write_bytes(b"#pragma once\r\nint c;\r\n")
    assert source.digest() == before
