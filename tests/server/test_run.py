"""Starting the server, and what its command line says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from serving import ServerThread, scripted_model

from onekernel.cli import main, make_parser
from onekernel.cli.serve import to_settings
from onekernel.errors import BackendError
from onekernel.server.run import listen
from onekernel.server.settings import Settings


def test_a_port_that_is_taken_is_an_error_before_the_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BackendError, match="choose another --port"):
            listen(Settings(port=port))
        assert main(["serve", "--port", str(port), "--model", "/no/such/model"]) == 1
        assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1"])
def test_an_address_that_cannot_be_had_is_an_error(host: str) -> None:
    with pytest.raises(BackendError, match=host):
        listen(Settings(host=host, port=0, allow_public=True))


def test_options_become_settings(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a\nb\n")
    words = "--model x/Qwen3.5-0.8B --port 1 --max-running 3 --max-waiting 4 --max-tokens 5 --cache-mib 6 --grace 7"
    more = ["--api-key-file", str(keys), "--allow-host", "h", "--allow-origin", "http://o", "--log-prompts"]
    settings = to_settings(make_parser().parse_args(["serve", *words.split(), *more]))
    assert settings == Settings(
        model_name="Qwen3.5-0.8B",
        port=1,
        keys=("a", "b"),
        hosts=("h",),
        origins=("http://o",),
        most_running=3,
        most_waiting=4,
        max_tokens=5,
        cache_bytes=6 * 2**20,
        grace_s=7.0,
        log_prompts=True,
    )
    assert to_settings(make_parser().parse_args(["serve"])) == Settings(model_name="demo")


def test_no_numbers_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--max-running", "--max-tokens"):
        assert main(["serve", option, "0"]) == 2
        assert option in capsys.readouterr().err
    for option in ("--max-waiting", "--cache-mib", "--grace"):
        assert main(["serve", option, "-1"]) == 2
        assert option in capsys.readouterr().err


def test_a_server_can_be_stopped_and_started_again() -> None:
    with scripted_model("x") as model:
        for _ in range(2):
            with ServerThread(model) as server:
                assert server.service.scheduler.accepts
            assert not server.service.scheduler.accepts
