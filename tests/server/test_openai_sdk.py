"""The official openai package against the server, with its strict validation of every answer and event."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from serving import KEY, ServerThread

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "good": {"type": "boolean"}},
    "required": ["count", "good"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Switch a light.",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string", "enum": ["kitchen", "bath"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
FLAT_TOOL: Any = {"type": "function", "strict": False, **TOOL["function"]}
MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
CALL = (
    "Sure.\n\n<tool_call>\n<function=set_light>\n<parameter=room>\nbath\n</parameter>\n"
    "<parameter=on>\ntrue\n</parameter>\n</function>\n</tool_call>"
)
PATCH = "*** Begin Patch\n+x\n*** End Patch"


def client_of(server: ServerThread) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True)


@pytest.fixture
def client(demo: ServerThread) -> Iterator[OpenAI]:
    with client_of(demo) as client:
        yield client


def test_a_chat_streams_what_it_answers_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=20)
    with client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    # The second request found the prompt of the first one.
    assert chunks[-1].usage.prompt_tokens_details is not None


def test_a_required_tool_is_called_even_by_the_demo_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "set_light"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"room", "on"}
    assert arguments["room"] in ("kitchen", "bath")
    assert isinstance(arguments["on"], bool)


def test_a_named_tool_is_called_and_its_arguments_stream(client: OpenAI) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    with client.chat.completions.stream(
        model="any",
        messages=MESSAGES,
        tools=[other, TOOL],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "set_light"}},
        max_tokens=200,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert any(event.type == "tool_calls.function.arguments.delta" for event in events)
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.name == "set_light"
    assert set(json.loads(call.function.arguments)) == {"room", "on"}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_structured_output_is_valid_even_from_the_demo_model(client: OpenAI, seed: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    answer = client.chat.completions.create(
        model="any", messages=MESSAGES, response_format=form, max_tokens=100, temperature=1.5, seed=seed
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"count", "good"}
    assert 0 <= value["count"] <= 99
    assert answer.choices[0].finish_reason == "stop"


def test_a_regular_expression_holds_a_plain_completion(client: OpenAI) -> None:
    answer = client.completions.create(
        model="any",
        prompt="My number is ",
        max_tokens=50,
        temperature=2.0,
        seed=5,
        extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-c]+z"}},
    )
    text = answer.choices[0].text
    assert text[:3].isdigit()
    assert text[3] == "-"
    assert set(text[4:]) <= set("abcz")


def test_choices_differ_by_seed_and_repeat_with_it(client: OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="any", messages=MESSAGES, n=3, seed=7, temperature=1.5, max_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


def test_logprobs_are_one_a_token_and_the_best_is_among_them(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content


def test_logit_bias_and_ignore_eos_reach_the_sampler(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=4, logit_bias={"65": 100}, extra_body={"ignore_eos": True}
    )
    content = answer.choices[0].message.content or ""
    assert len(set(content)) == 1


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=20).choices[0].message.content
    assert whole is not None
    stop = whole[8:12]
    answer = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=20, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_completions_stream_and_echo(client: OpenAI) -> None:
    whole = client.completions.create(model="any", prompt="import ", max_tokens=8, logprobs=2)
    # Not strictly: OpenAI's own chunks have no finish_reason before the last, which its package does not foresee here.
    lenient = OpenAI(base_url=client.base_url, api_key=KEY)
    chunks = list(lenient.completions.create(model="any", prompt="import ", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 8
    echo = client.completions.create(model="any", prompt=["a", "b"], max_tokens=1, echo=True)
    assert [choice.text[0] for choice in echo.choices] == ["a", "b"]


def test_responses_stream_every_event_in_order(client: OpenAI) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    with client.responses.create(model="any", input="def f():", max_output_tokens=10, stream=True) as stream:
        events = [adapter.validate_python(event.model_dump()) for event in stream]
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas >= 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert final.output_text == "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert final.usage.output_tokens == 10


def test_responses_helper_and_whole_answer_agree(client: OpenAI) -> None:
    whole = client.responses.create(model="any", input="def f():", max_output_tokens=10)
    assert whole.status == "incomplete"
    with client.responses.stream(
        model="any", input="def f():", tools=[FLAT_TOOL], tool_choice="required", max_output_tokens=200,
        parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        final = stream.until_done().get_final_response()
    [call] = final.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"room", "on"}


def test_structured_responses(client: OpenAI) -> None:
    answer = client.responses.create(
        model="any",
        input="x",
        max_output_tokens=100,
        text={"format": {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA}},
    )
    assert set(json.loads(answer.output_text)) == {"count", "good"}
    assert answer.status == "completed"


def test_an_empty_warm_up_request_is_answered(client: OpenAI) -> None:
    assert client.responses.create(model="any", input="", max_output_tokens=1).object == "response"


def test_models(client: OpenAI, demo: ServerThread) -> None:
    [model] = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    catalogue = httpx.get(f"{demo.url}/v1/models?client_version=0.1").json()["models"]
    assert catalogue[0]["context_window"] == 32768


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
            "messages[0].content[0]",
        ),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(demo: ServerThread, fields: dict[str, Any], parameter: str) -> None:
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == parameter
    assert error["type"] == "invalid_request_error"


def test_unknown_fields_are_named_and_do_no_harm(demo: ServerThread) -> None:
    answer = httpx.post(
        f"{demo.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 2, "frobnicate": 1}
    )
    assert answer.status_code == 200
    assert answer.headers["x-onekernel-ignored"] == "frobnicate"


def test_a_prompt_that_does_not_fit_says_so_in_the_words_clients_look_for(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 40000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 32768 tokens" in caught.value.message


def test_breaking_a_stream_off_ends_its_generation(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("long " * 500, delay=0.005)
    with client_of(server) as client:
        stream = client.chat.completions.create(model="any", messages=MESSAGES, stream=True)
        for count, _ in enumerate(stream):
            if count == 5:
                stream.close()
                break
    wait_until_idle(server)
    assert server.model.engine._backend.consumed_in_all < 150


def test_a_tool_call_reaches_the_chat_with_its_text(scripted: Callable[..., ServerThread]) -> None:
    server = scripted(CALL)
    with client_of(server) as client:
        answer = client.chat.completions.create(model="any", messages=MESSAGES, tools=[TOOL])
    message = answer.choices[0].message
    assert message.content == "Sure."
    [call] = message.tool_calls or []
    assert call.function.arguments == '{"room": "bath", "on": true}'
    assert answer.choices[0].finish_reason == "tool_calls"


def test_one_call_at_a_time_if_that_is_asked_for(scripted: Callable[..., ServerThread]) -> None:
    server = scripted(f"{CALL}\n{CALL}")
    with client_of(server) as client:
        for several, count in ((True, 2), (False, 1)):
            answer = client.chat.completions.create(
                model="any", messages=MESSAGES, tools=[TOOL], parallel_tool_calls=several
            )
            assert len(answer.choices[0].message.tool_calls or []) == count
            assert answer.choices[0].finish_reason == "tool_calls"


def test_thinking_is_kept_apart_in_every_api(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("I must think.\n</think>\n\nThe answer.")
    with client_of(server) as client:
        chat: Any = client.chat.completions.create(model="any", messages=MESSAGES, reasoning_effort="low")
        assert chat.choices[0].message.reasoning_content == "I must think."
        assert chat.choices[0].message.content == "The answer."
        assert chat.usage.completion_tokens_details.reasoning_tokens > 3
        answer = client.responses.create(model="any", input="x", reasoning={"effort": "low"})
        reasoning, message = answer.output
        assert reasoning.type == "reasoning"
        assert reasoning.content is not None
        assert reasoning.content[0].text == "I must think."
        assert answer.output_text == "The answer."
        assert message.type == "message"


def test_thinking_ends_at_its_limit(scripted: Callable[..., ServerThread]) -> None:
    server = scripted("thinking " * 50)
    with client_of(server) as client:
        chat: Any = client.chat.completions.create(
            model="any", messages=MESSAGES, max_tokens=60, extra_body={
                "chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 10,
            },
        )  # fmt: skip
    assert 10 <= chat.usage.completion_tokens_details.reasoning_tokens <= 14
    assert chat.choices[0].message.content


def test_namespaces_and_custom_tools_come_back_as_codex_wants_them(scripted: Callable[..., ServerThread]) -> None:
    namespace: Any = {
        "type": "namespace",
        "name": "agents",
        "description": "others",
        "tools": [{**FLAT_TOOL, "name": "spawn"}],
    }
    custom: Any = {"type": "custom", "name": "apply_patch", "description": "patches"}
    calls = (
        "<tool_call>\n<function=spawn>\n<parameter=room>\nbath\n</parameter>\n</function>\n</tool_call>\n"
        f"<tool_call>\n<function=apply_patch>\n<parameter=input>\n{PATCH}\n</parameter>\n</function>\n</tool_call>"
    )
    server = scripted(calls)
    with client_of(server) as client:
        answer = client.responses.create(
            model="any", input="x", tools=[namespace, custom, {"type": "web_search"}], parallel_tool_calls=True
        )
    first, second = answer.output
    assert first.type == "function_call"
    assert (first.name, first.model_dump()["namespace"]) == ("spawn", "agents")
    assert second.type == "custom_tool_call"
    assert second.input == PATCH


def wait_until_idle(server: ServerThread) -> None:
    import time

    for _ in range(200):
        if server.service.scheduler.running == 0:
            return
        time.sleep(0.02)
    raise AssertionError("the request still runs")
