"""What racecheck reports is traced to functions; only the weight ring's own handshake is no fault."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import races

RING, GEMV = races.KERNELS / "primitive" / "ring.cuh", races.KERNELS / "primitive" / "gemv.cuh"


def line_in(path: Path, function: str) -> int:
    """A line within a function's body."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return 2 + next(i for i, line in enumerate(lines) if f" {function}(" in line and "__device__" in line)


def listing(*places: tuple[Path, str]) -> str:
    """As nvdisasm prints it: an instruction every 16 bytes, each inlined into `consume`."""
    text = ".text.decode:\n"
    for i, (path, function) in enumerate(places):
        name, line = path.relative_to(races.KERNELS), line_in(path, function)
        text += f'\t//## File "/any/{name}", line {line} inlined at "/any/decode.cu", line 150\n'
        text += '\t//## File "/any/decode.cu", line 150\n'
        text += f"        /*{16 * i:04x}*/                   LDS R1, [R2] ;\n"
        text += f"        /*{16 * i + 8:04x}*/                   NOP ;\n"
    return text


def report(first: int, *others: int) -> str:
    text = f"========= Error: Race reported between Write access at decode+{first:#x}\n"
    return text + "".join(f"=========     and Read access at decode+{other:#x} [12 hazards]\n" for other in others)


def test_functions_are_found_by_file_and_line() -> None:
    assert races.function_at("/any/primitive/ring.cuh", line_in(RING, "await_landed")) == "await_landed"
    assert races.function_at("primitive/ring.cuh", line_in(RING, "release_stage")) == "release_stage"
    assert races.function_at("/any/else.cuh", 3) == "unknown"


def test_ring_against_its_readers_is_a_handshake() -> None:
    code = listing((RING, "fill_stage"), (GEMV, "fetch_stage"), (RING, "release_stage"))
    found = races.races(report(0, 16) + report(32, 8), code)
    assert [race.is_handshake for race in found] == [True, True]
    assert str(found[0]) == "write in fill_stage with read in fetch_stage"


def test_anything_else_is_a_race() -> None:
    code = listing(
        (GEMV, "store_activations"), (GEMV, "receive_activations"), (RING, "fill_stage"), (GEMV, "fetch_stage")
    )
    found = races.races(report(0, 16) + report(32, 16) + report(48, 56) + report(0x9000, 32), code)
    assert [race.is_handshake for race in found] == [False, False, False, False]
    assert found[3].first == ("Write", ("unknown",))


def test_functions_that_the_tool_names_need_no_listing() -> None:
    reported, other = "========= Error: Race reported between", "=========     and"
    named = f"""
{reported} Write access at bulk_copy(void *, const unsigned char *, unsigned int)+0x1ba20 in ring.cuh:86
{other} Read access at void fetch_stage<(int)1>(Consumer &, uint4 (&)[4])+0x1a40 in gemv.cuh:128 [131072 hazards]
{reported} Read access at slot_is_free(const Ring &, RingPosition)+0x1b5e0 in ring.cuh:57
{other} Write access at release_stage(const Ring &, unsigned int, int, int)+0x1f90 in ring.cuh:50 [4228 hazards]
{reported} Write access at watch_landings(Ring &, Watchdog)+0x1bef0 in ring.cuh:110
{other} Read access at await_landed(const Ring &, unsigned int, Watchdog &)+0x20c0 in ring.cuh:38 [4 hazards]
{other} Read access at void receive_activations<(int)256>(Consumer &, const unsigned int *)+0x20f0 in gemv.cuh:90
"""
    found = races.races(named, "")
    assert [race.is_handshake for race in found] == [True, True, True, False]
    assert str(found[0]) == "write in bulk_copy with read in fetch_stage"
    assert found[3].second == ("Read", ("receive_activations",))


def test_no_report_is_no_race() -> None:
    assert races.races("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", listing()) == []
