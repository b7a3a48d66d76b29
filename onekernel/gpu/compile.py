"""Compile kernels with NVRTC, for any architecture, with or without a GPU; results are kept in a cache on disk."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from onekernel.cache import cache_folder
from onekernel.errors import BackendError, InvalidRequest

ARCHITECTURES = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_89",
    "sm_90a",
    "sm_100a",
    "sm_103a",
    "sm_110a",
    "sm_120a",
    "sm_121a",
)
ELF = b"\x7fELF"
_IMPORTING = threading.Lock()  # cuda.core's first import is not safe in several threads at once (1.0)


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel."""

    registers: int
    spill_stores: int  # bytes
    spill_loads: int


def compile_cached(source: str, arch: str, name: str) -> bytes:
    """The cubin of `source` for `arch`, see compile_all."""
    return compile_all([source], arch, name)[0]


def compile_all(sources: Sequence[str], arch: str, name: str) -> list[bytes]:
    """The cubins of versions of one kernel, from the cache or compiled now, all at once; one line on stderr says so.

    An entry is named by the hash of source, architecture and compiler version, and carries the hash of its content: a
    damaged one is built again. Writes are atomic, so that several processes may share the cache.

    Raises: see compile_source.
    """
    paths = [cache_path(source, arch) for source in sources]
    cubins = [_read_entry(path) for path in paths]
    missing = [i for i, cubin in enumerate(cubins) if cubin is None]
    if missing:
        what = f"the {name} kernel" if len(missing) == 1 else f"{len(missing)} versions of the {name} kernel"
        print(f"onekernel: compiling {what} for {arch} (once) ...", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        with ThreadPoolExecutor(len(missing)) as compilers:
            made = list(compilers.map(lambda i: compile_source(sources[i], arch, name)[0], missing))
        print(f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        for i, cubin in zip(missing, made, strict=True):
            write_entry(paths[i], cubin)
            cubins[i] = cubin
    return [cubin for cubin in cubins if cubin is not None]


def cache_path(source: str, arch: str) -> Path:
    """The file in the cache that the cubin of `source` for `arch` has or would have."""
    key = hashlib.sha256(f"{arch}\0{compiler_version()}\0{source}".encode()).hexdigest()
    return cache_folder("kernels") / f"{key}.cubin"


def compile_source(source: str, arch: str, name: str) -> tuple[bytes, Resources]:
    """Compile one source string.

    Raises:
        InvalidRequest: NVRTC does not know `arch`.
        BackendError: NVRTC is not installed, or the source is wrong; with the compiler's log.
    """
    check_arch(arch)
    try:
        with _IMPORTING:
            from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise BackendError(f"NVIDIA's Python packages are not installed here ({error})") from None
    from cuda.bindings.nvrtc import nvrtcResult  # noqa: F401  (fails here, not in the middle, where NVRTC is missing)

    log = io.StringIO()
    options = ProgramOptions(arch=arch, std="c++17", name=f"{name}.cu", ptxas_options=["-v"])
    try:
        cubin = bytes(Program(source, "c++", options).compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core raises several kinds, all with the log in their text
        raise BackendError(f"the {name} kernel does not compile for {arch}: {error}\n{log.getvalue()}") from None
    text = log.getvalue()
    registers = re.findall(r"Used (\d+) registers", text)
    stores = re.findall(r"(\d+) bytes spill stores", text)
    loads = re.findall(r"(\d+) bytes spill loads", text)
    return cubin, Resources(max(map(int, registers), default=0), sum(map(int, stores)), sum(map(int, loads)))


def check_arch(arch: str) -> None:
    """Raises InvalidRequest, with the choices, if `arch` is none that we compile for."""
    if arch not in ARCHITECTURES:
        raise InvalidRequest(f"arch = {arch!r} is unknown: choose one of {', '.join(ARCHITECTURES)}")


def compiler_version() -> str:
    """The version of NVRTC, such as 13.0.

    Raises:
        BackendError: there is none.
    """
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise BackendError(f"NVIDIA's Python packages are not installed here ({error})") from None
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except DynamicLibNotFoundError as error:
        raise BackendError(f"NVRTC, NVIDIA's compiler library, is not installed: {error}") from None
    return f"{major}.{minor}"


def _read_entry(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, cubin = data[:32], data[32:]
    return cubin if cubin.startswith(ELF) and hashlib.sha256(cubin).digest() == digest else None


def write_entry(path: Path, cubin: bytes) -> None:
    """Keep a cubin, at once or not at all; where that is not possible, a line on stderr says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, path)
    except OSError as error:
        print(f"onekernel: the compiled kernel cannot be kept ({error})", file=sys.stderr)
