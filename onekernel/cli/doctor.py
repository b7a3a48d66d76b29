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
EXAMPLES = ("onekernel doctor", "onekernel doctor --json")
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    facts = examine()
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
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value / GIB:.1f} GiB" if name.startswith("memory_") else str(value)
