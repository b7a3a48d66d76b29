"""onekernel doctor: what this machine has, and which backend would run and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import onekernel

SUMMARY = "say what this machine has, and which backend would run and why"
EXAMPLES = ("onekernel doctor", "onekernel doctor --json", "onekernel doctor --model Qwen/Qwen3.5-0.8B")
GIB = 2**30
SEQUENCE_TOKENS = 4096  # of the sequences that are counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="say what this one, if it is here, takes, and what fits beside it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    facts = examine()
    if arguments.model is not None:
        facts["model"] = examine_model(arguments.model, facts)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in _rows(facts):
        print(f"{name:<24}{value}")
    return 0


def examine() -> dict[str, Any]:
    """All facts, as they go into the JSON. Sizes are in bytes; what is not known is None."""
    from huggingface_hub import constants

    from onekernel.backend.choose import choose
    from onekernel.backend.memory import available_memory
    from onekernel.gpu.device import describe

    choice = choose("auto")
    return {
        "onekernel": onekernel.__version__,
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "memory_available": available_memory(),
        "hub_cache": constants.HF_HUB_CACHE,
        "hub_offline": constants.HF_HUB_OFFLINE,
        "gpu": describe(),
        "backend": choice.name,
        "backend_reason": choice.reason,
    }


def examine_model(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a model takes on the backend that would run it. Nothing is downloaded.

    Raises:
        ModelNotFound: it is not on this machine.
    """
    from onekernel.backend.choose import choose, memory_needed, state_bytes
    from onekernel.checkpoint.hub import resolve
    from onekernel.checkpoint.shape import Shape

    shape = Shape.load(resolve(name, download=False))
    backend = choose("auto", shape).name
    free = facts["gpu"]["memory_free"] if backend == "cuda" else facts["memory_available"]
    needed, tokens = memory_needed(backend, shape), min(SEQUENCE_TOKENS, shape.max_context)
    sequence = state_bytes(backend, shape, tokens)
    return {
        "name": name,
        "backend": backend,
        "memory_needed": needed,
        "sequence_tokens": tokens,
        "sequence_bytes": sequence,
        "full_sequence_tokens": shape.max_context,
        "full_sequence_bytes": state_bytes(backend, shape, shape.max_context),
        "sequences_that_fit": None if free is None else max(0, 1 + (free - needed) // sequence),
    }


def _model_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "model" not in facts:
        return []
    model = facts["model"]
    fit = "" if model["sequences_that_fit"] is None else f"; {model['sequences_that_fit']:,} of them fit"
    return [
        ("model", f"{model['name']} on the backend {model['backend']}: {model['memory_needed'] / GIB:.2f} GiB"),
        ("a sequence", f"{model['sequence_bytes'] / 2**20:.1f} MiB with {model['sequence_tokens']:,} tokens{fit}"),
        ("a full one", f"{model['full_sequence_bytes'] / 2**20:.1f} MiB with {model['full_sequence_tokens']:,} tokens"),
    ]


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people."""
    memory = facts["memory_available"]
    return [
        ("onekernel", facts["onekernel"]),
        ("Python", f"{facts['python']} ({facts['python_executable']})"),
        ("system", f"{facts['system']}, {facts['cpu_count']} CPUs"),
        ("memory", "unknown" if memory is None else f"{memory / GIB:.1f} GiB available"),
        ("models", facts["hub_cache"] + (" (HF_HUB_OFFLINE is set)" if facts["hub_offline"] else "")),
        *((f"GPU {name.replace('_', ' ')}", _shown(name, value)) for name, value in facts["gpu"].items()),
        ("backend", f"{facts['backend']}: {facts['backend_reason']}"),
        *_model_rows(facts),
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value / GIB:.1f} GiB" if name.startswith("memory_") else str(value)
