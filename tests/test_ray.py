"""Ray Serve and Ray Data with two replicas of the demo model on this machine. Skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import onekernel
from onekernel.errors import InvalidRequest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onekernel[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Ray and of what it imports

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
ARGUMENTS = {"model": "demo", "backend": "cpu", "replicas": "2", "cpus": "0.5", "max_running": "8"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster: None) -> Iterator[None]:
    from ray import serve

    from onekernel.ray import app

    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app(ARGUMENTS), name="onekernel")
    yield
    serve.shutdown()


def chat(session: str | None, content: str, **fields: object) -> dict:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **fields}
    headers = {} if session is None else {"X-Session-Id": session}
    answer = httpx.post(f"{URL}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def replica_of(session: str) -> float:
    """When its replica was started: the model's field `created` is in whole seconds, this one is not."""
    for line in httpx.get(f"{URL}/metrics", headers={"X-Session-Id": session}, timeout=60).text.splitlines():
        if line.startswith("onekernel_request_seconds_created"):
            return float(line.split()[-1])
    raise AssertionError("no such metric")


def test_a_session_stays_with_its_replica_and_its_cache(served: None) -> None:
    sessions = [f"session-{i}" for i in range(16)]
    replicas = {session: replica_of(session) for session in sessions}
    assert len(set(replicas.values())) == 2, "both replicas are used"
    for _ in range(2):
        assert {session: replica_of(session) for session in sessions} == replicas
    for session in sessions:
        prompt = f"{session} " + "word " * 200
        first, second = chat(session, prompt)["usage"], chat(session, prompt)["usage"]
        assert first["prompt_tokens_details"]["cached_tokens"] < 100
        assert second["prompt_tokens_details"]["cached_tokens"] > 180


def test_requests_without_a_session_are_spread(served: None) -> None:
    def created(_: int) -> str:
        text = httpx.get(f"{URL}/metrics", timeout=60).text
        return next(line for line in text.splitlines() if line.startswith("onekernel_request_seconds_created"))

    assert len({created(i) for i in range(30)}) == 2


def test_both_replicas_answer_as_one_model_does(served: None) -> None:
    with onekernel.load("demo", backend="cpu") as model:
        wanted = {
            i: model.chat([{"role": "user", "content": f"count to {i}"}], max_tokens=8, temperature=0).text
            for i in range(12)
        }
    with ThreadPoolExecutor(12) as clients:
        found = clients.map(lambda i: chat(f"s{i}", f"count to {i}")["choices"][0]["message"]["content"], wanted)
    assert dict(zip(wanted, found, strict=True)) == wanted


def test_streams_come_in_parts(served: None) -> None:
    body = {"prompt": "def f(", "max_tokens": 30, "stream": True, "temperature": 0, "ignore_eos": True}
    with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=60) as answer:
        events = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-1] if '"text"' in event)
    with onekernel.load("demo", backend="cpu") as model:
        assert text.startswith(model.generate("def f(", max_tokens=5, temperature=0).text)
    assert len(events) > 5


def test_errors_are_those_of_the_server(served: None) -> None:
    answer = httpx.post(f"{URL}/v1/completions", json={"prompt": "x", "temperature": -1}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"


def test_a_batch_job_answers_each_line_once(cluster: None, tmp_path: Path) -> None:
    from onekernel.ray import answer
    from onekernel.ray.data import JsonLines

    prompts = [f"def function_{i}(a, x," for i in range(60)]
    lines = [json.dumps(prompt) for prompt in prompts]
    chat_body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    lines.append(json.dumps({"custom_id": "chat", "url": "/v1/chat/completions", "body": chat_body}))
    lines.append(json.dumps({"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "x", "n": -1}}))
    lines.append("17")
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    dataset = ray.data.read_text(str(source)).repartition(8)
    options = {"model": "demo", "backend": "cpu", "replicas": 2, "cpus": 0.5}
    fields = {"max_tokens": 6, "temperature": 0}
    answer(dataset, fields, **options).write_datasink(JsonLines(str(tmp_path / "out")))
    found = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    assert len(found) == len(lines)
    by_id = {one["custom_id"]: one for one in found}
    assert by_id["chat"]["response"]["body"]["object"] == "chat.completion"
    assert by_id["bad"]["response"]["status_code"] == 400
    assert by_id[None]["error"]["message"].startswith("it is neither a request")
    with onekernel.load("demo", backend="cpu") as model:
        wanted = sorted(model.generate(prompt, max_tokens=6, temperature=0).text for prompt in prompts)
    texts = [one["response"]["body"] for name, one in by_id.items() if name and name.startswith("prompt-")]
    assert sorted(body["choices"][0]["text"] for body in texts) == wanted


def test_options_are_checked() -> None:
    from onekernel.ray.options import Options

    with pytest.raises(InvalidRequest, match="no option 'modle': did you mean 'model'"):
        Options.of({"modle": "demo"})
    with pytest.raises(InvalidRequest, match="replicas = 'two' must be a number"):
        Options.of({"replicas": "two"})
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Options.of({"keys": "/nowhere"}).settings()
    assert Options.of({"model": "/models/a/", "cache_mib": "5"}).settings().model_name == "a"
    for given, gpus, expected in (
        ({}, 0, (1, 0.0)),
        ({}, 4, (4, 1.0)),
        ({"backend": "cpu"}, 4, (1, 0.0)),
        ({"gpus": "0.5"}, 4, (8, 0.5)),
        ({"replicas": "3"}, 4, (3, 1.0)),
    ):
        assert Options.of(given).replicas_and_gpus(gpus) == expected
