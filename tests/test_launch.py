"""Starting clients: the generated configuration, what reaches the client, and what stays as it was."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from onekernel.cli import main
from onekernel.launch.client import Server
from onekernel.launch.clients import CLIENTS
from onekernel.launch.run import environment

SERVER = Server("http://127.0.0.1:8123", "Qwen/Qwen3.5-9B", 131_072, "secret-key")
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = os.environ.get("CODEX_HOME") or os.environ["HERMES_HOME"]
files = {{path.name: path.read_text() for path in pathlib.Path(folder).iterdir()}}
report = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "files": files, "folder": folder}}
pathlib.Path(os.environ["REPORT"]).write_text(json.dumps(report))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def listed() -> Iterator[tuple[str, list[dict[str, Any]], list[str]]]:
    """A server that lists models: (its address, the list to change, the authorization headers it got)."""
    models: list[dict[str, Any]] = [{"id": "demo", "object": "model", "context_length": 70_000}]
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("authorization", ""))
            if self.path != "/v1/models" or (seen[-1] not in ("", "Bearer good")):
                self.send_error(401 if self.path == "/v1/models" else 404)
                return
            body = json.dumps({"object": "list", "data": models}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", models, seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs named codex and hermes that write down how they were started; gives the file with the report."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("codex", "hermes"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("REPORT", str(tmp_path / "report.json"))
    return tmp_path / "report.json"


def texts(value: object) -> Iterator[str]:
    """All strings and numbers anywhere in a parsed file."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    else:
        yield str(value)


def exit_code(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as exit:  # argparse's way
        return exit.code


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_told_address_model_key_and_context(name: str, tmp_path: Path) -> None:
    setup = CLIENTS[name].setup(SERVER, tmp_path)
    told = list(setup.environment.values())
    for path, content in setup.files.items():
        assert not Path(path).is_absolute()
        assert ".." not in path
        if content:
            told += texts(tomllib.loads(content) if path.endswith(".toml") else json.loads(content))
    address = SERVER.url if name == "claude" else SERVER.openai_url
    assert address in told
    assert SERVER.key in told
    assert any(text.endswith(SERVER.model) for text in told)
    if name != "openwebui":  # it does not count tokens
        assert str(SERVER.context) in told
    # Its state is kept in the temporary folder, which an environment variable names.
    assert any(str(tmp_path) in value for value in setup.environment.values())
    assert all("~" not in text for text in told)


def test_codex_reads_its_catalogue(tmp_path: Path) -> None:
    setup = CLIENTS["codex"].setup(SERVER, tmp_path)
    config = tomllib.loads(setup.files["config.toml"])
    assert config["model_providers"][config["model_provider"]]["wire_api"] == "responses"
    assert config["model_catalog_json"] == str(tmp_path / "catalogue.json")
    [entry] = json.loads(setup.files["catalogue.json"])["models"]
    assert entry["slug"] == config["model"]
    assert entry["context_window"] == SERVER.context
    assert config["features"]["daemon_auto_start"] is False


def test_accounts_of_the_user_are_not_passed_on(tmp_path: Path) -> None:
    own = {
        "ANTHROPIC_API_KEY": "sk-ant-real",
        "CLAUDE_CODE_USE_BEDROCK": "1",
        "ANTHROPIC_BASE_URL": "https://elsewhere.example",
        "PATH": "/bin",
        "NO_PROXY": "intern.example",
    }
    client = CLIENTS["claude"]
    passed = environment(client, client.setup(SERVER, tmp_path), own)
    assert "ANTHROPIC_API_KEY" not in passed
    assert "CLAUDE_CODE_USE_BEDROCK" not in passed
    assert passed["ANTHROPIC_BASE_URL"] == SERVER.url
    assert passed["PATH"] == "/bin"
    assert passed["NO_PROXY"] == "intern.example,127.0.0.1,localhost,::1"


def test_every_client_keeps_its_own_variables_to_itself(tmp_path: Path) -> None:
    for client in CLIENTS.values():
        assert client.owned
        own = {f"{beginning}ANYTHING": "x" for beginning in client.owned}
        assert not own.keys() & environment(client, client.setup(SERVER, tmp_path), own).keys()


def test_launch_runs_the_client_and_removes_its_configuration(listed, installed: Path, tmp_path, monkeypatch) -> None:
    address, _, _ = listed
    monkeypatch.setenv("CODE", "7")
    assert main(["launch", "codex", "--url", address, "--", "exec", "--json", "say -- this"]) == 7
    report = json.loads(installed.read_text())
    assert report["arguments"] == ["exec", "--json", "say -- this"]
    assert f'base_url = "{address}/v1"' in report["files"]["config.toml"]
    assert report["folder"].startswith(str(tmp_path / "cache" / "onekernel" / "launch"))
    assert not Path(report["folder"]).exists()
    assert stat.S_IMODE(os.stat(Path(report["folder"]).parent).st_mode) == 0o700


def test_launch_without_arguments_starts_the_usual_way(listed, installed: Path) -> None:
    address, _, seen = listed
    assert main(["launch", "hermes", "--url", f"{address}/v1/", "--key", "good"]) == 0
    report = json.loads(installed.read_text())
    assert report["arguments"] == []
    assert '"api_key": "good"' in report["files"]["config.yaml"]
    assert seen == ["Bearer good"]


def test_sigterm_ends_the_client_and_removes_its_configuration(listed, installed: Path, tmp_path: Path) -> None:
    address, _, _ = listed
    started = tmp_path / "started"
    waits = f"#!/bin/sh\ntrap 'exit 9' TERM\necho $CODEX_HOME > {started}\nwhile true; do /bin/sleep 0.05; done\n"
    (tmp_path / "bin" / "codex").write_text(waits)
    command = [sys.executable, "-m", "onekernel", "launch", "codex", "--url", address]
    with subprocess.Popen(command) as process:
        end = time.monotonic() + 20
        while not (started.exists() and started.read_text().strip()):
            assert time.monotonic() < end, "the client did not start"
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 9
    assert not Path(started.read_text().strip()).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["pi"], 1, "Pi is not installed (pi is not on PATH): npm install -g @earendil-works/pi-coding-agent"),
        (["codex", "--key", "bad"], 1, "wants an API key"),
        (["codex", "--model", "gpt"], 2, "has no model 'gpt', but demo"),
        (["codex", "--url", "127.0.0.1"], 2, "must start with http://"),
        (["codex", "--url", "http://127.0.0.1:1"], 1, "start one with `onekernel serve`"),
        (["emacs"], 2, "invalid choice: 'emacs'"),
    ],
)
def test_launch_says_what_to_do(arguments, code, sentence, listed, installed, capsys) -> None:
    address, _, _ = listed
    name, *options = arguments
    with_url = ["--url", address] if "--url" not in options else []
    assert exit_code(["launch", name, *with_url, *options]) == code
    assert sentence in capsys.readouterr().err
    assert not installed.exists()


def test_a_context_too_small_for_the_client_is_said_before_it_starts(listed, installed, capsys) -> None:
    address, models, _ = listed
    models[0]["context_length"] = 32_768
    assert main(["launch", "hermes", "--url", address]) == 2
    assert "needs a context of 64000 tokens, but the server has 32768" in capsys.readouterr().err
    assert not installed.exists()


def test_a_server_that_lists_no_models_is_named(listed, installed, capsys) -> None:
    address, models, _ = listed
    models.clear()
    assert main(["launch", "codex", "--url", address]) == 1
    assert "has no model" in capsys.readouterr().err
