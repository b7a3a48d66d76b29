"""onekernel models: what is on this machine, and what could be."""

from __future__ import annotations

import argparse
import dataclasses
import json

SUMMARY = "list the models on this machine and those that can be pulled"
EXAMPLES = ("onekernel models", "onekernel models --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    from onekernel.checkpoint import hub

    models = hub.list_models()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(model) for model in models], default=str))
        return 0
    return 0
