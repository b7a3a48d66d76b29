"""The official anthropic package against the server, with its strict validation of every answer and event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter
from serving import KEY, ServerThread
from test_openai_sdk import SCHEMA, TOOL, wait_until_idle

LIGHT: Any = {
    "name": "set_light",
    "description": "Switch a light.",
    "input_schema": TOOL["function"]["parameters"],
}
MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
CALLS = (
    "Both.\n\n<tool_call>\n<function=set_light>\n<parameter=room>\nbath\n</parameter>\n<parameter=on>\ntrue\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=set_light>\n<parameter=room>\nkitchen\n</parameter>\n"
    "<parameter=on>\nfalse\n</parameter>\n</function>\n</tool_call>"
)


def client_of(server: ServerThread) -> Anthropic:
    return Anthropic(base_url=server.url, api_key=KEY, max_retries=0, _strict_response_validation=True)


@pytest.fixture
def client(demo: ServerThread) -> Iterator[Anthropic]:
    with client_of(demo) as client:
        yield client


def test_a_message_streams_what_it_answers_whole(client: Anthropic) -> None:
    whole = client.messages.create(model="any", messages=MESSAGES, max_tokens=20)
    with client.messages.stream(model="any", messages=MESSAGES, max_tokens=20) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 20
    # All but the last token of the prompt came from the first request.
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == whole.usage.input_tokens + (
        whole.usage.cache_read_input_tokens or 0
    )


def test_every_event_comes_in_order(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("I think.\n</think>\n\n" + CALLS)
    body = {
        "model": "any", "max_tokens": 500, "messages": MESSAGES, "tools": [LIGHT], "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 100},
    }  # fmt: skip
    events = read_events(server.url, body)
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for name, data in events:
        assert data["type"] == name
        if name != "ping":
            adapter.validate_python(data)
    kinds = collapsed(
        [name + (":" + data["delta"]["type"] if name == "content_block_delta" else "") for name, data in events]
    )
    call = ["content_block_start", "content_block_delta:input_json_delta", "content_block_stop"]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta:thinking_delta",
        "content_block_delta:signature_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta:text_delta",
        "content_block_stop",
        *call,
        *call,
        "message_delta",
        "message_stop",
    ]
    indices = [data["index"] for name, data in events if name == "content_block_start"]
    assert indices == [0, 1, 2, 3]
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_tool_calls_are_collected_by_the_helper(scripted: Callable[..., ServerThread]) -> None:
    with (
        client_of(scripted(CALLS)) as client,
        client.messages.stream(model="any", messages=MESSAGES, max_tokens=500, tools=[LIGHT]) as stream,
    ):
        final = stream.get_final_message()
    text, first, second = final.content
    assert text.type == "text"
    assert text.text == "Both."
    assert first.type == second.type == "tool_use"
    assert first.input == {"room": "bath", "on": True}
    assert second.input == {"room": "kitchen", "on": False}
    assert first.id != second.id


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "set_light"}]
)
def test_a_demanded_tool_is_called_even_by_the_demo_model(client: Anthropic, choice: Any) -> None:
    answer = client.messages.create(model="any", messages=MESSAGES, max_tokens=200, tools=[LIGHT], tool_choice=choice)
    [block] = answer.content
    assert block.type == "tool_use"
    assert answer.stop_reason == "tool_use"
    assert set(block.input) == {"room", "on"}  # type: ignore[call-overload]


def test_structured_output(client: Anthropic) -> None:
    import json

    answer = client.messages.create(
        model="any",
        messages=MESSAGES,
        max_tokens=100,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert answer.content[0].type == "text"
    assert set(json.loads(answer.content[0].text)) == {"count", "good"}
    assert answer.stop_reason == "end_turn"


def test_a_stop_sequence_is_named(scripted: Callable[..., ServerThread]) -> None:
    with client_of(scripted("one two three")) as client:
        answer = client.messages.create(model="any", messages=MESSAGES, max_tokens=50, stop_sequences=["zzz", " three"])
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == " three"
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "one two"


def test_tokens_are_counted_as_they_are_read(client: Anthropic) -> None:
    fields: Any = {"model": "any", "messages": MESSAGES, "tools": [LIGHT], "system": "Be brief."}
    counted = client.messages.count_tokens(**fields).input_tokens
    usage = client.messages.create(**fields, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_whole_agent_turn_reads_only_what_is_new(scripted: Callable[..., ServerThread]) -> None:
    """As Claude Code sends it: a billing header that changes, and a system message in the middle that is a list on the
    first turn and a string on the second."""
    server = scripted(CALLS, "Done.")
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330.aaa"},
        {"type": "text", "text": "You are an agent. " * 40, "cache_control": {"type": "ephemeral"}},
    ]
    question: Any = {"role": "user", "content": "switch the lights"}
    reminder: Any = {"role": "system", "content": [{"type": "text", "text": "today is Monday"}]}
    with client_of(server) as client:
        first = client.messages.create(
            model="any", system=system, messages=[question, reminder], max_tokens=300, tools=[LIGHT]
        )
        system[0]["text"] = "x-anthropic-billing-header: cc_version=2.1.330.bbb"
        results: Any = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "ok"}
            for block in first.content
            if block.type == "tool_use"
        ]
        second = client.messages.create(
            model="any",
            system=system,
            messages=[
                question,
                {**reminder, "content": "today is Monday"},
                {"role": "assistant", "content": [block.model_dump() for block in first.content]},  # type: ignore[misc]
                {"role": "user", "content": results},
            ],
            max_tokens=300,
            tools=[LIGHT],
        )
    assert second.content[0].type == "text"
    assert second.content[0].text == "Done."
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= first.usage.input_tokens - 8
    assert second.usage.input_tokens < 150


def test_deferred_tools_do_not_change_the_head_of_the_prompt(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("ok")
    late: Any = {
        "name": "late",
        "description": "found later",
        "input_schema": {"type": "object"},
        "defer_loading": True,
    }
    with client_of(server) as client:

        def count(tools: Any) -> int:
            return client.messages.count_tokens(model="any", messages=MESSAGES, tools=tools).input_tokens

        assert count([LIGHT]) == count([LIGHT, late])
        found: Any = [
            *MESSAGES,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "ToolSearch", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [
                {"type": "tool_reference", "tool_name": "late"}]}]},
        ]  # fmt: skip
        assert client.messages.create(model="any", messages=found, tools=[LIGHT, late], max_tokens=5).content


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"temperature": 1000}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "messages.0"),
    ],
)
def test_errors_have_anthropics_form(demo: ServerThread, fields: dict[str, Any], where: str) -> None:
    answer = httpx.post(f"{demo.url}/v1/messages", json={"messages": MESSAGES, "max_tokens": 2, **fields})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert where in answer.json()["error"]["message"]


def test_a_prompt_that_does_not_fit_says_so_in_the_words_clients_look_for(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 32767 maximum"):
        client.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": "word " * 40000}])


def test_breaking_a_stream_off_ends_its_generation(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("long " * 500, delay=0.005)
    with client_of(server) as client, client.messages.stream(model="any", messages=MESSAGES, max_tokens=2000) as stream:
        for count, _ in enumerate(stream.text_stream):
            if count == 5:
                break
    wait_until_idle(server)
    assert server.model.engine._backend.consumed_in_all < 150


def test_silence_is_filled_with_pings(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("slow", delay=0.35, heartbeat_s=0.1)
    events = read_events(server.url, {"model": "any", "max_tokens": 5, "messages": MESSAGES, "stream": True})
    assert [name for name, _ in events].count("ping") >= 3
    assert events[0][0] == "message_start"
    assert events[-1][0] == "message_stop"


def read_events(url: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    import json

    answer = httpx.post(f"{url}/v1/messages?beta=true", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def collapsed(names: list[str]) -> list[str]:
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
