"""Which backend runs: with a GPU that is made up, and without one."""

from __future__ import annotations

import dataclasses
import re

import pytest

from onekernel.backend import choose, cuda
from onekernel.checkpoint.sizes import SIZES
from onekernel.cli import main
from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory, UnsupportedModel
from onekernel.gpu.device import Gpu

GIB = 2**30


class MadeUpGpu(Gpu):
    free = 10 * GIB

    def memory_free(self) -> int:
        return self.free


def made_up(shared_memory: int = 227 * 1024, free: int = 10 * GIB) -> Gpu:
    gpu = MadeUpGpu(None, None, "NVIDIA Test", (9, 0), 132, shared_memory, 80 * GIB)
    object.__setattr__(gpu, "free", free)
    return gpu


@pytest.fixture
def with_gpu(monkeypatch):
    def install(gpu: Gpu | Exception) -> None:
        def find() -> Gpu:
            if isinstance(gpu, Exception):
                raise gpu
            return gpu

        monkeypatch.setattr(cuda, "find_gpu", find)
        monkeypatch.setattr(cuda, "compiler_version", lambda: "13.0")

    return install


def test_auto_takes_the_gpu_and_names_it(with_gpu) -> None:
    with_gpu(made_up())
    for shape in (None, SIZES["0.8b"]):
        assert choose.choose("auto", shape) == choose.Choice("cuda", "NVIDIA Test, 10.0 GiB free")
    assert choose.choose("cuda").name == "cuda"


def test_cpu_when_it_is_asked_for_without_a_look_at_the_gpu(with_gpu) -> None:
    with_gpu(AssertionError("nobody asked for the GPU"))
    assert choose.choose("cpu") == choose.Choice("cpu", "it was asked for")


def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_why(with_gpu) -> None:
    with_gpu(BackendError("there is no NVIDIA driver on this machine"))
    assert choose.choose("auto") == choose.Choice("cpu", "there is no NVIDIA driver on this machine")
    with pytest.raises(BackendError, match=r"^the backend cuda cannot run: there is no NVIDIA driver .*; use the"):
        choose.choose("cuda")


def test_auto_takes_the_cpu_where_kernels_cannot_be_compiled(with_gpu, monkeypatch) -> None:
    with_gpu(made_up())

    def missing() -> str:
        raise BackendError("NVRTC, NVIDIA's compiler library, is not installed")

    monkeypatch.setattr(cuda, "compiler_version", missing)
    assert choose.choose("auto") == choose.Choice("cpu", "NVRTC, NVIDIA's compiler library, is not installed")


def test_auto_takes_the_cpu_for_a_model_that_does_not_fit_and_cuda_refuses_it(with_gpu) -> None:
    with_gpu(made_up())
    reason = choose.choose("auto", SIZES["27b"]).reason
    assert choose.choose("auto", SIZES["27b"]).name == "cpu"
    assert re.match(r"this model needs 50\.\d GiB of GPU memory, and 10\.0 GiB are free on NVIDIA Test: ", reason)
    with pytest.raises(NotEnoughMemory, match=r"^this model needs 50\.\d GiB of GPU memory, and 10\.0 GiB are free"):
        choose.choose("cuda", SIZES["27b"])


def test_auto_takes_the_cpu_for_a_shape_that_the_kernel_is_not_written_for(with_gpu) -> None:
    with_gpu(made_up())
    odd = dataclasses.replace(SIZES["0.8b"], hidden=1000)
    assert choose.choose("auto", odd) == choose.Choice(
        "cpu", "the GPU kernel needs hidden = 1000 to be a multiple of 256"
    )
    with pytest.raises(UnsupportedModel, match="hidden = 1000"):
        choose.choose("cuda", odd)


def test_auto_takes_the_cpu_for_a_chip_with_too_little_shared_memory(with_gpu) -> None:
    with_gpu(made_up(shared_memory=48 * 1024))
    choice = choose.choose("auto", SIZES["0.8b"])
    assert choice.name == "cpu"
    assert "bytes of shared memory a block for this model, and the chip has 48128" in choice.reason


def test_memory_needed_is_of_the_chosen_backend(with_gpu) -> None:
    with_gpu(made_up())
    shape = SIZES["0.8b"]
    weights = 2 * 752_393_024
    assert weights < choose.memory_needed("auto", shape) < 1.8 * weights  # 16 bits a weight on the GPU, and scratch
    assert choose.memory_needed("cpu", shape) > 2 * weights  # 32 on the CPU


def test_loading_goes_to_the_chosen_backend(with_gpu, monkeypatch, tmp_path) -> None:
    with_gpu(made_up())
    asked = []
    monkeypatch.setattr(cuda.CudaBackend, "load", lambda *arguments: asked.append(arguments))
    choose.load_backend("auto", tmp_path, SIZES["0.8b"], 248_077, 100)
    assert asked == [(tmp_path, SIZES["0.8b"], 248_077, 100)]


def test_doctor_says_which_backend_and_why(with_gpu, capsys) -> None:
    with_gpu(made_up())
    assert main(["doctor"]) == 0
    assert "backend                 cuda: NVIDIA Test, 10.0 GiB free\n" in capsys.readouterr().out
    with_gpu(BackendError("there is no NVIDIA driver on this machine"))
    assert main(["doctor"]) == 0
    assert "backend                 cpu: there is no NVIDIA driver on this machine\n" in capsys.readouterr().out


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="backend = 'tpu' is unknown: choose one of auto, cpu, cuda"):
        choose.choose("tpu")
