"""onekernel batch: answer a file of requests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onekernel.cli import options
from onekernel.errors import InvalidRequest

if TYPE_CHECKING:
    from onekernel.batch.job import Progress

SUMMARY = "answer a file of requests or prompts, one a line"
EXAMPLES = (
    "onekernel batch requests.jsonl -o answers.jsonl --model Qwen/Qwen3.5-0.8B",
    "onekernel batch prompts.jsonl -o answers.jsonl --max-tokens 100 --temperature 0",
)
MEMORY_S = 600.0  # the speed of the last ten minutes tells the time left: a line may take one of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, metavar="IN", help="requests in OpenAI's batch format, or plain prompts as JSON strings"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="where to; what it holds is not done again"
    )
    options.add_model(parser)
    parser.add_argument("--max-concurrent", type=options.positive, metavar="N", help="lines to work on at a time")
    parser.add_argument(
        "--max-tokens",
        type=options.positive,
        default=256,
        metavar="N",
        help="of a plain prompt: at most N new tokens (default 256)",
    )
    options.add_sampling(parser, logprobs=False, note="For plain prompts: requests bring their own.")


def run(arguments: argparse.Namespace) -> int:
    plain = plain_options(arguments)
    from onekernel.batch import job
    from onekernel.batch.output import Output

    # All that is wrong with the files is found before a model is downloaded and loaded.
    plan = job.make_plan(arguments.input, plain)
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise InvalidRequest(f"the output {arguments.output} is the input: choose another file")
    name = options.short_name(arguments.model)
    total = len(plan.digests)
    # The whole name, not the short one: models/1/final and models/2/final are two models.
    with Output(arguments.output, arguments.model, plan.digests) as output:
        if len(output.done) == total:
            print(f"all {total} lines were done before, {output.failed} of them failed", file=sys.stderr)
            return 1 if output.failed else 0
        if output.done:
            print(f"{len(output.done)} of {total} lines were done before: going on", file=sys.stderr)
        _tell(plan.problems)
        concurrent = arguments.max_concurrent
        with options.load_model(arguments) as model:
            try:
                with progress_bar(total, len(output.done)) as show:
                    progress = job.run(model, name, plan, output, show, concurrent)
            except BaseException:
                print(f"{len(output.done)} of {total} lines are done: the same command goes on there", file=sys.stderr)
                raise
    _tell(progress.problems)
    print(statistics(progress), file=sys.stderr)
    return 1 if progress.failed else 0


def plain_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options for plain prompts as fields of /v1/completions. Raises InvalidRequest."""
    fields = {"max_tokens": arguments.max_tokens, **options.sampling_options(arguments)}
    if arguments.stop:
        fields["stop"] = arguments.stop
    if "logit_bias" in fields:  # token ids are strings in JSON
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    return fields


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that moves the bar. Where standard error is no terminal there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tok/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Bar(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=MEMORY_S
    ) as bar:
        task = bar.add_task("", total=total, completed=done, rate=0.0, failed="")

        def show(progress: Progress) -> None:
            failed = f"{progress.failed} failed" if progress.failed else ""
            bar.update(task, completed=progress.done, rate=progress.tokens_per_s, failed=failed)

        yield show


def statistics(progress: Progress) -> str:
    """For example "100 lines, 2 failed, 5120 tokens in 12.0 s, 426.7 tokens/s"."""
    return (
        f"{progress.total} lines, {progress.failed} failed, {progress.completion_tokens} tokens in "
        f"{progress.seconds:.1f} s, {progress.tokens_per_s:.1f} tokens/s"
    )


def _tell(problems: list[str]) -> None:
    from onekernel.batch.job import ENOUGH_TOLD

    for problem in problems[:ENOUGH_TOLD]:
        print(f"onekernel: {problem}", file=sys.stderr)
    if len(problems) > ENOUGH_TOLD:
        print(f"onekernel: and {len(problems) - ENOUGH_TOLD} more like these", file=sys.stderr)
