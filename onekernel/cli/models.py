"""onekernel models: what is on this machine, and what could be."""

from __future__ import annotations

import argparse
import dataclasses
import json

GIB = 2**30
SUMMARY = "list the models on this machine and those that can be pulled"
EXAMPLES = ("onekernel models", "onekernel models --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from onekernel.checkpoint import hub

    models = hub.list_models()
    absent = {name: count for name, count in hub.KNOWN_MODELS.items() if name not in {model.name for model in models}}
    if arguments.json:
        here = [{**dataclasses.asdict(model), "path": str(model.path)} for model in models]
        there = [{"name": name, "parameters": count} for name, count in absent.items()]
        print(json.dumps({"local": here, "known": there}, indent=2))
        return 0
    for model in models:
        state = "" if model.complete else f"  (incomplete: onekernel pull {model.name})"
        print(f"{model.name:<20} {model.nbytes / GIB:7.2f} GiB  {model.path}{state}")
    for name, count in absent.items():
        # bf16: 2 bytes a weight. The files hold the vision part too, so a download is somewhat larger.
        print(f"{name:<20} {2 * count / GIB:7.2f} GiB  not here: onekernel pull {name}")
    return 0
