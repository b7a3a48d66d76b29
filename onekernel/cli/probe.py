"""onekernel probe: check any server's conformance to the APIs that clients rely on."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onekernel.probe.run import Result

SUMMARY = "check a server's conformance to OpenAI's and Anthropic's APIs"
EXAMPLES = (
    "onekernel probe",
    "onekernel probe --url http://127.0.0.1:11434 --json",
    "onekernel probe --only chat,messages",
)
MARKS = {"ok": "ok", "fault": "FAULT", "absent": "absent"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from onekernel.cli import options

    options.add_server(parser)
    parser.add_argument("--model", metavar="ID", help="a model of the server (default: the first that it lists)")
    parser.add_argument(
        "--only",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="NAMES",
        help="only checks whose names begin with one of these; what is absent is then a fault",
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds of silence (default 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from onekernel.probe.run import run as probe

    options = {"key": arguments.key, "model": arguments.model, "only": arguments.only, "timeout_s": arguments.timeout}
    if arguments.json:
        report = probe(arguments.url, **options)
        print(json.dumps(report.as_json(), indent=2))
    else:
        report = probe(arguments.url, **options, begin=_print_server, each=_print_result)
        print(report.summary)
    return report.exit_code


def _print_server(url: str, model: str) -> None:
    print(f"{url}, model {model}", flush=True)


def _print_result(result: Result) -> None:
    notes = "; ".join(result.notes)
    print(f"{MARKS[result.status]:<7} {result.name:<22} {result.seconds:6.2f} s  {notes}".rstrip(), flush=True)
    for sentence in result.faults:
        print(f"{'':<7} {sentence}", flush=True)
