"""One clear sentence for every way in which there is no GPU to use. The driver is made up."""

from __future__ import annotations

import sys

import pytest

from onekernel.errors import BackendError, NotEnoughMemory
from onekernel.gpu import device
from onekernel.gpu.compile import ARCHITECTURES
from onekernel.gpu.driver import LOST, check

if sys.platform == "darwin":
    pytest.skip("NVIDIA publishes no packages for macOS", allow_module_level=True)
from cuda.bindings import driver

SUCCESS = driver.CUresult.CUDA_SUCCESS


@pytest.fixture
def made_up_driver(monkeypatch):
    """A function that installs a driver with one GPU; what is given replaces an answer."""

    def install(capability=(9, 0), **answers) -> None:
        kind = driver.CUdevice_attribute
        attributes = {
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: capability[0],
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: capability[1],
            kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
            kind.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 232448,
        }
        usual = {
            "cuInit": (SUCCESS,),
            "cuDriverGetVersion": (SUCCESS, 13000),
            "cuDeviceGetCount": (SUCCESS, 1),
            "cuDeviceGet": (SUCCESS, 0),
            "cuDeviceGetName": (SUCCESS, b"NVIDIA Test\0\0  "),
            "cuDevicePrimaryCtxRetain": (SUCCESS, "context"),
            "cuCtxSetCurrent": (SUCCESS,),
            "cuDeviceTotalMem": (SUCCESS, 80 * 2**30),
            "cuMemGetInfo": (SUCCESS, 70 * 2**30, 80 * 2**30),
        }
        for name, answer in {**usual, **answers}.items():
            monkeypatch.setattr(driver, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(driver, "cuGetErrorName", lambda status: (SUCCESS, status.name.encode()))
        monkeypatch.setattr(driver, "cuGetErrorString", lambda _: (SUCCESS, b"what it means"))
        monkeypatch.setattr(driver, "cuDeviceGetAttribute", lambda which, _: (SUCCESS, attributes[which]))

    return install


def problem() -> str:
    with pytest.raises(BackendError) as caught:
        device.find_gpu()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_gpu_is_described(made_up_driver) -> None:
    made_up_driver()
    gpu = device.find_gpu()
    assert (gpu.name, gpu.arch, gpu.sm_count, gpu.shared_memory) == ("NVIDIA Test", "sm_90a", 132, 232448)
    described = device.describe()
    assert described["compute_capability"] == "9.0 (sm_90a)"
    assert described["memory_free"] == 70 * 2**30


def test_missing_packages(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert problem().startswith("NVIDIA's Python packages are not installed here")


def test_no_driver(monkeypatch) -> None:
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing(_):
        raise DynamicLibNotFoundError("libcuda")

    monkeypatch.setattr(driver, "cuInit", missing)
    assert problem() == "there is no NVIDIA driver on this machine"
    assert device.describe()["problem"] == problem()


def test_no_gpu(made_up_driver) -> None:
    made_up_driver(cuInit=(driver.CUresult.CUDA_ERROR_NO_DEVICE,))
    assert problem() == "the NVIDIA driver finds no GPU (is one hidden by CUDA_VISIBLE_DEVICES?)"


def test_driver_that_is_too_old(made_up_driver) -> None:
    made_up_driver(cuDriverGetVersion=(SUCCESS, 12040))
    assert problem() == ("the NVIDIA driver supports CUDA 12.4, and onekernel needs 13.0: install driver 580 or newer")


def test_driver_that_fails_otherwise(made_up_driver) -> None:
    made_up_driver(cuInit=(driver.CUresult.CUDA_ERROR_SYSTEM_NOT_READY,))
    assert problem().startswith("the GPU failed (CUDA_ERROR_SYSTEM_NOT_READY: what it means)")


def test_gpu_that_is_not_there(made_up_driver) -> None:
    made_up_driver()
    with pytest.raises(BackendError, match="GPU 3 was asked for, but there are 1"):
        device.find_gpu(3)


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)])
def test_chip_that_is_too_old(made_up_driver, capability) -> None:
    made_up_driver(capability)
    version = ".".join(map(str, capability))
    assert problem().startswith(f"NVIDIA Test has compute capability {version}, and onekernel needs 7.5 (Turing)")


def test_chip_that_is_not_known_yet(made_up_driver) -> None:
    made_up_driver((13, 0))
    assert "has compute capability 13.0, which this version of onekernel does not know: it compiles for" in problem()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_found(made_up_driver, arch: str) -> None:
    number = arch.removeprefix("sm_").rstrip("a")
    made_up_driver((int(number[:-1]), int(number[-1])))
    assert device.find_gpu().arch == arch


def test_driver_errors_say_whether_the_process_can_go_on(made_up_driver) -> None:
    made_up_driver()
    assert check((SUCCESS,)) is None
    assert check((SUCCESS, 5)) == 5
    assert check((SUCCESS, 5, 6)) == (5, 6)
    with pytest.raises(NotEnoughMemory, match=r"the GPU has no memory left .*CUDA_ERROR_OUT_OF_MEMORY"):
        check((driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,))
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        check((driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,))
    assert str(caught.value).endswith(LOST)
    with pytest.raises(BackendError, match=r"CUDA_ERROR_INVALID_VALUE.*load the model again"):
        check((driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
