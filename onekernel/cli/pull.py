"""onekernel pull: download a model."""

from __future__ import annotations

import argparse

from onekernel.cli import options

SUMMARY = "download a model, or finish a download that broke off"
EXAMPLES = ("onekernel pull Qwen/Qwen3.5-0.8B",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name on the Hugging Face hub, or NAME@REVISION")
    parser.epilog = f"{parser.epilog}\n\nHF_HOME, HF_TOKEN and HF_HUB_OFFLINE are respected."


def run(arguments: argparse.Namespace) -> int:
    from onekernel.checkpoint import hub

    with options.exit_at_interrupt():
        folder = hub.resolve(arguments.model)
    print(folder)
    return 0
