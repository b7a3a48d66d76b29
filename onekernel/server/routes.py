"""Every path of the server in one table: the application and the OpenAPI document are both made from it."""

from __future__ import annotations

from dataclasses import dataclass

from onekernel.server import (
    chat_completions,
    chat_page,
    completions,
    health,
    messages,
    models,
    responses,
    tokenize,
)
from onekernel.server.errors import Handler

JSON, EVENTS, PLAIN, HTML = "application/json", "text/event-stream", "text/plain", "text/html"


@dataclass(frozen=True)
class Operation:
    """Attributes:
    fields: the struct of the request's body; None: no body.
    required: names that the JSON of the answer always has.
    content: types of the answer's content.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    fields: type | None = None
    required: tuple[str, ...] = ()
    content: tuple[str, ...] = (JSON,)
    shown: bool = True  # in the document


OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        chat_completions.chat_completions,
        "Answer a conversation (OpenAI's chat completions)",
        chat_completions.ChatFields,
        ("id", "object", "created", "model", "choices", "usage"),
        (JSON, EVENTS),
    ),
    Operation(
        "POST",
        "/v1/completions",
        completions.completions,
        "Continue a text (OpenAI's completions)",
        completions.CompletionFields,
        ("id", "object", "created", "model", "choices", "usage"),
        (JSON, EVENTS),
    ),
    Operation(
        "POST",
        "/v1/responses",
        responses.responses,
        "Answer a conversation (OpenAI's Responses); nothing is stored",
        responses.ResponseFields,
        ("id", "object", "created_at", "status", "model", "output", "usage"),
        (JSON, EVENTS),
    ),
    Operation(
        "POST",
        "/v1/messages",
        messages.messages,
        "Answer a conversation (Anthropic's Messages)",
        messages.MessageFields,
        ("id", "type", "role", "model", "content", "stop_reason", "usage"),
        (JSON, EVENTS),
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        messages.count_tokens,
        "Count the tokens of a conversation (Anthropic)",
        messages.CountFields,
        ("input_tokens",),
    ),
    Operation("GET", "/v1/models", models.list_models, "The model that is served", required=("object", "data")),
    Operation("GET", "/v1/models/{model:path}", models.get_model, "The same model by its name", required=("id",)),
    Operation(
        "POST",
        "/tokenize",
        tokenize.tokenize,
        "The tokens of a text or a conversation",
        tokenize.TokenizeFields,
        ("tokens", "count"),
    ),
    Operation(
        "POST", "/detokenize", tokenize.detokenize, "The text of tokens", tokenize.DetokenizeFields, ("content",)
    ),
    Operation("GET", "/health", health.health, "Whether the server can serve at all", required=("status",)),
    Operation("GET", "/ready", health.ready, "Whether a request would be taken on now", required=("status",)),
    Operation("GET", "/version", health.version, "The version of onekernel", required=("version",)),
    Operation("GET", "/props", health.props, "What is served, and on what", required=("default_generation_settings",)),
    Operation("GET", "/v1/props", health.props, "The same", shown=False),
    Operation("GET", "/metrics", health.metrics, "Metrics in Prometheus' format", content=(PLAIN,)),
    Operation("GET", "/", chat_page.page, "The chat page", content=(HTML,), shown=False),
    Operation("GET", "/page/{name}", chat_page.page, "Files of the chat page", content=(HTML,), shown=False),
)
