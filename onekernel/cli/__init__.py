"""The command line: `main` finds the verb; each verb is a file with SUMMARY, EXAMPLES, add_arguments and run."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import onekernel
from onekernel.cli import batch, bench, chat, compile, doctor, generate, launch, models, perplexity, probe, pull, serve
from onekernel.cli.options import INTERRUPTED
from onekernel.errors import OnekernelError

# Verbs import what they need when they run: the help must come at once.
VERBS: dict[str, Any] = {
    "generate": generate,
    "chat": chat,
    "batch": batch,
    "serve": serve,
    "launch": launch,
    "probe": probe,
    "perplexity": perplexity,
    "pull": pull,
    "models": models,
    "compile": compile,
    "doctor": doctor,
    "bench": bench,
}


class Parser(argparse.ArgumentParser):
    """One line for a mistake instead of the whole usage; an option is meant only if it is spelled out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"onekernel: {message}\nTry '{self.prog} --help'.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What is left over is an error here, where the options are known that may have been meant."""
        parsed, unknown = super().parse_known_args(args, namespace)
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if options:
            self.error(f"unknown option {options[0]}{_meant(options[0], self._option_string_actions)}")
        if unknown:
            self.error(f"one argument too many: {unknown[0]!r} (quote a text that holds spaces)")
        return parsed, unknown


def make_parser() -> Parser:
    summaries = "\n".join(f"  {name:<10} {verb.SUMMARY}" for name, verb in VERBS.items())
    parser = Parser(
        prog="onekernel",
        usage="onekernel VERB [arguments] [options]",
        description=f"A local inference engine for the dense Qwen3.5 family.\n\nverbs:\n{summaries}",
        epilog="examples:\n"
        '  onekernel generate "def bisect_right(a, x,"\n'
        "  onekernel chat --model Qwen/Qwen3.5-0.8B\n"
        "  onekernel generate --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"onekernel {onekernel.__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", help=argparse.SUPPRESS, prog="onekernel", parser_class=Parser
    )
    for name, verb in VERBS.items():
        verb.add_arguments(
            verbs.add_parser(
                name,
                description=verb.SUMMARY[0].upper() + verb.SUMMARY[1:] + ".",
                epilog="examples:\n" + "\n".join(f"  {line}" for line in verb.EXAMPLES),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _forgive_encodings()
    parser = make_parser()
    try:
        if not arguments:
            parser.print_help(sys.stderr)
            return 2
        _check_verb(parser, arguments[0])
        own, passed_on = _split(arguments)
        parsed = parser.parse_args(own)
        parsed.passed_on = passed_on
        code: int = VERBS[parsed.verb].run(parsed)
        sys.stdout.flush()
        return code
    except OnekernelError as error:
        print(f"onekernel: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(our arguments, those after `--` that `launch` passes on to another program)."""
    if arguments[0] != "launch" or "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _check_verb(parser: Parser, verb: str) -> None:
    if verb.startswith("-") or verb in VERBS:
        return
    meant = _meant(verb, VERBS) or f": the verbs are {', '.join(VERBS)}"
    parser.error(f"unknown verb {verb!r}{meant}")


def _meant(word: str, known: Iterable[str]) -> str:
    # Without their dashes: all options have those in common.
    names = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.lstrip("-"), names, 1)
    return f": did you mean {names[close[0]]!r}?" if close else ""


def _forgive_encodings() -> None:
    """Output that the terminal cannot show becomes "?", and input that is not UTF-8 is refused where it is used."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
