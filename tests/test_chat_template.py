"""Prompts are those of transformers; templates of strangers can neither reach Python nor fail with a traceback."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from onekernel.checkpoint.hub import demo_folder
from onekernel.errors import CheckpointError, InvalidRequest
from onekernel.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "Write a function."}
CALL = {"function": {"name": "search", "arguments": {"query": "Zürich <b>", "limit": 3, "tags": ["a", "ü"]}}}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "title": "Größe & <x>"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndef f(): ..."}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "fine", "reasoning_content": "let me see"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
    "tool call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "found"},
        {"role": "tool", "content": "nothing"},
    ],
}


@cache
def demo() -> ChatTemplate:
    return ChatTemplate.load(demo_folder())


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("generation", [True, False])
def test_prompts_are_those_of_transformers(name: str, tools: Any, thinking: bool | None, generation: bool) -> None:
    theirs = AutoTokenizer.from_pretrained(demo_folder())
    extra = {} if thinking is None else {"enable_thinking": thinking}
    expected = theirs.apply_chat_template(
        CONVERSATIONS[name], tools=tools, tokenize=False, add_generation_prompt=generation, **extra
    )
    ours = demo().render(CONVERSATIONS[name], tools, add_generation_prompt=generation, enable_thinking=thinking)
    assert ours == expected


def test_thinking_is_opened_or_closed_by_the_prompt() -> None:
    assert demo().render([USER], enable_thinking=True).endswith("<|im_start|>assistant\n<think>\n")
    assert demo().render([USER], enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_old_reasoning_is_dropped_and_new_reasoning_kept() -> None:
    assert "hm" not in demo().render(CONVERSATIONS["turns"])
    assert "<think>\nlet me see\n</think>\n\nfine" in demo().render(CONVERSATIONS["reasoning"])


def test_tools_stand_as_plain_json_before_the_conversation() -> None:
    prompt = demo().render(CONVERSATIONS["system"], TOOLS)
    assert json.dumps(TOOLS[0], ensure_ascii=False) in prompt  # not escaped for HTML or ASCII
    assert prompt.index("<tools>") < prompt.index("Be brief.") < prompt.index("Write a function.")
    calls = demo().render(CONVERSATIONS["tool call"])
    assert calls.count("<tool_call>\n<function=search>\n<parameter=query>\nZürich <b>\n</parameter>") == 2
    assert '<parameter=tags>\n["a", "ü"]\n</parameter>' in calls
    assert calls.count("<|im_start|>user") == 2  # both results in one turn
    assert "<tool_response>\nfound\n</tool_response>\n<tool_response>\nnothing\n</tool_response><|im_end|>" in calls


def test_messages_are_not_changed() -> None:
    messages = copy.deepcopy(CONVERSATIONS["tool call"])
    demo().render(messages, TOOLS)
    assert messages == CONVERSATIONS["tool call"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ tojson.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% include 'secret' %}",
        "{{ '%s' | format(messages.pop()) }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_a_template_reaches_nothing_of_python_and_changes_nothing(source: str) -> None:
    template = ChatTemplate(source)
    messages = [dict(USER)]
    try:
        rendered = template.render(messages)
    except InvalidRequest:
        rendered = ""
    assert "class" not in rendered
    assert "globals" not in rendered
    assert rendered in ("", "None")
    assert messages == [USER]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no images please') }}", "refuses the conversation: no images please"),
        ("{{ nothing.at.all }}", "refuses the conversation: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails on this conversation .ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "fails on this conversation .TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this conversation .RecursionError"),
        ("{{ messages | tojson(indent='x', bad=1) }}", "fails on this conversation .TypeError"),
        ("{{ [1][messages | length * 5] + 1 }}", "refuses the conversation|fails on this conversation"),
    ],
)
def test_a_template_that_fails_says_so(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source).render([USER])


def test_the_demo_template_explains_its_refusals() -> None:
    with pytest.raises(InvalidRequest, match="a conversation needs a message of the user"):
        demo().render([{"role": "system", "content": "x"}])
    with pytest.raises(InvalidRequest, match="a system message must be the first message"):
        demo().render([USER, {"role": "system", "content": "x"}])
    with pytest.raises(InvalidRequest, match="this model reads text only"):
        demo().render([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] is a str, not an object with role and content"),
        (
            [USER, {"role": "boss", "content": "x"}],
            r"messages\[1\]\.role = 'boss' must be one of system, user, assistant",
        ),
        ([{"content": "x"}], r"messages\[0\]\.role = None"),
        ([{"role": "user"}], r"messages\[0\]\.content is a NoneType"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is a int"),
    ],
)
def test_a_malformed_message_is_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        demo().render(messages)


def test_extensions_that_released_templates_use_are_there() -> None:
    template = ChatTemplate(
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ {'b': 'ü', 'a': 1} | tojson }}{{ custom }}"
    )
    assert template.render([USER], custom="!") == '014{"b": "ü", "a": 1}!'


def test_templates_are_found_in_either_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no chat template \(chat_template\.jinja\): this model cannot chat"):
        ChatTemplate.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}), encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([USER]) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([USER]) == "two"
    (tmp_path / "chat_template.jinja").write_text("three", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([USER]) == "three"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", b"{% if %}", "is not a valid jinja template"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
        ("tokenizer_config.json", b"{", "is not a JSON object"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "is not a JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} {message}"):
        ChatTemplate.load(tmp_path)
