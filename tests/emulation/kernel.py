"""The batch kernel compiled for the CPU: its own sources, with what is PTX (in primitive/, mostly) replaced."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

from onekernel.gpu import source
from onekernel.gpu.batch_layout import BatchLayout

HERE = Path(__file__).parent
REPLACED = {
    "primitive/memory.cuh": "memory.cuh",
    "primitive/number.cuh": "number.cuh",
    "primitive/matrix.cuh": "matrix.cuh",
}
FUNCTION = r"{}\(.*?\n}}\n"


def compile_batch(layout: BatchLayout, folder: Path) -> ctypes.CDLL:
    """A library with `run_batch(BatchArguments*)`, whose pointers are then addresses of host memory."""
    original = source._read
    try:
        source._read = lambda name: _adapted(name, original(name))  # type: ignore[assignment]
        text = source.assemble("batch.cu", layout.constants(), layout.declarations())
    finally:
        source._read = original  # type: ignore[assignment]
    text = text.replace("__device__ constexpr float", "static constexpr float")
    parts = [(HERE / "shim.h").read_text(), text, '#line 1 "runtime.cpp"', (HERE / "runtime.cpp").read_text()]
    file, library = folder / "batch.cpp", folder / f"batch_{layout.columns}_{layout.column_groups}.so"
    file.write_text("\n".join(parts))
    flags = ["-std=c++20", "-O1", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]
    subprocess.run(["g++", *flags, "-o", str(library), str(file)], check=True)
    return ctypes.CDLL(str(library))


def _adapted(name: str, text: str) -> str:
    if name in REPLACED:
        includes = "\n".join(re.findall(r'#include ".+"', text))
        return f"{includes}\n{(HERE / REPLACED[name]).read_text()}"
    match name:
        case "primitive/mma.cuh":
            return '#include "primitive/number.cuh"'
        case "primitive/ring.cuh":  # the plain loads of sm_75
            text = text.replace("constexpr bool LIMITS_FLIGHT = false;", "constexpr bool LIMITS_FLIGHT = true;")
            return text.replace("__CUDA_ARCH__ >= 900", "0").replace("__CUDA_ARCH__ >= 800", "0")
        case "primitive/watchdog.cuh":  # a wait lets the others run
            text = re.sub(r"(void check\(\)) \{.*?\n    \}\n", r"\1 { yield_fiber(); }\n", text, flags=re.S)
            return re.sub(r"asm volatile\(.*?\);", ";", text)
        case "primitive/warp.cuh":
            text = re.sub(r'asm volatile\("mov.u32 %0, %%tid.x;".*?;', "thread = threadIdx.x;", text)
            text = re.sub(r'asm volatile\("mov.u32 %0, %%ctaid.x;".*?;', "block = blockIdx.x;", text)
            text = re.sub(r'asm volatile\("mov.u32 %0, %1;".*?;', "same = v;", text)
            return re.sub(r'asm volatile\("bar.sync 1.*?;.*?;', "bar(1, CONSUMER_WARPS * 32);", text)
        case "primitive/grid_barrier.cuh":
            text = re.sub(
                r'asm volatile\("ld.acquire.*?;.*?;', "v = *(volatile const u32*)counter;", text.split("// `target`")[0]
            )
            return re.sub(r'asm volatile\("red.*?;.*?;', "++*counter;", text)
        case "primitive/timeline.cuh":
            return re.sub(r"asm volatile\(.*?\);", "clock = 0;", text)
        case "primitive/gemv.cuh":  # without the matrix-vector product
            text = re.sub(r"// This warp's slice of the.*?(?=// A stage of a row group)", "", text, flags=re.S)
            return text[: text.index("// This warp's part of the sums")]
        case "sampling/elementary.cuh":
            rest = text[text.index("// Horner's scheme") :]
            return '#include "primitive/memory.cuh"\n' + (HERE / "rounded.cuh").read_text() + rest
        case "layer/linear_attention.cuh":
            return text[: text.index("// Receives this warp's slice")]
        case "layer/attention.cuh":
            return text[: text.index("__device__ __forceinline__ void attend(")]
        case "batch.cu":
            return text.replace("extern __shared__ __align__(128) u8 memory[];", "u8* memory = cur->block->memory;")
    return text
