"""GET /v1/models and /v1/models/{id}: the one model there is, in the words of all clients that ask."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from onekernel.server.errors import RequestError
from onekernel.server.service import Service

EPOCH = "2026-01-01T00:00:00Z"


def described(service: Service) -> dict[str, Any]:
    """OpenAI's fields, then Anthropic's, then those that clients look for to learn the size of the context."""
    name, context = service.settings.model_name, service.max_context
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "onekernel",
        "type": "model",
        "display_name": name,
        "created_at": EPOCH,
        "lifecycle": "active",
        "context_length": context,
        "max_context_length": context,
        "max_model_len": context,
        "max_input_tokens": context - 1,
        "max_tokens": context,
    }


def codex_entry(service: Service) -> dict[str, Any]:
    """The catalogue entry of Codex: without one it guesses the context, and sends four times as long a prompt."""
    name = service.settings.model_name
    efforts = [("low", "thinks briefly"), ("medium", "thinks"), ("high", "thinks at length")]
    return {
        "slug": name,
        "display_name": name,
        "description": f"{name} on this machine",
        "default_reasoning_level": "medium",
        "supported_reasoning_levels": [{"effort": effort, "description": text} for effort, text in efforts],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "support_verbosity": False,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "experimental_supported_tools": [],
        "context_window": service.max_context,
        "multi_agent_version": "disabled",
        "input_modalities": ["text"],
        "base_instructions": CODEX_INSTRUCTIONS,
    }


CODEX_INSTRUCTIONS = """\
You are a coding agent. You work in the user's terminal, in the folder that is open, until the task is done.

- Look before you change: read the files that matter, and search with `rg` where it is installed.
- Use the shell tool to run commands and to edit files. Make the smallest change that does what was asked, in the style
  of the code around it. Do not touch what has nothing to do with the task.
- Check your work: run the tests, or the program, where that is possible. Report what you saw, not what you expect.
- Never delete or overwrite the user's work, and never run destructive git commands, unless you were asked to.
- Say shortly what you are about to do before a longer series of commands. When you are done, say what you changed and
  how it can be checked, in a few lines. Mention files by their paths.
"""


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    entry = described(service)
    answer: dict[str, Any] = {
        "object": "list",
        "data": [entry],
        "has_more": False,
        "first_id": entry["id"],
        "last_id": entry["id"],
    }
    if "client_version" in request.query_params:  # Codex
        answer["models"] = [codex_entry(service)]
    return JSONResponse(answer)


async def get_model(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.path_params["model"]
    if name != service.settings.model_name:
        raise RequestError(
            f"there is no model {name!r} here, but {service.settings.model_name!r}",
            status=404,
            code="model_not_found",
            parameter="model",
        )
    return JSONResponse(described(service))
