"""What can be read from a compiled kernel (nvdisasm): registers that code behind `setmaxnreg` names."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*(?:\(\*.*\*\))?;")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def disassembler() -> Path | None:
    """nvdisasm of NVIDIA's Python packages, or of a CUDA toolkit."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = sorted(packages.glob("cu*/bin/nvdisasm")) or sorted(Path("/usr/local").glob("cuda*/bin/nvdisasm"))
    return found[-1] if found and sys.platform == "linux" else None


def instructions(cubin: Path) -> list[tuple[list[str], str]]:
    """(labels in front of it, text) of each instruction."""
    tool = disassembler()
    assert tool is not None
    text = subprocess.run([str(tool), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    code: list[tuple[list[str], str]] = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels.append(label[1])
        elif found := INSTRUCTION.search(line):
            code.append((labels, found[1]))
            labels = []
    return code


def reachable(code: list[tuple[list[str], str]], start: int) -> set[int]:
    """The instructions that control can come to from instruction `start`."""
    places = {label: i for i, (labels, _) in enumerate(code) for label in labels}
    seen: set[int] = set()
    open_ = [start]
    while open_:
        i = open_.pop()
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        text = code[i][1]
        if (target := TARGET.search(text)) and not text.startswith("BSSY"):
            open_.append(places[target[1]])
        always = not text.startswith("@")
        if not (always and re.match(r"(EXIT|BRA `)", text)):
            open_.append(i + 1)
    return seen


def registers_behind_dealloc(cubin: Path) -> list[tuple[int, int]]:
    """Of each `setmaxnreg.dec`: (registers left to a thread, registers that the code behind it uses)."""
    code, found = instructions(cubin), []
    for i, (_, text) in enumerate(code):
        if "USETMAXREG.DEALLOC" in text:
            named = [int(r) for at in reachable(code, i) for r in re.findall(r"\bR(\d+)\b", code[at][1])]
            found.append((int(text.split()[-1], 16), 1 + max(named, default=0)))
    return found
