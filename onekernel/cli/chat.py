"""onekernel chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from onekernel.cli import options
from onekernel.errors import InvalidRequest

if TYPE_CHECKING:
    from onekernel.conversation import Conversation

SUMMARY = "talk with a model in the terminal"
EXAMPLES = (
    "onekernel chat --model Qwen/Qwen3.5-0.8B",
    'onekernel chat --model Qwen/Qwen3.5-0.8B --no-thinking --system "Answer in one sentence."',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether the model thinks before it answers (default: as its template says)",
    )
    parser.add_argument("--max-tokens", type=options.positive, metavar="N", help="at most N tokens an answer")
    options.add_sampling(parser, logprobs=False)


def run(arguments: argparse.Namespace) -> int:
    from onekernel.conversation import Conversation

    sampling = options.sampling_options(arguments)
    with options.load_model(arguments) as model:
        conversation = Conversation(
            model,
            model.sampling_params(**sampling),
            system=arguments.system,
            thinking=arguments.thinking,
            max_tokens=arguments.max_tokens,
            stop=tuple(arguments.stop),
        )
        if sys.stdin.isatty():
            # Editing of the line and a history of questions; Windows consoles have their own.
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")
            print("ctrl-C stops an answer; ctrl-D or /exit leaves", file=sys.stderr)
        while (question := _read_question()) is not None:
            if question.strip():
                _answer(conversation, question, model.engine.name)
    return 0


def _read_question() -> str | None:
    """The next line of the user, or None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    return None if line.strip() == "/exit" else line


def _answer(conversation: Conversation, question: str, backend: str) -> None:
    try:
        with _first_interrupt(conversation.cancel):
            for chunk in conversation.ask(question):
                print(chunk.text, end="", flush=True)
    except InvalidRequest as error:
        print(f"onekernel: {error}", file=sys.stderr)
        return
    print(flush=True)
    if conversation.completion is not None:
        from rich.console import Console

        line = options.statistics(conversation.completion, backend)
        Console(stderr=True, highlight=False, markup=False).print(line, style="dim")


@contextlib.contextmanager
def _first_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Within it, the first ctrl-C calls `cancel`; the second raises KeyboardInterrupt as usual."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, usual)
        cancel()

    usual = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
