"""onekernel compile: compile the kernels of a model ahead of time, for this GPU or for any other."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from onekernel.cli import options
from onekernel.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onekernel.checkpoint.shape import Shape
    from onekernel.gpu.chips import Chip

SUMMARY = "compile a model's kernels, for this GPU or for others"
EXAMPLES = (
    "onekernel compile",
    "onekernel compile --model 0.8b --arch sm_86",
    "onekernel compile --model demo --arch all --json",
    "onekernel compile --model 0.8b --sequences 256",
)
ALL = "all"
TOO_SMALL = "its shared memory is too small, and prompts go through the decode kernel"


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. Sizes and spills are in bytes, the time is in seconds."""

    kernel: str
    model: str
    arch: str
    chip: str
    sm_count: int
    registers: int
    spill_stores: int
    spill_loads: int
    cubin_bytes: int
    seconds: float
    file: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="demo (the default), a folder, a name on the hub, or the dimensions alone: 0.8b, 2b, 4b, 9b, 27b",
    )
    parser.add_argument(
        "--arch",
        action="append",
        metavar="ARCH",
        help="such as sm_86, for a well-known chip of that architecture; may be repeated; all is every one "
        "(default: exactly the GPU of this machine)",
    )
    parser.add_argument(
        "--sequences",
        type=options.positive,
        metavar="N",
        help="also the kernels for up to N sequences at once; `serve` and `batch` use those for up to 256",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array when done")


def run(arguments: argparse.Namespace) -> int:
    shape, vocabulary_size = _dimensions(arguments.model)
    results = []
    for arch, chip in _targets(arguments.arch):
        for kernel, source in _sources(shape, vocabulary_size, arch, chip, arguments.sequences):
            if source is None:
                print(f"onekernel: no {kernel} kernel for {arch}: {TOO_SMALL}", file=sys.stderr)
                continue
            result = _compile(kernel, source, arguments.model, arch, chip)
            results.append(result)
            if not arguments.json:
                print(_line(result), flush=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    return 0


def _dimensions(model: str) -> tuple[Shape, int]:
    """The shape of a model, and how many tokens its tokenizer defines."""
    from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE

    if (size := model.lower()) in SIZES:
        return SIZES[size], VOCABULARY_SIZE
    from onekernel.checkpoint import hub
    from onekernel.checkpoint.shape import Shape
    from onekernel.text.tokenizer import Tokenizer

    folder = hub.resolve(model)
    return Shape.load(folder), Tokenizer.load(folder).size


def _targets(asked: list[str] | None) -> list[tuple[str, Chip]]:
    from onekernel.gpu.chips import Chip, chip_of
    from onekernel.gpu.compile import ARCHITECTURES
    from onekernel.gpu.device import find_gpu

    if not asked:
        try:
            gpu = find_gpu()
        except BackendError as error:
            raise BackendError(f"{error}; name an architecture: --arch {ARCHITECTURES[2]}, or --arch {ALL}") from None
        return [(gpu.arch, Chip(gpu.name, gpu.sm_count, gpu.shared_memory))]
    names = ARCHITECTURES if ALL in asked else dict.fromkeys(asked)
    return [(arch, chip_of(arch)) for arch in names]


def _sources(
    shape: Shape, vocabulary_size: int, arch: str, chip: Chip, sequences: int | None
) -> Iterator[tuple[str, str | None]]:
    """The kernels that CudaBackend loads for this model on this chip; None where it does without."""
    from onekernel.gpu.batch_decoder import batch_source, layouts_for
    from onekernel.gpu.batch_layout import BUCKETS, bucket_of
    from onekernel.gpu.kernel import decode_source
    from onekernel.gpu.layout import Layout
    from onekernel.gpu.prefill_layout import PrefillLayout
    from onekernel.gpu.prefiller import prefill_source

    most = bucket_of(sequences) if sequences else 0
    layout = Layout.plan(shape, vocabulary_size, chip.sm_count, chip.shared_memory)
    yield "decode", decode_source(layout)
    plans = PrefillLayout.plans(layout, chip.sm_count, chip.shared_memory, arch)
    yield from (("prefill", prefill_source(plan)) for plan in plans)
    if not plans:
        yield "prefill", None
    if most:
        versions = layouts_for(layout, [bucket for bucket in BUCKETS if bucket <= most])
        yield from (("batch", batch_source(version)) for version in versions.values())


def _compile(kernel: str, source: str, model: str, arch: str, chip: Chip) -> Compiled:
    from onekernel.gpu.compile import cache_path, compile_source, write_entry

    start = time.monotonic()
    cubin, resources = compile_source(source, arch, kernel)
    seconds = time.monotonic() - start
    path = cache_path(source, arch)
    write_entry(path, cubin)
    return Compiled(
        kernel=kernel,
        model=model,
        arch=arch,
        chip=chip.name,
        sm_count=chip.sm_count,
        registers=resources.registers,
        spill_stores=resources.spill_stores,
        spill_loads=resources.spill_loads,
        cubin_bytes=len(cubin),
        seconds=round(seconds, 2),
        file=str(path),
    )


def _line(result: Compiled) -> str:
    chip, spills = f"{result.chip}, {result.sm_count} SMs", result.spill_stores + result.spill_loads
    return (
        f"{result.kernel:<9}{result.arch:<9}{chip:<30}{result.registers:>4} registers,{spills:>5} bytes of spills,"
        f"{result.cubin_bytes / 1024:>5.0f} KiB, {result.seconds:.1f} s"
    )
