"""benchmarks/load.py against a server whose times are known."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from fakes import WatchedBackend
from serving import DEMO, ServerThread

from onekernel.api import Model
from onekernel.engine import Engine
from onekernel.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("load_generator", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_generator"] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def words(consumed: Sequence[int], _: int) -> int:
    """Tokens that are text by themselves."""
    return 100 + len(consumed) % 500


@pytest.fixture
def slow() -> Iterator[Callable[..., ServerThread]]:
    """A server that takes 2 ms for each call of its backend."""
    servers: list[ServerThread] = []

    def start(**settings: object) -> ServerThread:
        tokenizer = Tokenizer.load(DEMO)
        backend = WatchedBackend(tokenizer.size, 32768, words, delay=0.002)
        servers.append(ServerThread(Model("slow", Engine(backend), tokenizer, DEMO), **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        server.model.close()


def test_the_figures_are_those_of_the_server(load, slow, tmp_path, capsys) -> None:
    server = slow()
    result = tmp_path / "result.json"
    arguments = ["--url", server.url, "--rate", "40", "--requests", "20", "--output", "5:15", "--prompt", "10:20"]
    more = ["--long-prompt", "2000", "--streams", "2", "--admissions", "2", "--quiet", "0.3", "--json", str(result)]
    assert load.main([*arguments, *more]) == 0
    found = json.loads(result.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["format"] == "onekernel-load"
    measured = found["load"]
    assert (measured["requests"], measured["answered"], measured["refused"]) == (20, 20, 0)
    assert 0.1 < measured["seconds"] < 10
    assert measured["requests_per_s"] == pytest.approx(20 / measured["seconds"])
    # A step takes 2 ms a request, so the gap cannot be shorter, and one of six requests at a time is 12 ms.
    assert 1.9 < measured["between_tokens_ms"]["p50"] < 100
    assert measured["ttft_ms"]["p50"] >= 1.9
    assert measured["ttft_ms"]["p50"] <= measured["ttft_ms"]["p99"] <= measured["ttft_ms"]["max"]
    admission = found["admission"]
    assert admission["prompt_tokens"] == 2000
    assert 3.8 < admission["between_tokens_before_ms"]["p50"] < 60
    assert admission["longest_stall_ms"]["max"] >= admission["between_tokens_meanwhile_ms"]["p50"]


def test_refusals_and_failures_are_told(load, slow, capsys) -> None:
    server = slow(most_running=3, most_waiting=3)
    quick = ["--long-prompt", "0", "--requests", "30", "--output", "10"]
    assert load.main(["--url", server.url, "--rate", "1000", *quick]) == 0
    measured = json.loads(capsys.readouterr().out)["load"]
    assert measured["refused"] > 0
    assert measured["answered"] == 30 - measured["refused"]
    assert load.main(["--url", "http://127.0.0.1:9", *quick]) == 1
    assert "load: " in capsys.readouterr().err
    assert load.main(["--url", "http://198.51.100.7:80", *quick]) == 1
    assert "this machine only" in capsys.readouterr().err


def test_percentiles(load) -> None:
    assert load.spread([i / 1000 for i in range(1, 101)]) == {"p50": 51.0, "p99": 100.0, "max": 100.0}
    assert load.spread([]) is None
    assert load.interval("3:5") == (3, 5)
    with pytest.raises(ValueError):  # noqa: PT011
        load.interval("5:3")
