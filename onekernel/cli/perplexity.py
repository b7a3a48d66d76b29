"""onekernel perplexity: how well a model predicts a text."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from onekernel.cli import options
from onekernel.errors import InvalidRequest

SUMMARY = "measure how well a model predicts a text"
EXAMPLES = (
    "onekernel perplexity README.md",
    "onekernel perplexity --model Qwen/Qwen3.5-0.8B --context 2048 wiki.test.raw",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a text file (UTF-8); - reads standard input")
    options.add_model(parser)
    parser.add_argument(
        "--context",
        type=options.positive,
        default=2048,
        metavar="N",
        help="cut the text into windows of N tokens, each predicted from its own beginning (default 2048)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.file == "-" else _read(Path(arguments.file))
    with options.load_model(arguments) as model:
        from onekernel.engine.perplexity import perplexity

        tokens = model.tokenizer.encode(text)
        start = time.perf_counter()
        result = perplexity(model.engine, tokens, min(arguments.context, model.engine.max_context))
        seconds = time.perf_counter() - start
        backend = model.engine.name
    if arguments.json:
        record = {
            "model": arguments.model,
            "backend": backend,
            "perplexity": result.value,
            "mean_log_probability": result.mean_log_probability,
            "tokens": result.tokens,
            "windows": result.windows,
            "seconds": seconds,
        }
        print(json.dumps(record))
    else:
        print(f"perplexity {result.value:.4f}")
        windows = f"{result.windows} window{'s' if result.windows > 1 else ''}"
        print(
            f"{result.tokens} tokens in {windows}, {result.tokens / seconds:,.0f} tokens/s, {backend}", file=sys.stderr
        )
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be read ({error.strerror}): name a text file, or - for standard input"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        ) from None
