"""From the name of a model to the folder that holds it: `demo`, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from onekernel.checkpoint.weights import weight_files
from onekernel.errors import CheckpointError, ModelNotFound

DEMO = "demo"
KNOWN_MODELS = {  # hub name -> parameters of the language model
    "Qwen/Qwen3.5-0.8B": 752_393_024,
    "Qwen/Qwen3.5-2B": 1_881_825_088,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "Qwen/Qwen3.5-27B": 26_895_998_464,
    "Qwen/Qwen3.6-27B": 26_895_998_464,
}
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str
    path: Path
    nbytes: int
    complete: bool


def resolve(model: str, *, download: bool = True) -> Path:
    """The folder of `model`, downloading what is missing.

    With a progress bar. A connection that breaks is taken up where it broke; files that are complete are never
    downloaded again, so a download that was interrupted goes on with the next file.

    Args:
        model: "demo", the path of a folder, or a hub name "owner/name", with "@revision" if wanted.
        download: False looks into the cache only.

    Raises:
        ModelNotFound: there is no such model, or it cannot be reached; the message says what to do.
    """
    if model == DEMO:
        return demo_folder()
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFound(f"{model} is a file; give the folder that holds config.json and the *.safetensors files")
    name, _, revision = model.partition("@")
    if model.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(name):
        close = difflib.get_close_matches(model, [DEMO, *KNOWN_MODELS, *(n.split("/")[1] for n in KNOWN_MODELS)], 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ModelNotFound(
            f"there is no model {model!r}: it is neither 'demo', nor a folder on this machine, nor a hub name like "
            f"Qwen/Qwen3.5-0.8B.{hint}"
        )
    return _snapshot(name, revision or None, download)


def demo_folder() -> Path:
    folder = Path(str(files("onekernel"))) / DEMO
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"the demo model is missing from this installation ({folder}); reinstall onekernel")
    return folder


def _snapshot(name: str, revision: str | None, download: bool) -> Path:
    # Imported here: it takes a while, and the demo model and local folders do not need it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # What a broken connection raises in the HTTP client that the library uses: its own errors derive from it.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]

    def fetch(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(NEEDED_FILES), local_files_only=local_files_only
            )
        )

    offline = constants.HF_HUB_OFFLINE
    try:
        folder = fetch(local_files_only=offline or not download)
    except GatedRepoError:
        raise ModelNotFound(
            f"{name} asks for permission: accept its terms on its page, then set HF_TOKEN to your access token"
        ) from None
    except RepositoryNotFoundError:
        close = difflib.get_close_matches(name, KNOWN_MODELS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ModelNotFound(
            f"the hub has no model {name} that you may see.{hint} (A private model needs HF_TOKEN.)"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{name} has no revision {revision!r}: leave @{revision} out to take the newest") from None
    except HFValidationError as error:
        raise ModelNotFound(f"{name!r} cannot be the name of a model on the hub: {error}") from None
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError, transport_error) as error:
        raise ModelNotFound(_unreachable(name, offline, download, error)) from None
    except OSError as error:
        raise ModelNotFound(
            f"{name} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror or error}): make room or permit "
            f"writing there, or set HF_HOME to another folder; then run `onekernel pull {name}` again"
        ) from None
    if not is_complete(folder):
        if offline or not download:
            raise ModelNotFound(_unreachable(name, offline, download, None))
        raise ModelNotFound(
            f"{name} has not all of config.json, tokenizer.json and *.safetensors ({folder}): it is not a model in "
            "Hugging Face format, or the hub could not be reached to finish its download"
        )
    return folder


def _unreachable(name: str, offline: bool, download: bool, error: Exception | None) -> str:
    if offline:
        why = "HF_HUB_OFFLINE is set"
    elif not download:
        why = "downloads were not asked for"
    else:
        cause = (error and error.__cause__) or error  # of "not found in the cache", say, that there is no network
        status = getattr(getattr(cause, "response", None), "status_code", None)
        why = f"the hub answers {status}" if status else f"the hub cannot be reached ({type(cause).__name__})"
        why += ": check HF_TOKEN" if status in (401, 403) else ""
    return (
        f"{name} is not on this machine, or only a part of it, and {why}. With a network, run `onekernel pull {name}`"
        f"{' without HF_HUB_OFFLINE' if offline else ''}; without one, copy the model's folder here and pass its path. "
        "`--model demo` works without either."
    )


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a config, a tokenizer and every weight file that it should."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def list_models() -> list[LocalModel]:
    """The demo model and the Qwen3.5 models in the hub cache (HF_HOME), without touching the network."""
    from huggingface_hub import constants

    models = []
    with contextlib.suppress(ModelNotFound):
        models.append(_local(DEMO, demo_folder()))
    cache = Path(os.path.expanduser(constants.HF_HUB_CACHE))
    for name in KNOWN_MODELS:
        snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
        if snapshots.is_dir():
            models += [_local(name, folder) for folder in sorted(snapshots.iterdir()) if folder.is_dir()]
    return models


def partial_files() -> set[Path]:
    """The files in the hub cache that downloads, running or killed, have not completed."""
    from huggingface_hub import constants

    return set(Path(os.path.expanduser(constants.HF_HUB_CACHE)).glob("models--*/blobs/*.incomplete"))


def _local(name: str, folder: Path) -> LocalModel:
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return LocalModel(name, folder, nbytes, is_complete(folder))
