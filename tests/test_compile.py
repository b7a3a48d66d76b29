"""Every kernel compiles for every architecture, within its registers; and the cache of compiled kernels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES
from onekernel.cli import main
from onekernel.errors import BackendError, InvalidRequest
from onekernel.gpu import compile as compiler
from onekernel.gpu.batch_decoder import batch_source
from onekernel.gpu.batch_layout import BatchLayout
from onekernel.gpu.chips import CHIPS
from onekernel.gpu.compile import ARCHITECTURES, compile_all, compile_cached, compile_source
from onekernel.gpu.kernel import decode_source
from onekernel.gpu.layout import Layout
from onekernel.gpu.prefill_layout import PrefillLayout
from onekernel.gpu.prefiller import prefill_source

if sys.platform == "darwin":
    pytest.skip("NVIDIA publishes no packages for macOS", allow_module_level=True)

# What differs between architectures is the instructions (sm_75, from sm_80 on, from sm_90 on) and the room: registers
# of a thread, stages of the ring. So one size is compiled for all, each size for a chip with little room and one with
# much, and the sizes that need most where there is least. `onekernel compile --arch all` does the rest.
CASES = [
    *(("0.8b", arch) for arch in ARCHITECTURES),
    *((name, arch) for name in ("demo", "2b", "4b", "9b", "27b") for arch in ("sm_86", "sm_90a")),
    *(("demo", "sm_75"), ("9b", "sm_75"), ("27b", "sm_120a"), ("0.8b untied", "sm_90a")),
]
REGISTERS = 168  # of 65,536 for 12 warps; on sm_90 and later the producers give theirs to the consumers
# Bytes of instructions that store to and load from local memory: none or next to none where it was tuned, elsewhere the
# largest measured and about a quarter more.
TUNED = {**{(n, "sm_90a"): 0 for n in ("demo", "0.8b", "0.8b untied")}, ("2b", "sm_90a"): 24, ("9b", "sm_90a"): 8}
SPILLS = {"sm_75": 3000, "sm_80": 1100, "sm_86": 3900, "sm_87": 2400, "sm_89": 1000, "sm_90a": 600}
SPILLS |= {"sm_100a": 2250, "sm_103a": 2250, "sm_110a": 3800, "sm_120a": 6200, "sm_121a": 5600}


def shape_of(name: str) -> Shape:
    if name == "demo":
        return Shape.load(hub.resolve("demo"))
    size, _, tied = name.partition(" ")
    return dataclasses.replace(SIZES[size], tied=tied == "tied") if tied else SIZES[size]


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_decode_kernel_compiles_within_its_registers(name: str, arch: str) -> None:
    chip = CHIPS[arch]
    layout = Layout.plan(shape_of(name), 1000, chip.sm_count, chip.shared_memory)
    cubin, resources = compile_source(decode_source(layout), arch, "decode")
    assert cubin.startswith(compiler.ELF)
    assert 0 < resources.registers <= REGISTERS
    spills = resources.spill_stores + resources.spill_loads
    assert spills <= TUNED.get((name, arch), SPILLS[arch]), resources


# The shared memory of sm_75 is too small for it.
PREFILL_CASES = [
    *(("demo", arch) for arch in ARCHITECTURES if arch != "sm_75"),
    *((name, arch) for name in ("0.8b", "27b") for arch in ("sm_86", "sm_90a")),
]


@pytest.mark.parametrize(("name", "arch"), PREFILL_CASES)
def test_prefill_kernel_compiles_within_its_registers(name: str, arch: str) -> None:
    chip = CHIPS[arch]
    layout = Layout.plan(shape_of(name), 1000, chip.sm_count, chip.shared_memory)
    plans = PrefillLayout.plans(layout, chip.sm_count, chip.shared_memory, arch)
    assert len(plans) == (2 if arch == "sm_90a" else 1)
    for plan in plans:
        cubin, resources = compile_source(prefill_source(plan), arch, "prefill")
        assert cubin.startswith(compiler.ELF)
        assert 0 < resources.registers <= REGISTERS
        assert resources.spill_stores + resources.spill_loads <= 600, resources


# The shared memory of sm_75 is too small for it, too.
BATCH_CASES = [
    *(("0.8b", arch, 8) for arch in ARCHITECTURES if arch != "sm_75"),
    *((name, "sm_90a", bucket) for name in ("demo", "0.8b", "27b") for bucket in (64, 256)),
    *(("0.8b", arch, 64) for arch in ("sm_80", "sm_86", "sm_120a")),
]


@pytest.mark.parametrize(("name", "arch", "bucket"), BATCH_CASES)
def test_batch_kernel_compiles_within_its_registers(name: str, arch: str, bucket: int) -> None:
    chip = CHIPS[arch]
    layout = BatchLayout.plan(Layout.plan(shape_of(name), 1000, chip.sm_count, chip.shared_memory), bucket)
    cubin, resources = compile_source(batch_source(layout), arch, "batch")
    assert cubin.startswith(compiler.ELF)
    assert 0 < resources.registers <= REGISTERS
    assert resources.spill_stores + resources.spill_loads <= (1000 if arch == "sm_90a" else 2700), resources


def test_layout_that_counts_too_little_shared_memory_does_not_compile() -> None:
    chip = CHIPS["sm_90a"]
    layout = Layout.plan(SIZES["0.8b"], 1000, chip.sm_count, chip.shared_memory)
    with pytest.raises(BackendError, match=r"(?s)does not compile for sm_90a.*Layout\.plan counts less shared memory"):
        compile_source(decode_source(dataclasses.replace(layout, ring_stages=16)), "sm_90a", "decode")


KERNEL = 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] += %d; }'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEKERNEL_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures of all real compilations."""
    calls: list[str] = []

    def counting(source: str, arch: str, name: str):
        calls.append(arch)
        return compile_source(source, arch, name)

    monkeypatch.setattr(compiler, "compile_source", counting)
    return calls


def test_second_start_takes_the_kernel_from_the_cache(cache: Path, compiled: list[str], capsys) -> None:
    first = compile_cached(KERNEL % 1, "sm_80", "test")
    assert capsys.readouterr().err.startswith("onekernel: compiling the test kernel for sm_80 (once) ... ")
    assert compile_cached(KERNEL % 1, "sm_80", "test") == first
    assert capsys.readouterr().err == ""
    assert compiled == ["sm_80"]
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]  # nothing half-written is left


def test_versions_are_compiled_together_and_said_in_one_line(cache: Path, compiled: list[str], capsys) -> None:
    one = compile_cached(KERNEL % 1, "sm_80", "test")
    capsys.readouterr()
    three = compile_all([KERNEL % 2, KERNEL % 1, KERNEL % 3], "sm_80", "test")
    said = capsys.readouterr().err
    assert said.startswith("onekernel: compiling 2 versions of the test kernel for sm_80 (once) ... ")
    assert said.count("\n") == 1
    assert three[1] == one
    assert len({*three}) == 3
    assert compile_all([KERNEL % 2, KERNEL % 1, KERNEL % 3], "sm_80", "test") == three
    assert capsys.readouterr().err == ""
    assert len(compiled) == 3


def test_another_source_architecture_or_compiler_is_another_entry(cache: Path, compiled, monkeypatch) -> None:
    compile_cached(KERNEL % 1, "sm_80", "test")
    compile_cached(KERNEL % 2, "sm_80", "test")
    compile_cached(KERNEL % 1, "sm_90a", "test")
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.9")
    compile_cached(KERNEL % 1, "sm_80", "test")
    assert compiled == ["sm_80", "sm_80", "sm_90a", "sm_80"]
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_entry_is_built_again(cache: Path, compiled: list[str], damage: str) -> None:
    whole = compile_cached(KERNEL % 1, "sm_80", "test")
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    data[-100] ^= 1
    entry.write_bytes({"cut": entry.read_bytes()[:500], "flipped": data, "empty": b"", "text": b"hello"}[damage])
    assert compile_cached(KERNEL % 1, "sm_80", "test") == whole
    assert compile_cached(KERNEL % 1, "sm_80", "test") == whole
    assert len(compiled) == 2


def test_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEKERNEL_CACHE", str(tmp_path / "file"))
    assert compile_cached(KERNEL % 1, "sm_80", "test").startswith(compiler.ELF)
    assert "the compiled kernel cannot be kept" in capsys.readouterr().err


def test_several_processes_share_the_cache(cache: Path) -> None:
    """All at once, while damaged entries lie there: each gets a whole kernel, and one whole entry remains."""
    code = (
        "import hashlib, sys\nfrom onekernel.gpu.compile import compile_cached\n"
        "for _ in range(20):\n    cubin = compile_cached(sys.argv[1], 'sm_80', 'test')\n"
        "    assert cubin.startswith(b'\\x7fELF')\nprint(hashlib.sha256(cubin).hexdigest())"
    )
    environment = {**os.environ, "ONEKERNEL_CACHE": str(cache.parent)}
    command = [sys.executable, "-c", code, KERNEL % 1]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert len({output for output, _ in outputs}) == 1
    (entry,) = cache.iterdir()
    assert entry.suffix == ".cubin"


def test_errors_of_the_compiler_name_the_file_and_line() -> None:
    with pytest.raises(BackendError, match=r"(?s)the test kernel does not compile for sm_80: .*layer/mine\.cuh\(7\)"):
        compile_source('#line 7 "layer/mine.cuh"\nint f() { return x; }', "sm_80", "test")


def test_architecture_that_does_not_exist_is_refused_with_the_choices() -> None:
    with pytest.raises(InvalidRequest, match=r"arch = 'sm_60' is unknown: choose one of sm_75, .*sm_121a"):
        compile_source(KERNEL % 1, "sm_60", "test")


def test_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendError, match=r"^NVIDIA's Python packages are not installed here \(.*\)$"):
        compile_source(KERNEL % 1, "sm_80", "test")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"^NVIDIA's Python packages are not installed here \(.*\)$"):
        compiler.compiler_version()


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing() -> None:
        raise DynamicLibNotFoundError("libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(BackendError, match=r"^NVRTC, NVIDIA's compiler library, is not installed: "):
        compiler.compiler_version()


def test_compile_verb_fills_the_cache_without_a_gpu(cache: Path, compiled: list[str], capsys) -> None:
    assert main(["compile", "--model", "demo", "--arch", "sm_86", "--arch", "sm_90a", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(r["kernel"], r["arch"], r["chip"]) for r in results] == [
        ("decode", "sm_86", "GeForce RTX 3090"),
        ("prefill", "sm_86", "GeForce RTX 3090"),
        ("decode", "sm_90a", "H100 and H200 SXM"),
        ("prefill", "sm_90a", "H100 and H200 SXM"),
        ("prefill", "sm_90a", "H100 and H200 SXM"),
    ]
    assert all(r["registers"] > 0 and r["seconds"] > 0 and Path(r["file"]).parent == cache for r in results)
    # The entries are those that a start on exactly that chip looks for.
    from onekernel.text.tokenizer import Tokenizer

    chip = CHIPS["sm_90a"]
    vocabulary_size = Tokenizer.load(hub.resolve("demo")).size
    layout = Layout.plan(shape_of("demo"), vocabulary_size, chip.sm_count, chip.shared_memory)
    compile_cached(decode_source(layout), "sm_90a", "decode")
    for plan in PrefillLayout.plans(layout, chip.sm_count, chip.shared_memory, "sm_90a"):
        compile_cached(prefill_source(plan), "sm_90a", "prefill")
    assert compiled == ["sm_86", "sm_86", "sm_90a", "sm_90a", "sm_90a"]  # no second time


def test_compile_verb_says_where_a_chip_does_without_the_prefill_kernel(cache: Path, capsys) -> None:
    assert main(["compile", "--model", "demo", "--arch", "sm_75"]) == 0
    output = capsys.readouterr()
    assert [line.split()[0] for line in output.out.splitlines()] == ["decode"]
    assert "no prefill kernel for sm_75: its shared memory is too small" in output.err


def test_compile_verb_compiles_for_many_sequences_on_request(cache: Path, capsys) -> None:
    assert main(["compile", "--model", "demo", "--arch", "sm_90a", "--sequences", "9", "--json"]) == 0
    kernels = [result["kernel"] for result in json.loads(capsys.readouterr().out)]
    assert kernels == ["decode", "prefill", "prefill", "batch", "batch"]  # for up to 8 and up to 16
    assert main(["compile", "--model", "demo", "--arch", "sm_90a", "--sequences", "257"]) != 0
    assert "257" in capsys.readouterr().err


def test_compile_verb_says_what_it_needs(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["compile", "--arch", "sm_60"]) == 2
    assert "arch = 'sm_60' is unknown" in capsys.readouterr().err

    def no_gpu() -> None:
        raise BackendError("there is no NVIDIA driver on this machine")

    monkeypatch.setattr("onekernel.gpu.device.find_gpu", no_gpu)
    assert main(["compile"]) == 1
    assert capsys.readouterr().err == (
        "onekernel: there is no NVIDIA driver on this machine; name an architecture: --arch sm_86, or --arch all\n"
    )
