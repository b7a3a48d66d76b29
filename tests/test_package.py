"""The wheel carries everything that the package needs where it is installed, and nothing that is heavy."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel

ROOT = Path(__file__).parent.parent
LARGEST = 17 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_wheel(str(folder))
    assert name.endswith("-py3-none-any.whl")
    assert (folder / name).stat().st_size < LARGEST
    return zipfile.ZipFile(folder / name)


def test_every_file_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "onekernel").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packed == files
    kinds = {name.rsplit(".", 1)[-1] for name in packed}
    assert {"py", "typed", "cu", "cuh", "safetensors", "json", "jinja", "md"} <= kinds


def test_the_demo_model_is_whole(wheel: zipfile.ZipFile) -> None:
    for path in (ROOT / "onekernel" / "demo").iterdir():
        assert wheel.read(f"onekernel/demo/{path.name}") == path.read_bytes()


def test_the_command_and_the_licence_are_there(wheel: zipfile.ZipFile) -> None:
    by_end = {name.split(".dist-info/")[-1]: name for name in wheel.namelist()}
    assert "onekernel = onekernel.cli:main" in wheel.read(by_end["entry_points.txt"]).decode()
    assert "Apache License" in wheel.read(by_end["licenses/LICENSE"]).decode()


def test_nothing_heavy_is_required_to_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert required.isdisjoint({"torch", "transformers", "safetensors", "ml-dtypes", "numba", "cupy", "triton"})
