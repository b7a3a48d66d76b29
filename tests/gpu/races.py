"""What racecheck reports, in terms of the sources: which functions race, and whether that is the ring's own handshake.

racecheck orders accesses to shared memory by barriers. The weight ring (primitive/ring.cuh) orders them by counters in
shared memory instead: the producer's copies are complete before `landed` counts them, and consumers read only what it
counts; they are done with a slot before `released` counts it, and the producer fills only what all have released. To
the tool every pass around the ring is a race between those functions. Between any others it is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "onekernel" / "gpu" / "kernels"
# The two sides of the ring, and the one place that reads its slots; `stage` is the Producer's, in decode.cu.
PRODUCER = {"bulk_copy", "fill_stage", "slot_is_free", "watch_landings", "mark_landed", "stage"}
CONSUMER = {"await_landed", "release_stage", "fetch_stage"}
Stack = tuple[tuple[str, int], ...]  # file and line, the innermost function first

# "decode+0x10", or where the tool knows the lines itself "void fetch_stage<(int)1>(Consumer &)+0x10 in gemv.cuh:128".
ACCESS = r"(\w+) access at (.+)\+0x([0-9a-f]+)"
REPORTED = re.compile(f"Race reported between {ACCESS}")
OTHER_SIDE = re.compile(f"and {ACCESS}")
NAME = re.compile(r"(\w+)(?:<[^(]*(?:\([^)]*\)[^(]*)*>)?\(")
PLACE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s")
DEFINITION = re.compile(r"__(?:device|global)__.*?\b(?!__)(\w+)\s*\(")


@dataclass(frozen=True)
class Race:
    """Two accesses that no barrier orders: (read or write, the functions from the innermost to the outermost) each."""

    first: tuple[str, tuple[str, ...]]
    second: tuple[str, tuple[str, ...]]

    @property
    def is_handshake(self) -> bool:
        """Whether one side is the ring's producer, and the other its consumer (or both the producer's two warps)."""
        sides = [set(functions) for _, functions in (self.first, self.second)]
        one_is_producer = any(side & PRODUCER for side in sides)
        return one_is_producer and all(side & (PRODUCER | CONSUMER) for side in sides)

    def __str__(self) -> str:
        return " with ".join(f"{kind.lower()} in {functions[0]}" for kind, functions in (self.first, self.second))


def races(output: str, listing: str) -> list[Race]:
    """All pairs that racecheck names, each once.

    Args:
        output: of racecheck in its report mode "analysis".
        listing: what `nvdisasm -c -gi` says of the same cubin, compiled with line information.
    """
    functions = {address: tuple(_functions(stack)) for address, stack in stacks(listing).items()}
    found: dict[Race, None] = {}
    first: tuple[str, tuple[str, ...]] | None = None
    for line in output.splitlines():
        if match := REPORTED.search(line):
            first = match[1], _place(functions, match[2], match[3])
        elif first and (match := OTHER_SIDE.search(line)):
            found[Race(first, (match[1], _place(functions, match[2], match[3])))] = None
    return list(found)


def _place(functions: dict[int, tuple[str, ...]], name: str, address: str) -> tuple[str, ...]:
    """The functions of an access: from the listing of the decode kernel, or else the one that the tool itself names."""
    if name == "decode" and (stack := functions.get(int(address, 16))):
        return stack
    return (match[1],) if (match := NAME.search(name)) else ("unknown",)


def stacks(listing: str) -> dict[int, Stack]:
    """Where in the sources each instruction comes from."""
    found: dict[int, Stack] = {}
    place: list[tuple[str, int]] = []
    fresh = True  # the next place begins a new stack
    for line in listing.splitlines():
        if match := PLACE.match(line):
            if fresh:
                place, fresh = [], False
            place.append((match[1], int(match[2])))
        elif match := INSTRUCTION.match(line):
            found[int(match[1], 16)] = tuple(place)
            fresh = True
    return found


def _functions(stack: Stack) -> Iterator[str]:
    for file, line in stack:
        yield function_at(file, line)


def function_at(file: str, line: int) -> str:
    """The name of the function that a line of a kernel source belongs to, or "unknown"."""
    path = next((path for path in KERNELS.rglob("*.cu*") if file.endswith(str(path.relative_to(KERNELS)))), None)
    if path is None:
        return "unknown"
    for text in reversed(path.read_text(encoding="utf-8").splitlines()[:line]):
        if match := DEFINITION.search(text):
            return match[1]
    return "unknown"
