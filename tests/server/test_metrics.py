"""Metrics, health and facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerThread

from onekernel.scheduler import Scheduler
from onekernel.server.device import find_meter
from onekernel.server.metrics import Metrics

MESSAGES = [{"role": "system", "content": "word " * 60}, {"role": "user", "content": "hi"}]


def values(server: ServerThread) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name.removeprefix("onekernel_") + sample.labels.get("reason", ""): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


def test_what_was_asked_is_counted(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("one two three")
    usages = [
        httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES}).json()["usage"] for _ in range(2)
    ]
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 0})
    found = values(server)
    assert found["prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert found["generation_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    assert found["prompt_tokens_cached_total"] == usages[1]["prompt_tokens_details"]["cached_tokens"] > 60
    assert found["requests_totalstop"] == 2
    assert found["time_to_first_token_seconds_count"] == found["time_per_output_token_seconds_count"] == 2
    assert found["requests_running"] == found["requests_parked"] == found["requests_waiting"] == 0
    assert found["prefix_cache_entries"] >= 1
    assert found["prefix_cache_bytes"] > 0


def test_health_tells_a_failed_engine(scripted: Callable[..., ServerThread], monkeypatch: pytest.MonkeyPatch) -> None:
    server = scripted("x")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    monkeypatch.setattr(server.service.scheduler, "failure", RuntimeError("broke"))
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert httpx.get(f"{server.url}/ready").status_code == 503
    answer = httpx.post(f"{server.url}/v1/messages", json={"messages": MESSAGES, "max_tokens": 1})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "api_error"
    monkeypatch.undo()


def test_props_name_the_context_for_those_who_look_for_it(demo: ServerThread) -> None:
    facts = httpx.get(f"{demo.url}/props").json()
    assert facts["default_generation_settings"]["n_ctx"] == 32768
    assert facts["model_alias"] == "demo"
    assert facts["total_slots"] == facts["queue"]["most_running"] == 32
    assert facts["queue"]["parked"] == 0
    assert (
        facts["memory"]["free"] > facts["memory"]["state_bytes"]["full"] > facts["memory"]["state_bytes"]["empty"] > 0
    )
    assert httpx.get(f"{demo.url}/v1/props").json().keys() == facts.keys()
    assert httpx.get(f"{demo.url}/version").json()["version"]


def test_tokens_and_text_are_each_others_inverse(demo: ServerThread) -> None:
    text = "def é🙂(): <|im_end|>"
    tokens = httpx.post(f"{demo.url}/tokenize", json={"content": text}).json()
    assert httpx.post(f"{demo.url}/detokenize", json={"tokens": tokens["tokens"]}).json()["content"] == text
    plain = httpx.post(f"{demo.url}/tokenize", json={"content": text, "parse_special": False}).json()
    assert plain["count"] > tokens["count"]
    chat = httpx.post(f"{demo.url}/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    assert "".join(chat["token_strs"]).startswith("<|im_start|>system\nword")
    assert httpx.post(f"{demo.url}/tokenize", json={}).status_code == 400
    assert httpx.post(f"{demo.url}/detokenize", json={"tokens": [10**30]}).status_code == 400


def test_energy_counters_begin_again_when_they_are_full(tmp_path: Path) -> None:
    assert find_meter("cpu", tmp_path) is None
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000\n")
    (package / "energy_uj").write_text("9000000\n")
    joules = find_meter("cpu", tmp_path)
    assert joules is not None
    assert joules() == 0
    (package / "energy_uj").write_text("1500000\n")
    assert joules() == pytest.approx(2.5)


def test_energy_is_there_only_where_something_tells(scripted: Callable[..., ServerThread]) -> None:
    scheduler: Scheduler = scripted("x").service.scheduler
    assert b"energy" not in Metrics(scheduler).text()
    assert b"onekernel_energy_joules_total 7.5" in Metrics(scheduler, lambda: 7.5).text()
