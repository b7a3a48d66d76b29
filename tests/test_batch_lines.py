"""What a line of the input of a batch job may be, and what is said of one that is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onekernel.batch.lines import CHAT, COMPLETIONS, Line, read_lines
from onekernel.errors import InvalidRequest

REQUEST = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": []}}


def lines_of(tmp_path: Path, content: bytes, **options: object) -> list[Line]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return list(read_lines(path, options))


def one(tmp_path: Path, value: object, **options: object) -> Line:
    (line,) = lines_of(tmp_path, json.dumps(value).encode(), **options)
    return line


def test_a_request_keeps_its_name_its_url_and_its_body(tmp_path) -> None:
    line = one(tmp_path, REQUEST, max_tokens=5)
    assert (line.number, line.custom_id, line.url, line.body) == (1, "a", CHAT, {"messages": []})
    assert line.problem is None


def test_plain_prompts_take_the_options_unless_their_line_says_otherwise(tmp_path) -> None:
    content = b'"one"\n{"prompt": "two", "max_tokens": 9, "custom_id": "b"}\n'
    first, second = lines_of(tmp_path, content, max_tokens=5, seed=1)
    assert (first.custom_id, first.url) == ("line-1", COMPLETIONS)
    assert first.body == {"prompt": "one", "max_tokens": 5, "seed": 1}
    assert second.custom_id == "b"
    assert second.body == {"prompt": "two", "max_tokens": 9, "seed": 1}


def test_numbers_count_blank_lines_and_line_ends_of_windows_do_not_matter(tmp_path) -> None:
    lines = lines_of(tmp_path, b'\xef\xbb\xbf"a"\r\n\r\n  \n"b"')
    assert [(line.number, line.body["prompt"]) for line in lines] == [(1, "a"), (4, "b")]
    assert lines[0].digest == lines_of(tmp_path, b'"a"\n')[0].digest


def test_options_belong_to_the_identity_of_a_plain_prompt_only(tmp_path) -> None:
    assert one(tmp_path, "a", max_tokens=1).digest != one(tmp_path, "a", max_tokens=2).digest
    assert one(tmp_path, REQUEST, max_tokens=1).digest == one(tmp_path, REQUEST, max_tokens=2).digest
    assert one(tmp_path, "a").digest != one(tmp_path, "b").digest


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"nope", "it is not valid JSON: Expecting value"),
        (b'"caf\xe9"', "it is not UTF-8 (at byte 4)"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"9" * 5000, "it is not valid JSON"),
        (b"3", "it is neither a request"),
        (b'{"messages": []}', "it is neither a request"),
        (json.dumps({**REQUEST, "custom_id": 3}).encode(), "custom_id = 3 must be a text that names the request"),
        (json.dumps({**REQUEST, "custom_id": ""}).encode(), "custom_id = '' must be a text"),
        (json.dumps({**REQUEST, "method": "GET"}).encode(), "method = 'GET' must be 'POST'"),
        (json.dumps({**REQUEST, "url": "/v1/embeddings"}).encode(), "url = '/v1/embeddings' must be one of /v1/chat"),
        (json.dumps({**REQUEST, "url": []}).encode(), "url = [] must be one of /v1/chat"),
        (json.dumps({**REQUEST, "body": "x"}).encode(), "body must be an object"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_line_says_what_is_wrong_and_harms_no_other(tmp_path, content, problem) -> None:
    first, bad, last = lines_of(tmp_path, b'"x"\n' + content + b'\n"y"\n')
    assert (first.problem, last.problem) == (None, None)
    assert bad.number == 2
    assert bad.problem is not None
    assert bad.problem.startswith(problem)


def test_two_requests_of_one_name_could_not_be_told_apart(tmp_path) -> None:
    encoded = json.dumps(REQUEST).encode()
    _, second = lines_of(tmp_path, encoded + b"\n" + encoded)
    assert second.problem == "custom_id 'a' is that of line 1 already: each must be another"


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InvalidRequest, match=f"the input {path} cannot be read"):
            list(read_lines(path, {}))
