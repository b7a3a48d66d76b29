"""Options that several verbs share, and the one line of statistics under an answer."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onekernel.api import Model
    from onekernel.stream import Completion

SERVER = "http://127.0.0.1:8000"  # where `onekernel serve` listens unless told otherwise
INTERRUPTED = 130  # exit code: the shell's 128 + SIGINT

# flag, type, metavar, help. The flag is the name of the field of SamplingParams, which checks the range.
SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("temperature", float, "T", "0 is greedy; higher is more varied"),
    ("top_k", int, "K", "only the K most probable tokens; 0 is all"),
    ("top_p", float, "P", "only the most probable tokens that together reach probability P"),
    ("min_p", float, "P", "only tokens at least P times as probable as the most probable one"),
    ("presence_penalty", float, "X", "subtracted once from every token that was generated"),
    ("frequency_penalty", float, "X", "subtracted for each time that a token was generated"),
    ("repetition_penalty", float, "X", "divides the logits of tokens seen before; 1 is none"),
    ("seed", int, "N", "makes the choice of tokens repeatable"),
    ("logprobs", int, "N", "report log-probabilities of the chosen and the N best tokens (with --json)"),
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="demo", metavar="MODEL", help="demo (the default), a folder or a name on the hub"
    )
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the fastest that runs here"
    )
    parser.add_argument("--max-context", type=positive, metavar="N", help="tokens that a conversation can hold")


def load_model(arguments: argparse.Namespace) -> Model:
    """The model that the options of `add_model` name; says on standard error what it takes."""
    from onekernel import api

    with exit_at_interrupt():
        return api.load(
            arguments.model,
            backend=arguments.backend,
            max_context=arguments.max_context,
            report=lambda line: print(line, file=sys.stderr),
        )


def short_name(model: str) -> str:
    """What the APIs call the model that --model names."""
    return model.rstrip("/").split("/")[-1]


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=SERVER, metavar="URL", help=f"the address of the server (default {SERVER})")
    parser.add_argument("--key", metavar="KEY", help="an API key of the server, if it wants one")


@contextlib.contextmanager
def exit_at_interrupt() -> Iterator[None]:
    """Within it, ctrl-C ends the program at once.

    A download runs in threads, which Python would wait for until they are done. Files that are complete are kept.
    """
    from onekernel.checkpoint import hub

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = hub.partial_files()

    def handle(number: int, frame: FrameType | None) -> None:
        for path in hub.partial_files() - before:  # they would never be used again
            path.unlink(missing_ok=True)
        os.write(sys.stderr.fileno(), b"\nonekernel: interrupted\n")
        os._exit(INTERRUPTED)

    usual = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def add_sampling(parser: argparse.ArgumentParser, *, logprobs: bool = True, note: str = "") -> None:
    text = "What is not given comes from the model's generation_config.json."
    group = parser.add_argument_group("sampling", f"{note} {text}".strip())
    for name, kind, metavar, text in SAMPLING:
        if name == "logprobs" and not logprobs:
            continue
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=X",
        help="add X to the logit of token ID (-inf forbids it); may be repeated",
    )
    group.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT appears; may be repeated",
    )


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, as keyword arguments of Model.generate.

    Raises:
        InvalidRequest: a value is out of range. To be found out before a model is downloaded and loaded.
    """
    from onekernel.sampling.params import SamplingParams

    given = {name: getattr(arguments, name) for name, *_ in SAMPLING if getattr(arguments, name, None) is not None}
    if arguments.logit_bias:
        given["logit_bias"] = dict(arguments.logit_bias)
    SamplingParams(**given)
    return given


def statistics(completion: Completion, backend: str) -> str:
    """For example "57 tokens, first after 0.12 s, then 41.3 tokens/s, stop, cpu"."""
    parts = [f"{completion.usage.completion_tokens} tokens"]
    if completion.ttft_s is not None:
        parts.append(f"first after {completion.ttft_s:.2f} s")
    if completion.decode_tokens_per_s is not None:
        parts.append(f"then {completion.decode_tokens_per_s:.1f} tokens/s")
    return ", ".join([*parts, completion.finish_reason, backend])


def positive(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the text to stop at is empty")
    return text


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X, a token id and a number") from None
