"""The prefill kernel compiled for the host (host.h), and launches of it on NumPy arrays."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from state_parts import errors

from onekernel.checkpoint.weights import Weights
from onekernel.gpu import parameters, tape
from onekernel.gpu.decoder import cache_bytes, recurrent_bytes
from onekernel.gpu.prefill_layout import PrefillArguments, PrefillLayout, matrix_offsets
from onekernel.gpu.prefiller import prefill_source
from onekernel.reference.state import State

HERE = Path(__file__).parent
FUNCTION = re.compile(r"(template <[^;{}]*>\s*)?__device__ __forceinline__ [^;{}()]*?(\w+)\([^;{}]*\)\s*(const )?\{")


def host_source(source: str) -> str:
    """`source` with every function left out that host.h has in its own way."""
    names = set(re.findall(r"\binline [^(){};]*?\b(\w+)\(", (HERE / "host.h").read_text()))
    names |= {"mbarrier_init"} | set(re.findall(r"\bvoid (wgmma_\w+)\(", source))
    out, at = [], 0
    for found in FUNCTION.finditer(source):
        if found.start() < at:
            continue
        end, depth = found.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        if found[2] in names:
            out.append(source[at : found.start()])
            at = end
        elif "asm" in source[found.start() : end]:
            out += [source[at : found.end()], " abort(); }\n"]
            at = end
    text = "".join(out) + source[at:]
    text = text.replace("extern __shared__ __align__(1024) u8 memory[];", "u8* memory = emulated_shared();")
    text = text.replace('extern "C" __global__ void', 'extern "C" void')
    return '#include <string>\n#include "host.h"\n' + text + MAIN


MAIN = """
static const PrefillArguments* given;
extern "C" int emulate(const PrefillArguments* a, int blocks) {
    given = a;
    cluster_size = PAIRS ? 2 : 1;
    return run_fibers(blocks, PREFILL_THREADS, [] { prefill(*given); });
}
"""


class Emulated:
    """A model with its scratch memory and state in NumPy arrays, and launches of the kernel on them."""

    def __init__(self, layout: PrefillLayout, weights: Weights, arch: str, max_context: int = 256) -> None:
        """Args: see PrefillLayout.plan; sm_90a has its own path, all others the portable one."""
        folder = Path(tempfile.mkdtemp())
        (folder / "kernel.cpp").write_text(host_source(prefill_source(layout)))
        wgmma = arch == "sm_90a"
        flags = ["-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL"] if wgmma else ["-D__CUDA_ARCH__=800"]
        command = ["g++", "-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared", f"-I{HERE}", *flags]
        subprocess.run([*command, str(folder / "kernel.cpp"), "-o", str(folder / "kernel.so")], check=True)
        self.library = ctypes.CDLL(str(folder / "kernel.so"))
        self.layout, shape = layout, layout.shape
        whole = np.zeros(tape.plan(shape, layout.decode.blocks).nbytes, np.uint8)
        for offset, piece in tape.pack(weights, shape, layout.decode.blocks, half=False):
            whole[offset : offset + piece.nbytes] = piece
        self.arrays = {
            "tape": aligned(whole),
            "matrix_offsets": matrix_offsets(shape, layout.decode.blocks),
            "parameters": parameters.pack(weights, shape),
            "rope": parameters.rope_table(shape, max_context),
            "state": aligned(np.zeros(recurrent_bytes(shape) + cache_bytes(shape, max_context), np.uint8)),
            "barrier": np.zeros(1, np.uint32),
            "times": np.zeros(layout.phases + 1, np.uint64),
            "report": np.zeros(1, np.uint64),
        }
        self.max_context, self.position = max_context, 0

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Run all phases on `tokens`; float32 [tokens, vocab] logits."""
        layout, count = self.layout, len(tokens)
        arrays = dict(self.arrays)
        for name, nbytes in layout.scratch(count).items():
            arrays[name] = aligned(np.full(nbytes, 0xFF, np.uint8))  # NaN
        arrays["token_ids"] = np.array(tokens, np.int32)
        arrays["logits"] = np.full((count, layout.shape.vocab), np.nan, np.float32)
        arrays["barrier"][:] = 0
        given = PrefillArguments(
            **{name: array.ctypes.data for name, array in arrays.items()},
            spin_limit=10**18,
            tokens=count,
            position=self.position,
            max_context=self.max_context,
            first_phase=0,
            end_phase=layout.phases + 1,
            logits_count=count,
            **layout.plan_launch(count, self.position),
        )
        assert self.library.emulate(ctypes.byref(given), layout.blocks), "the kernel hangs"
        self.position += count
        return arrays["logits"]

    def errors(self, reference: State) -> dict[str, list[float]]:
        """Relative error of each part of the state, layer after layer (tests/gpu/state_parts.py)."""
        given = self.arrays["state"].tobytes()

        def read(dtype: Any, count: int, at: int = 0) -> np.ndarray:
            return np.frombuffer(given, dtype, count, at)

        state = SimpleNamespace(position=self.position, capacity=self.max_context, buffer=SimpleNamespace(read=read))
        decoder = SimpleNamespace(shape=self.layout.shape, gpu=SimpleNamespace(capability=(9, 0)))
        return errors(decoder, state, reference)  # type: ignore[arg-type]


def aligned(array: np.ndarray) -> np.ndarray:
    """The same bytes at an address that is a multiple of 1,024."""
    room = np.empty(array.nbytes + 1024, np.uint8)
    start = -room.ctypes.data % 1024
    room[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return room[start : start + array.nbytes]
