"""onekernel generate: continue a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from onekernel.cli import options
from onekernel.errors import InvalidRequest

SUMMARY = "continue a text"
EXAMPLES = (
    'onekernel generate "def bisect_right(a, x,"',
    'onekernel generate --model Qwen/Qwen3.5-0.8B --temperature 0.7 --max-tokens 100 "Once upon a time"',
    'cat start.py | onekernel generate - --stop "class " --json',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    options.add_model(parser)
    parser.add_argument(
        "--max-tokens", type=options.positive, default=256, metavar="N", help="at most N new tokens (default 256)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when done instead of streaming")
    options.add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    # What is wrong with the request should not come out after a long download.
    if not prompt:
        raise InvalidRequest("the prompt is empty: give a text to continue")
    if arguments.logprobs is not None and not arguments.json:
        raise InvalidRequest("--logprobs is shown with --json only: add it")
    sampling = options.sampling_options(arguments)
    with options.load_model(arguments) as model:
        stream = model.stream(prompt, max_tokens=arguments.max_tokens, stop=arguments.stop, **sampling)
        with stream:
            for chunk in stream:
                if not arguments.json:
                    print(chunk.text, end="", flush=True)
        completion, backend = stream.completion, model.engine.name
    if arguments.json:
        print(json.dumps({"model": arguments.model, "backend": backend, **dataclasses.asdict(completion)}))
    else:
        print(flush=True)
        print(options.statistics(completion, backend), file=sys.stderr)
    return 0
