"""The adapters of other engines, each run for real on the CPU where it can be: logits, tokens, counts."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_models import TOKENS, write_small

import onekernel
from onekernel.api import Model
from onekernel.bench import gate
from onekernel.bench.oracle import Oracle, consult
from onekernel.bench.peers import ENGINES, FOLDER
from onekernel.bench.process import EngineProcess
from onekernel.bench.protocol import Unavailable
from onekernel.bench.workload import prompt
from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights

GATE = 70  # tokens: more than one chunk of the delta rule
DEMO_TOKENS = 3012
PRELOAD = {"OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    """Two value heads per key head, and a head of its own: what the demo model does not have."""
    folder = write_small(tmp_path_factory.mktemp("peers") / "small")
    return folder, oracle_of(folder, TOKENS)


def oracle_of(folder: Path, vocabulary: int) -> Oracle:
    shape = Shape.load(folder)
    return consult(load_weights(folder, shape), shape, prompt(GATE, 0, vocabulary))


def start(name: str, folder: Path, environment: dict[str, str] | None = None, **options: Any) -> EngineProcess:
    engine = ENGINES[name]
    process = EngineProcess(engine.command(), environment={**PRELOAD, **(environment or {})})
    try:
        process.ask(
            "load", folder=str(folder), options={"device": "cpu", "max_context": 512, **engine.options, **options}
        )
    except BaseException:
        process.close()
        raise
    return process


def own_tokens(folder: Path, context: list[int], count: int) -> list[int]:
    with start("onekernel", folder) as process:
        process.ask("prepare", tokens=context)
        tokens: list[int] = process.ask("decode", count=count)["tokens"]
        return tokens


def check_decoding(process: EngineProcess, folder: Path, vocabulary: int, exact: bool) -> None:
    """As many tokens as asked for, the same when asked again, and (float32) the same as ours."""
    context = prompt(33, 1, vocabulary)
    process.ask("prepare", tokens=context)
    first, second = (process.ask("decode", count=12) for _ in range(2))
    assert first["count"] == len(first["tokens"]) == 12
    assert first["tokens"] == second["tokens"]
    assert 0 < first["wall_s"] < 600
    process.ask("prepare", tokens=context[:1])  # context 0: nothing but the pending token
    assert process.ask("decode", count=3)["count"] == 3
    if exact:
        assert first["tokens"] == own_tokens(folder, context, 12)


def test_our_own_engine(small: tuple[Path, Oracle]) -> None:
    folder, oracle = small
    with start("onekernel", folder) as process:
        found = gate.judge(oracle, process.logits(oracle.tokens), TOKENS)
        assert found.verdict == gate.AGREES
        assert found.kl is not None
        assert found.kl < 1e-8
        check_decoding(process, folder, TOKENS, exact=True)
        assert process.ask("prefill", tokens=prompt(33, 1, TOKENS))["count"] == 33


@pytest.mark.parametrize("float32", [True, False])
def test_transformers(small: tuple[Path, Oracle], float32: bool) -> None:
    folder, oracle = small
    with start("transformers", folder, float32=float32) as process:
        found = gate.judge(oracle, process.logits(oracle.tokens), TOKENS)
        assert found.verdict == gate.AGREES, found
        check_decoding(process, folder, TOKENS, exact=float32)
        assert process.ask("prefill", tokens=prompt(33, 1, TOKENS))["wall_s"] > 0


def test_transformers_with_fla_is_not_measured_without_it(small: tuple[Path, Oracle], tmp_path: Path) -> None:
    """Transformers falls back silently; a row named after a library that did not run would be a lie."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla/__init__.py").write_text("__version__ = '0'\n")  # installed, but not usable
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with pytest.raises(Unavailable, match="does not use the flash-linear-attention"):
        start("transformers-fla", small[0], environment={"PYTHONPATH": f"{path}{os.pathsep}{FOLDER.parents[1]}"})


def test_the_pytorch_step(small: tuple[Path, Oracle]) -> None:
    """Without torch.compile, which takes minutes on a CPU and computes the same."""
    folder, oracle = small
    with start("torch-compiled", folder, compile=False) as process:
        found = gate.judge(oracle, process.logits(oracle.tokens), TOKENS)
        assert found.verdict == gate.AGREES, found
        assert found.kl is not None
        assert found.kl < 1e-6  # float32 on the CPU
        check_decoding(process, folder, TOKENS, exact=True)


@pytest.mark.skipif(
    not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")),
    reason="llama-cpp-python and gguf are not installed",
)
@pytest.mark.parametrize("model", ["small", "demo"])
def test_llama_cpp_runs_our_gguf(model: str, small: tuple[Path, Oracle], tmp_path: Path) -> None:
    """The converter is right: llama.cpp's logits are the reference's, on either mapping of value heads to key heads."""
    folder, oracle, vocabulary = (*small, TOKENS)
    if model == "demo":
        folder, vocabulary = demo_folder(), DEMO_TOKENS
        oracle = oracle_of(folder, vocabulary)
    with start("llama.cpp", folder, {"ONEKERNEL_CACHE": str(tmp_path)}) as process:
        found = gate.judge(oracle, process.logits(oracle.tokens), vocabulary)
        assert found.verdict == gate.AGREES, found
        check_decoding(process, folder, vocabulary, exact=False)
        assert process.ask("prefill", tokens=prompt(33, 1, vocabulary))["count"] == 33


@pytest.mark.skipif(
    not (importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf")),
    reason="llama-cpp-python and gguf are not installed",
)
def test_llama_cpp_quantised_is_close_but_not_the_same(small: tuple[Path, Oracle], tmp_path: Path) -> None:
    folder, oracle = small
    divergences = []
    for kind in ("q8_0", "q4_0"):
        with start("llama.cpp", folder, {"ONEKERNEL_CACHE": str(tmp_path)}, kind=kind) as process:
            found = gate.judge(oracle, process.logits(oracle.tokens), TOKENS, kind)
            assert found.verdict in (gate.AGREES, gate.QUANTISED)
            assert found.kl is not None
            divergences.append(found.kl)
    assert divergences[0] < 0.02 < divergences[1] < 2


@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
def test_value_heads_move_to_where_llama_cpp_looks_for_them(small: tuple[Path, Oracle], tmp_path: Path) -> None:
    """2 key heads with 2 value heads each: 0 1 | 2 3 becomes 0 2 1 3, so that head h belongs to key head h mod 2."""
    import gguf

    folder, _ = small
    sys.path.insert(0, str(FOLDER))
    try:
        from gguf_converter import convert, head_order
    finally:
        sys.path.remove(str(FOLDER))
    shape = Shape.load(folder)
    assert head_order(shape).tolist() == [0, 2, 1, 3]
    convert(folder, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_weights(folder, shape)
    assert (tensors["output_norm.weight"] == weights.float32("norm.weight") + 1).all()
    decay = -np.exp(weights.float32("layers.0.linear_attn.A_log"))
    assert (tensors["blk.0.ssm_a"] == decay[[0, 2, 1, 3]]).all()
    assert (tensors["blk.0.ssm_norm.weight"] == weights.float32("layers.0.linear_attn.norm.weight")).all()
    rows = weights["layers.0.linear_attn.in_proj_z.weight"].data.reshape(4, 128, -1)
    assert (tensors["blk.0.attn_gate.weight"].view(np.uint16).reshape(4, 128, -1) == rows[[0, 2, 1, 3]]).all()


@pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
def test_llama_bench_is_asked_for_what_is_measured(small: tuple[Path, Oracle], tmp_path: Path) -> None:
    """On a script in its place: the right arguments, and its own nanoseconds."""
    binary = tmp_path / "llama-bench"
    binary.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'asked')!r}, 'a').write(' '.join(sys.argv[3:]) + '\\n')\n"
        "print(json.dumps([{'build_number': 1, 'build_commit': 'abc', 'samples_ns': [2500000000]}]))\n"
    )
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    environment = {"ONEKERNEL_CACHE": str(tmp_path)}
    with start("llama-bench", small[0], environment, binary=str(binary)) as process:
        process.ask("prepare", tokens=prompt(521, 0, TOKENS))
        assert process.ask("decode", count=128)["wall_s"] == 2.5
        assert process.ask("prefill", tokens=prompt(520, 0, TOKENS)) == {"wall_s": 2.5, "device_s": None, "count": 520}
        with pytest.raises(Unavailable, match="no logits"):
            process.logits([1, 2])
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[1] == "-ngl 0 -fa 1 -r 1 -o json -p 0 -n 128 -d 520"
    assert asked[2] == "-ngl 0 -fa 1 -r 1 -o json -p 520 -n 0"


@pytest.mark.parametrize(
    ("name", "reason"), [("url", "--url"), ("llama-bench", "--llama-bench"), ("vllm", "GPUs only")]
)
def test_an_engine_that_is_not_there_says_what_is_missing(name: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        start(name, demo_folder())


class Server:
    """A small OpenAI-compatible server on the demo model: what of the protocol the adapter needs, over real HTTP."""

    def __init__(self, model: Model, mistake: str = "") -> None:
        self.prompts: list[list[int]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "demo"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "ignore_eos" in body:
                    self.answer(400, {"error": {"message": "unknown field ignore_eos"}})
                    return
                outer.prompts.append(body["prompt"])
                bias = {int(token): value for token, value in body.get("logit_bias", {}).items()}
                session = model.engine.new_session()
                session.extend(body["prompt"])
                sampling = model.sampling_params(temperature=0, logit_bias=bias)
                made = [token.id for token in session.stream(sampling, body["max_tokens"])]
                if mistake == "wrong":
                    made = [(token + 1) % DEMO_TOKENS for token in made]
                texts = [model.tokenizer.decode([token]) for token in made]
                if not body.get("stream"):
                    self.answer(200, {"choices": [{"text": "".join(texts), "finish_reason": "length"}]})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                events: list[object] = [{"choices": [{"text": text, "finish_reason": None}]} for text in texts]
                events.append({"choices": [{"text": "", "finish_reason": "length"}]})
                events.append({"choices": [], "usage": {"completion_tokens": len(made)}})
                for event in events:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with onekernel.load("demo", backend="cpu") as loaded:
        yield loaded


def test_a_server_behind_a_url(model: Model) -> None:
    server = Server(model)
    try:
        oracle = oracle_of(demo_folder(), DEMO_TOKENS)
        with start("url", demo_folder(), url=server.url) as process:
            found = gate.judge(oracle, process.logits(oracle.tokens), DEMO_TOKENS)
            assert found.verdict == gate.AGREES, found
            assert found.tokens > GATE / 4
            assert found.kl is None
            context = prompt(33, 1, DEMO_TOKENS)
            process.ask("prepare", tokens=context)
            answer = process.ask("decode", count=12)
            assert answer["count"] == 12  # of 13 tokens: the time runs from the first to the last
            assert 0 < answer["wall_s"] < 60
            assert server.prompts[-1] == context
            assert process.ask("prefill", tokens=context)["count"] == 33
    finally:
        server.close()


def test_a_wrong_server_is_caught(model: Model) -> None:
    server = Server(model, mistake="wrong")
    try:
        oracle = oracle_of(demo_folder(), DEMO_TOKENS)
        with start("url", demo_folder(), url=server.url) as process:
            assert gate.judge(oracle, process.logits(oracle.tokens), DEMO_TOKENS).verdict == gate.WRONG
    finally:
        server.close()


def test_a_server_that_is_not_running_is_skipped_with_a_reason() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        start("url", demo_folder(), url="http://127.0.0.1:9/v1")
