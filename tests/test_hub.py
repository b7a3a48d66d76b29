"""From a name to a folder: local ones, the demo, and downloads from a fake hub that speaks the real protocol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub, serving
from huggingface_hub import constants

from onekernel.checkpoint import hub
from onekernel.checkpoint.hub import is_complete, list_models, resolve
from onekernel.errors import ModelNotFound

NAME = "some/model"
CHUNK = constants.DOWNLOAD_CHUNK_SIZE  # a broken download goes on from a multiple of this
NEEDED = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",  # equal files would be downloaded once
    "tokenizer.json": b"{  }",
    "tokenizer_config.json": b"{   }",
    "chat_template.jinja": b"hello",
    "model.safetensors-00001-of-00002.safetensors": b"one",
    "model.safetensors-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors-00001-of-00002.safetensors", '
    b'"b": "model.safetensors-00002-of-00002.safetensors"}}',
}
NOT_NEEDED = {
    "README.md": b"",
    "vocab.json": b"[]",
    "merges.txt": b" ",
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "preprocessor_config.json": b"[ ]",
    "onnx/config.json": b"[  ]",
}


@dataclass
class Pulled:
    code: int
    folder: str
    errors: str


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    with serving(NAME, NEEDED | NOT_NEEDED) as server:
        yield server


def start(server: FakeHub, home: Path, model: str = NAME, **environment: str) -> subprocess.Popen[str]:
    """`onekernel pull`, in a process of its own: the library reads its environment when it is imported."""
    command = [sys.executable, "-m", "onekernel", "pull", model]
    environment = server.environment(home, **environment)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pull(server: FakeHub, home: Path, model: str = NAME, **environment: str) -> Pulled:
    process = start(server, home, model, **environment)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return Pulled(process.returncode, output.rstrip("\n"), errors)


def test_only_needed_files_are_asked_for_and_end_up_in_the_cache(fake_hub: FakeHub, tmp_path: Path) -> None:
    pulled = pull(fake_hub, tmp_path)
    assert pulled.code == 0, pulled.errors
    folder = Path(pulled.folder)
    assert folder == tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert fake_hub.downloaded == set(NEEDED)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED
    assert "Fetching 8 files: 100%" in pulled.errors  # the progress bar


def test_what_is_in_the_cache_is_not_downloaded_again(fake_hub: FakeHub, tmp_path: Path) -> None:
    first = pull(fake_hub, tmp_path)
    fake_hub.asked.clear()
    assert pull(fake_hub, tmp_path).folder == first.folder
    assert fake_hub.downloaded == set()
    fake_hub.asked.clear()
    assert pull(fake_hub, tmp_path, HF_HUB_OFFLINE="1").folder == first.folder
    assert fake_hub.asked == []
    fake_hub.status = 503  # the hub is down
    assert pull(fake_hub, tmp_path).folder == first.folder


def test_a_revision_is_respected(fake_hub: FakeHub, tmp_path: Path) -> None:
    assert pull(fake_hub, tmp_path, f"{NAME}@v1").code == 0
    pulled = pull(fake_hub, tmp_path, f"{NAME}@v2")
    assert pulled.code == 1
    assert pulled.errors == "onekernel: some/model has no revision 'v2': leave @v2 out to take the newest\n"


def test_a_broken_connection_is_taken_up_where_it_broke(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.files["model.safetensors-00001-of-00002.safetensors"] = data = os.urandom(3 * CHUNK)
    fake_hub.cut_after["model.safetensors-00001-of-00002.safetensors"] = 2 * CHUNK + 5
    pulled = pull(fake_hub, tmp_path)
    assert pulled.code == 0, pulled.errors
    assert (Path(pulled.folder) / "model.safetensors-00001-of-00002.safetensors").read_bytes() == data
    assert f"bytes={2 * CHUNK}-" in [wanted for _, _, wanted in fake_hub.asked]


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers ctrl-C to the whole console")
def test_an_interrupted_pull_can_be_finished_by_another_one(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.files["model.safetensors-00001-of-00002.safetensors"] = data = os.urandom(3 * CHUNK)
    fake_hub.cut_after["model.safetensors-00001-of-00002.safetensors"] = 2 * CHUNK + 5
    fake_hub.stall = True
    process = start(fake_hub, tmp_path)
    try:
        assert fake_hub.stalled.wait(60)
        while len(list(tmp_path.rglob("snapshots/*/*"))) < len(NEEDED) - 1:  # the other files
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.endswith("\nonekernel: interrupted\n")
    assert list(tmp_path.rglob("*.incomplete")) == []

    offline = pull(fake_hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.code == 1
    assert "or only a part of it, and HF_HUB_OFFLINE is set" in offline.errors
    fake_hub.asked.clear()
    pulled = pull(fake_hub, tmp_path)
    assert pulled.code == 0, pulled.errors
    assert (Path(pulled.folder) / "model.safetensors-00001-of-00002.safetensors").read_bytes() == data
    assert fake_hub.downloaded == {"model.safetensors-00001-of-00002.safetensors"}  # the others were complete


def test_offline_and_not_cached_says_what_to_do(fake_hub: FakeHub, tmp_path: Path) -> None:
    pulled = pull(fake_hub, tmp_path, HF_HUB_OFFLINE="1")
    assert pulled.code == 1
    assert pulled.errors == (
        "onekernel: some/model is not on this machine, or only a part of it, and HF_HUB_OFFLINE is set. With a "
        "network, run `onekernel pull some/model` without HF_HUB_OFFLINE; without one, copy the model's folder here "
        "and pass its path. `--model demo` works without either.\n"
    )
    assert fake_hub.asked == []


def test_no_network_and_not_cached_says_what_to_do(tmp_path: Path) -> None:
    with serving(NAME, NEEDED) as gone:
        pass
    pulled = pull(gone, tmp_path)
    assert pulled.code == 1
    assert (
        "and the hub cannot be reached (ConnectError). With a network, run `onekernel pull some/model`" in pulled.errors
    )


@pytest.mark.parametrize(("status", "words"), [(401, "answers 401: check HF_TOKEN"), (500, "the hub answers 500.")])
def test_a_hub_that_refuses_is_quoted(fake_hub: FakeHub, tmp_path: Path, status: int, words: str) -> None:
    fake_hub.status = status
    assert words in pull(fake_hub, tmp_path).errors


def test_a_private_model_needs_the_token(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.token = "secret"
    refused = pull(fake_hub, tmp_path)
    assert refused.code == 1
    assert "the hub has no model some/model that you may see. (A private model needs HF_TOKEN.)" in refused.errors
    assert pull(fake_hub, tmp_path, HF_TOKEN="secret").code == 0


@pytest.mark.parametrize("lacking", ["tokenizer.json", "config.json", "model.safetensors-00002-of-00002.safetensors"])
def test_a_repository_that_is_no_model_is_refused(fake_hub: FakeHub, tmp_path: Path, lacking: str) -> None:
    del fake_hub.files[lacking]
    pulled = pull(fake_hub, tmp_path)
    assert pulled.code == 1
    assert "some/model has not all of config.json, tokenizer.json and *.safetensors" in pulled.errors


@pytest.fixture
def hub_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Replaces the download; what it returns or raises is `result`, how it was called stands beside that."""
    call: dict[str, object] = {"result": tmp_path}

    def snapshot_download(name: str, **arguments: object) -> str:
        call.update(name=name, **arguments)
        if isinstance(call["result"], Exception):
            raise call["result"]
        return str(call["result"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return call


def test_the_hub_is_asked_with_patterns_and_the_revision(hub_call: dict[str, object], tmp_path: Path) -> None:
    for name, data in NEEDED.items():
        (tmp_path / name).write_bytes(data)
    assert resolve("owner/name@abc", download=False) == tmp_path
    assert hub_call["name"] == "owner/name"
    assert hub_call["revision"] == "abc"
    assert hub_call["local_files_only"] is True
    assert resolve("owner/name") == tmp_path
    assert hub_call["revision"] is None
    assert hub_call["local_files_only"] is False


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"cannot be stored in .*No space left on device.*HF_HOME"),
        (PermissionError(13, "Permission denied"), r"cannot be stored in .*Permission denied"),
        (TimeoutError("slow"), r"the hub cannot be reached \(TimeoutError\)"),
        (ConnectionResetError("gone"), r"the hub cannot be reached \(ConnectionResetError\)"),
    ],
)
def test_a_full_disk_is_not_taken_for_a_missing_network(
    hub_call: dict[str, object], error: Exception, message: str
) -> None:
    hub_call["result"] = error
    with pytest.raises(ModelNotFound, match=message):
        resolve("owner/name")


def test_downloads_that_were_not_asked_for_say_so(hub_call: dict[str, object]) -> None:
    with pytest.raises(ModelNotFound, match="downloads were not asked for"):
        resolve("owner/name", download=False)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve("~/models") == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")  # before the hub


def test_the_demo_is_in_the_package() -> None:
    assert resolve("demo") == Path(hub.__file__).parent.parent / "demo"
    assert is_complete(resolve("demo"))


def test_a_demo_that_was_not_installed_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "files", lambda _: tmp_path)
    with pytest.raises(ModelNotFound, match=r"demo model is missing from this installation .*; reinstall onekernel"):
        resolve("demo")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dmeo", "Did you mean 'demo'"),
        ("Qwen3.5-0.8", "Did you mean 'Qwen3.5-0.8B'"),
        ("./nowhere", ""),
        ("~nobody-here/models", ""),
        ("a/b/c", ""),
        ("", ""),
    ],
)
def test_a_name_that_cannot_be_a_model_is_explained(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound, match=rf"there is no model '{name}': it is neither 'demo', nor a folder.*{hint}"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFound, match="is a file; give the folder that holds"):
        resolve(str(tmp_path / "model.gguf"))


def test_models_of_the_cache_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    whole = tmp_path / "models--Qwen--Qwen3.5-0.8B" / "snapshots" / "abc"
    part = tmp_path / "models--Qwen--Qwen3.5-4B" / "snapshots" / "def"
    for folder, lacking in ((whole, None), (part, "model.safetensors-00002-of-00002.safetensors")):
        folder.mkdir(parents=True)
        for name, data in NEEDED.items():
            if name != lacking:
                (folder / name).write_bytes(data)
    (tmp_path / "models--other--model").mkdir()
    listed = {model.name: model for model in list_models()}
    assert list(listed) == ["demo", "Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-4B"]
    assert listed["Qwen/Qwen3.5-0.8B"].complete
    assert listed["Qwen/Qwen3.5-0.8B"].nbytes == sum(map(len, NEEDED.values()))
    assert listed["Qwen/Qwen3.5-0.8B"].path == whole
    assert not listed["Qwen/Qwen3.5-4B"].complete
