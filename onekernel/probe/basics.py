"""Checks of what belongs to no single API: health, the list of models, errors, keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from onekernel.probe import chat, messages, responses
from onekernel.probe.findings import Absent, Findings, at, is_count, items, shown
from onekernel.probe.target import Answer, Target

CONTEXT_FIELDS = ("context_length", "max_model_len", "max_context_length", "n_ctx")
LARGEST_OVERFLOW = 300_000  # tokens of context beyond which the check would have to send too much
# path, a body that is right, and the field without which it is not
APIS: tuple[tuple[str, str, Callable[[Target], dict[str, Any]], str], ...] = (
    ("chat", chat.PATH, chat.request, "messages"),
    ("responses", responses.PATH, responses.request, "input"),
    ("messages", messages.PATH, messages.request, "messages"),
)


def health(target: Target, findings: Findings) -> None:
    answer = target.get("/health")
    if answer.status == 404:
        raise Absent("GET /health answers 404")
    findings.require(answer.status == 200, f"GET /health answers {answer.status}")


def models(target: Target, findings: Findings) -> None:
    answer = target.get("/v1/models")
    if not findings.require(answer.status == 200, f"status {answer.status} instead of 200: {shown(answer.text)}"):
        return
    findings.require(at(answer.data, "object") == "list", "the list of models has not the object 'list'")
    entries = items(at(answer.data, "data"))
    findings.require(entries, "the list of models is empty")
    for entry in entries:
        findings.require(isinstance(at(entry, "id"), str) and entry["id"], f"a model has no id: {shown(entry)}")
        findings.require(at(entry, "object") == "model", "the object of a model is not 'model'")
    ours = next((entry for entry in entries if at(entry, "id") == target.model), None)
    if not findings.require(ours is not None, f"the model {target.model!r} is not in the list"):
        return
    context = told_context(ours)
    findings.note(f"context {context}" if context else "does not tell the size of the context")
    single = target.get(f"/v1/models/{quote(target.model, safe='/')}")
    if single.status != 200 or at(single.data, "id") != target.model:
        findings.note(f"/v1/models/ID answers {single.status}")


def told_context(entry: Any) -> int | None:
    """Tokens that a server says its model has room for."""
    return next((entry[name] for name in CONTEXT_FIELDS if is_count(at(entry, name))), None)


def errors(target: Target, findings: Findings) -> None:
    """What is wrong with a request is answered by 400 in the form of the API: clients repeat requests for others."""
    asked = 0
    for name, path, body, needed in APIS:
        good = body(target)
        if target.post(path, good).status in (404, 405, 501):
            continue
        asked += 1
        wrong: dict[str, Any] = {
            "a body that is not JSON": b'{"model": ',
            "a body that is not an object": [],
            f"a body without {needed}": {key: value for key, value in good.items() if key != needed},
            f"{needed} of the wrong type": {**good, needed: 7},
            "a temperature that is no number": {**good, "temperature": "hot"},
        }
        for what, content in wrong.items():
            _check_error(target.post(path, content), 400, f"{name}: {what}", name, findings)
    if not asked:
        raise Absent("no API is there")
    unknown = target.get("/v1/there-is-nothing-here")
    findings.require(unknown.status == 404, f"an unknown path is answered by {unknown.status} instead of 404")


def overflow(target: Target, findings: Findings) -> None:
    """A prompt larger than the context is refused in words that clients know, so that they compact and go on."""
    entries = items(at(target.get("/v1/models").data, "data"))
    context = next((told_context(entry) for entry in entries if at(entry, "id") == target.model), None)
    if not context or context > LARGEST_OVERFLOW:
        raise Absent("the size of the context is unknown, or too large to be filled")
    text = "one two three four five six seven eight " * (context // 8 + 200)
    for name, path, body, needed in APIS:
        request = body(target)
        request[needed] = text if needed == "input" else [{"role": "user", "content": text}]
        answer = target.post(path, request)
        if answer.status in (404, 405, 501):
            continue
        if not _check_error(answer, 400, f"{name}: a prompt beyond the context", name, findings):
            continue
        if name == "messages":
            said = "prompt is too long" in str(at(answer.data, "error", "message"))
            findings.require(said, f"{name}: the error does not say 'prompt is too long'")
        else:
            code = at(answer.data, "error", "code")
            sentence = f"{name}: the code of the error is {shown(code)}, not 'context_length_exceeded'"
            findings.require(code == "context_length_exceeded", sentence)


def keys(target: Target, findings: Findings) -> None:
    """A wrong key is refused; only if the probe was given one."""
    if target.key is None:
        raise Absent("no key was given")
    for name, path, body, _ in APIS:
        answer = target.post(path, body(target), key="wrong-key-of-the-probe")
        if answer.status == 200:
            findings.note(f"{name}: a wrong key is taken, so keys are not checked")
        elif answer.status not in (404, 405, 501):
            _check_error(answer, 401, f"{name}: a wrong key", name, findings)


def _check_error(answer: Answer, status: int, what: str, api: str, findings: Findings) -> bool:
    """Whether it is answered by `status`; the form of the error is checked in any case."""
    right = findings.require(answer.status == status, f"{what} is answered by {answer.status} instead of {status}")
    if answer.status == 200:
        return right
    error = at(answer.data, "error")
    told = isinstance(at(error, "message"), str) and error["message"] and isinstance(at(error, "type"), str)
    findings.require(
        told, f"{what}: the error has not the form {{'error': {{'message', 'type'}}}}: {shown(answer.text)}"
    )
    if api == "messages":
        findings.require(
            at(answer.data, "type") == "error", f"{what}: the error of the Messages API has no type 'error'"
        )
    return right
