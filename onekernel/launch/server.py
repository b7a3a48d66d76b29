"""Asks a server what it runs."""

from __future__ import annotations

from typing import Any

import httpx2

from onekernel.errors import InvalidRequest, OnekernelError
from onekernel.launch.client import Server

UNKNOWN_CONTEXT = 32_768  # tokens, for a server that does not say: a client must not count on more than there is
CONTEXT_FIELDS = ("context_length", "max_model_len", "max_context_length", "n_ctx")


def ask(url: str, key: str | None = None, model: str | None = None) -> Server:
    """Find out what the server at `url` runs.

    Args:
        url: for example http://127.0.0.1:8000; a /v1 at its end is dropped.
        key: API key; None if the server wants none.
        model: the id to use; None takes the first that the server lists.

    Raises:
        InvalidRequest: `url` is not an http address, or the server does not list `model`.
        OnekernelError: no server answers there, or it refuses; the message says what to do.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"the address {url!r} must start with http:// or https://")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # trust_env=False: a proxy of the environment has no business between us and a local server.
        answer = httpx2.get(f"{url}/v1/models", headers=headers, timeout=10, trust_env=False)
    except httpx2.RequestError as error:
        raise OnekernelError(
            f"no server answers at {url} ({error}): start one with `onekernel serve`, or name it with --url"
        ) from None
    if answer.status_code == 401:
        raise OnekernelError(f"the server at {url} wants an API key: give it with --key")
    try:
        models: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
        names = [str(entry["id"]) for entry in models]
    except (httpx2.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise OnekernelError(f"{url}/v1/models gives no list of models ({error}): is this an OpenAI API?") from None
    if not names:
        raise OnekernelError(f"the server at {url} has no model")
    if model is not None and model not in names:
        raise InvalidRequest(f"the server at {url} has no model {model!r}, but {', '.join(names)}")
    entry = models[names.index(model) if model else 0]
    context = next((int(entry[field]) for field in CONTEXT_FIELDS if entry.get(field)), UNKNOWN_CONTEXT)
    return Server(url, str(entry["id"]), context, key or "onekernel")
