"""onekernel launch: start a coding agent or a chat front end on a running server."""

from __future__ import annotations

import argparse

SUMMARY = "start a coding agent or chat front end on a running server"
EXAMPLES = (
    "onekernel launch codex",
    'onekernel launch claude -- -p "What does this project do?"',
    "onekernel launch opencode --url http://127.0.0.1:9000",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from onekernel.cli import options
    from onekernel.launch.clients import CLIENTS

    parser.usage = "onekernel launch CLIENT [options] [-- arguments of the client]"
    parser.add_argument("client", choices=CLIENTS, metavar="CLIENT", help=", ".join(CLIENTS))
    options.add_server(parser)
    parser.add_argument("--model", metavar="ID", help="a model of the server (default: the first that it lists)")


def run(arguments: argparse.Namespace) -> int:
    from onekernel.launch.run import run as start
    from onekernel.launch.server import ask

    return start(arguments.client, ask(arguments.url, arguments.key, arguments.model), arguments.passed_on)
