"""onekernel serve: OpenAI's and Anthropic's APIs on this machine."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from onekernel.cli import options
from onekernel.errors import InvalidRequest

if TYPE_CHECKING:
    from onekernel.server.settings import Settings

SUMMARY = "serve OpenAI's and Anthropic's APIs"
EXAMPLES = (
    "onekernel serve --model Qwen/Qwen3.5-0.8B",
    "onekernel serve --port 8080 --api-key-file keys.txt --host 0.0.0.0",
)
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--name", metavar="NAME", help="what the APIs call the model (default: as --model)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    load = parser.add_argument_group("load")
    load.add_argument("--max-running", type=int, metavar="N", help="requests that share the engine at a time")
    load.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait; more get the status 429")
    load.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of one answer")
    load.add_argument("--cache-mib", type=int, metavar="N", help="memory for prefixes that were read; 0 is none")
    load.add_argument("--grace", type=float, metavar="S", help="seconds that answers have to end after SIGTERM")
    load.add_argument(
        "--deterministic", action="store_true", help="the same bits alone and in company: slower for one request alone"
    )
    who = parser.add_argument_group("who may ask")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; one of them is then needed")
    who.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server")
    who.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="web pages that may ask (or *)")
    who.add_argument("--allow-public", action="store_true", help="listen on a public address without keys")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and answers into the log")


def run(arguments: argparse.Namespace) -> int:
    from onekernel.server import run as server

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    settings = to_settings(arguments)
    # Before the weights are read: an address that cannot be had is known at once.
    with server.listen(settings) as listener, options.load_model(arguments) as model:
        server.run(model, settings, listener, lambda url: print(f"serving {settings.model_name} on {url}", flush=True))
    return 0


def to_settings(arguments: argparse.Namespace) -> Settings:
    """Raises InvalidRequest: the file of keys cannot be read, or a number makes no sense."""
    from onekernel.server.security import read_keys
    from onekernel.server.settings import Settings

    for name, least in (("max_running", 1), ("max_waiting", 0), ("max_tokens", 1), ("cache_mib", 0), ("grace", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InvalidRequest(f"--{name.replace('_', '-')} {value} must be at least {least}")
    keys = () if arguments.api_key_file is None else read_keys(arguments.api_key_file, "--api-key-file")
    given = {
        "most_running": arguments.max_running,
        "most_waiting": arguments.max_waiting,
        "max_tokens": arguments.max_tokens,
        "cache_bytes": None if arguments.cache_mib is None else arguments.cache_mib * MIB,
        "grace_s": arguments.grace,
    }
    return Settings(
        model_name=arguments.name or options.short_name(arguments.model),
        host=arguments.host,
        port=arguments.port,
        keys=keys,
        hosts=tuple(arguments.allow_host),
        origins=tuple(arguments.allow_origin),
        allow_public=arguments.allow_public,
        deterministic=arguments.deterministic,
        log_prompts=arguments.log_prompts,
        **{name: value for name, value in given.items() if value is not None},
    )
