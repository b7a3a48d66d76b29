"""How each client is pointed at a server: one function a client, and the table of all of them.

Everything a client is told stands in files of a temporary folder and in environment variables, so that the user's own
configuration is neither read nor changed. What each of them needs was found by running it; docs/clients.md tells with
which version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onekernel.launch.client import Client, Server, Setup

PROVIDER = "onekernel"  # the name of the server within a client's configuration
PATIENCE_MS = 600_000  # that a client waits for a token: the prefill of a long prompt on a CPU takes its time


def codex(server: Server, folder: Path) -> Setup:
    """Responses API. The catalogue tells it the size of the context and replaces a system prompt of 17 kB and tools of
    10 kB, made for another model, which would all have to be prefilled."""
    config = {
        "model": server.model,
        "model_provider": PROVIDER,
        "model_catalog_json": str(folder / "catalogue.json"),
        "check_for_update_on_startup": False,
    }
    tables: dict[str, dict[str, object]] = {
        "analytics": {"enabled": False},
        "features": {"daemon_auto_start": False},  # a background server would outlive its configuration
        f"model_providers.{PROVIDER}": {
            "name": PROVIDER,
            "base_url": server.openai_url,
            "wire_api": "responses",
            "experimental_bearer_token": server.key,
            "stream_idle_timeout_ms": PATIENCE_MS,
        },
    }
    entry = {
        "slug": server.model,
        "display_name": server.model,
        "description": "a local model",
        "supported_reasoning_levels": [{"effort": "medium", "description": "thinks as the model does"}],
        "default_reasoning_level": "medium",
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": 0,
        "support_verbosity": False,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "experimental_supported_tools": [],
        "input_modalities": ["text"],
        "context_window": server.context,
        "multi_agent_version": "disabled",
        "base_instructions": CODEX_INSTRUCTIONS,
    }
    files = {"config.toml": _toml(config, tables), "catalogue.json": _json({"models": [entry]})}
    return Setup({"CODEX_HOME": str(folder)}, files)


CODEX_INSTRUCTIONS = (
    "You are Codex, a coding agent in the user's terminal. Work on the task until it is done: read files before you "
    "change them, keep changes small and in the style of the code around them, run the tests if there are any, and say "
    "in the end in a few sentences what you did. Use the tools; do not print commands for the user to run. Never undo "
    "changes that you did not make, and ask before anything that destroys data."
)


def claude(server: Server, folder: Path) -> Setup:
    """Messages API. Without the context size Claude Code counts on a million tokens."""
    models = {f"ANTHROPIC_DEFAULT_{tier}_MODEL": server.model for tier in ("OPUS", "SONNET", "HAIKU", "FABLE")}
    environment = {
        "CLAUDE_CONFIG_DIR": str(folder),
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.key,
        "ANTHROPIC_MODEL": server.model,
        **models,
        "CLAUDE_CODE_SUBAGENT_MODEL": server.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(server.context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(server.max_output),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        # A line that differs from session to session at the very beginning of the prompt: no prefix could be reused.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "API_TIMEOUT_MS": str(PATIENCE_MS),
    }
    files = {
        ".claude.json": _json({"hasCompletedOnboarding": True}),
        # Otherwise it registers itself with the user's desktop as the handler of its links.
        "settings.json": _json({"disableDeepLinkRegistration": "disable"}),
    }
    return Setup(environment, files)


def opencode(server: Server, folder: Path) -> Setup:
    """Chat completions. Configuration, sessions and caches follow the XDG folders."""
    model = f"{PROVIDER}/{server.model}"
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": model,
        "small_model": model,
        "autoupdate": False,
        "share": "disabled",
        "enabled_providers": [PROVIDER],
        "provider": {
            PROVIDER: {
                "npm": "@ai-sdk/openai-compatible",
                "name": PROVIDER,
                "options": {"baseURL": server.openai_url, "apiKey": server.key, "timeout": PATIENCE_MS},
                "models": {
                    server.model: {
                        "name": server.model,
                        "reasoning": True,
                        "tool_call": True,
                        "limit": {"context": server.context, "output": server.max_output},
                    }
                },
            }
        },
    }
    folders = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "STATE", "CACHE")}
    environment = {**folders, "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    return Setup(environment, {"config/opencode/opencode.json": _json(config)})


def pi(server: Server, folder: Path) -> Setup:
    """Chat completions."""
    provider = {
        "baseUrl": server.openai_url,
        "api": "openai-completions",
        "apiKey": server.key,
        "models": [_model(server)],
    }
    files = {
        "models.json": _json({"providers": {PROVIDER: provider}}),
        "settings.json": _json({"defaultProvider": PROVIDER, "defaultModel": server.model}),
    }
    # Offline is about its own services (updates, telemetry), not about the model.
    return Setup({"PI_CODING_AGENT_DIR": str(folder), "PI_OFFLINE": "1"}, files)


def qwen(server: Server, folder: Path) -> Setup:
    """Chat completions."""
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": server.model, "generationConfig": {"contextWindowSize": server.context}},
        "general": {"enableAutoUpdate": False},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
    }
    environment = {
        "QWEN_HOME": str(folder),
        "OPENAI_BASE_URL": server.openai_url,
        "OPENAI_API_KEY": server.key,
        "OPENAI_MODEL": server.model,
        "QWEN_CODE_MAX_OUTPUT_TOKENS": str(server.max_output),
    }
    return Setup(environment, {"settings.json": _json(settings)})


def hermes(server: Server, folder: Path) -> Setup:
    """Chat completions. JSON is YAML."""
    config = {
        "model": {
            "default": server.model,
            "provider": f"custom:{PROVIDER}",
            "base_url": server.openai_url,
            "api_key": server.key,
            "api_mode": "chat_completions",
            "context_length": server.context,
            "max_tokens": server.max_output,
        },
        "custom_providers": [
            {
                "name": PROVIDER,
                "base_url": server.openai_url,
                "api_key": server.key,
                "api_mode": "chat_completions",
                "models": {server.model: {"context_length": server.context}},
            }
        ],
        "terminal": {"backend": "local", "cwd": "."},
    }
    return Setup({"HERMES_HOME": str(folder)}, {"config.yaml": _json(config)})


def openclaw(server: Server, folder: Path) -> Setup:
    """Chat completions. Without the compat entry it asks for no usage and never knows how full the context is."""
    model = {
        **_model(server),
        "name": server.model,
        "compat": {"supportsUsageInStreaming": True},
    }
    provider = {
        "baseUrl": server.openai_url,
        "apiKey": server.key,
        "api": "openai-completions",
        "timeoutSeconds": PATIENCE_MS // 1000,
        "models": [model],
    }
    defaults = {
        "model": {"primary": f"{PROVIDER}/{server.model}"},
        "workspace": str(folder / "workspace"),
        "skipBootstrap": True,
    }
    config = {
        "agents": {"defaults": defaults},
        "models": {"mode": "replace", "providers": {PROVIDER: provider}},
    }
    environment = {
        "OPENCLAW_STATE_DIR": str(folder),
        "OPENCLAW_CONFIG_PATH": str(folder / "openclaw.json"),
        "OPENCLAW_NO_AUTO_UPDATE": "1",
    }
    return Setup(environment, {"openclaw.json": _json(config), "workspace/.keep": ""})


def openwebui(server: Server, folder: Path) -> Setup:
    """Chat completions, in the browser. Chats of this start are gone after it, as everything in the folder."""
    environment = {
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": folder.name,
        "WEBUI_AUTH": "False",
        "OPENAI_API_BASE_URL": server.openai_url,
        "OPENAI_API_KEY": server.key,
        "ENABLE_OLLAMA_API": "False",
        "DEFAULT_MODELS": server.model,
        # No downloads: documents go into the prompt whole instead of through an embedding model.
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",
        "RAG_OPENAI_API_BASE_URL": server.openai_url,
        "AUDIO_STT_ENGINE": "openai",
        "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
        "ANONYMIZED_TELEMETRY": "False",
        "DO_NOT_TRACK": "true",
    }
    return Setup(environment)


CLIENTS: dict[str, Client] = {
    "codex": Client("Codex", "codex", "npm install -g @openai/codex", codex, ("CODEX_", "OPENAI_")),
    "claude": Client(
        "Claude Code",
        "claude",
        "npm install -g @anthropic-ai/claude-code",
        claude,
        ("ANTHROPIC_", "CLAUDE_"),
    ),
    "opencode": Client("OpenCode", "opencode", "npm install -g opencode-ai", opencode, ("OPENCODE_",)),
    "pi": Client("Pi", "pi", "npm install -g @earendil-works/pi-coding-agent", pi, ("PI_",)),
    "qwen": Client("Qwen Code", "qwen", "npm install -g @qwen-code/qwen-code", qwen, ("QWEN_", "OPENAI_")),
    "hermes": Client(
        "Hermes",
        "hermes",
        "pip install hermes-agent",
        hermes,
        ("HERMES_", "OPENAI_"),
        least_context=64_000,
    ),
    "openclaw": Client(
        "OpenClaw",
        "openclaw",
        "npm install -g openclaw",
        openclaw,
        ("OPENCLAW_", "OPENAI_"),
        arguments=("chat",),
    ),
    "openwebui": Client(
        "Open WebUI",
        "open-webui",
        "pip install open-webui",
        openwebui,
        ("WEBUI_", "OPENAI_", "OLLAMA_"),
        arguments=("serve", "--host", "127.0.0.1", "--port", "3000"),
    ),
}


def _model(server: Server) -> dict[str, Any]:
    """The description of a model that Pi and OpenClaw share."""
    return {
        "id": server.model,
        "reasoning": True,
        "input": ["text"],
        "contextWindow": server.context,
        "maxTokens": server.max_output,
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
    }


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _toml(top: Mapping[str, object], tables: Mapping[str, Mapping[str, object]]) -> str:
    """TOML of strings, numbers and truth values: for these its notation is that of JSON."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in top.items()]
    for table, values in tables.items():
        lines += ["", f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"
