"""`onekernel serve` with a model that plays an agent: it calls a shell tool once, then says that it is done.

A small model cannot decide to call a tool, so this one is a script. All around it is real: the tokenizer and the chat
template of the demo model, the scheduler, the parser of tool calls and the server. What the script says depends on the
prompt alone, so it is right for every client:

- after the result of a tool it says that it is done;
- with a tool that runs commands it thinks, if asked to, and calls it to make a file;
- without one (clients also ask for titles) it gives a title.

    python tests/clients/scripted_agent.py FILE [options of onekernel serve]
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onekernel.api
from onekernel.api import Model
from onekernel.backend.fake import FakeBackend
from onekernel.cli import main
from onekernel.engine import Engine
from onekernel.text.tokenizer import Tokenizer

DEMO = Path(onekernel.__file__).parent / "demo"
MAX_CONTEXT = 200_000  # some clients begin with tens of thousands of the demo model's small tokens
TITLE = "Make a file"
DONE = "Done: the file is there."
# Tools of agents that run a command, and the name of their parameter for it.
SHELLS = {
    "exec_command": "cmd",
    "shell_command": "command",
    "Bash": "command",
    "bash": "command",
    "run_shell_command": "command",
    "terminal": "command",
    "exec": "command",
    "make_file": "path",
}
VALUES: dict[Any, str] = {"string": "make a file", "boolean": "false", "integer": "1", "number": "1"}


def answer_to(prompt: str, file: Path) -> str:
    """What the model says after `prompt`, which ends with the opening of its turn."""
    turns = prompt.split("<|im_start|>")
    thought = "I make the file.\n</think>\n\n" if turns[-1].rstrip().endswith("<think>") else ""
    if any("\n<tool_response>\n" in turn for turn in turns):
        return thought + DONE
    for tool in tools_in(prompt):
        function = tool.get("function", tool)
        parameter = SHELLS.get(function["name"])
        if parameter is not None:
            value = str(file) if function["name"] == "make_file" else f"echo made by a tool > {file}"
            return thought + call(function, {parameter: value})
    return thought + TITLE


def tools_in(prompt: str) -> list[dict[str, Any]]:
    """The tools that the template wrote into the prompt, one a line."""
    section = re.search(r"<tools>\n(.*?)\n</tools>", prompt, re.DOTALL)
    return [json.loads(line) for line in section[1].splitlines()] if section else []


def call(function: dict[str, Any], arguments: dict[str, str]) -> str:
    """A call in the model's format; what else is required gets some value of its type."""
    parameters = function.get("parameters", {})
    for name in parameters.get("required", []):
        kind = parameters.get("properties", {}).get(name, {}).get("type")
        arguments.setdefault(name, VALUES.get(kind if isinstance(kind, str) else None, "{}"))
    blocks = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items())
    return f"<tool_call>\n<function={function['name']}>\n{blocks}</function>\n</tool_call>"


class Script:
    """The next token: of the answer to all tokens up to the opening of the last turn."""

    def __init__(self, tokenizer: Tokenizer, file: Path) -> None:
        self._tokenizer = tokenizer
        self._file = file
        start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        assert start is not None
        assert end is not None
        self._start, self._end = start, end
        # Longest first: the opening without thinking begins like the one with it.
        openings = ("<think>\n\n</think>\n\n", "<think>\n", "")
        self._openings = [tokenizer.encode(f"<|im_start|>assistant\n{opening}") for opening in openings]
        self._answer = functools.lru_cache(maxsize=64)(self._new_answer)

    def __call__(self, consumed: Sequence[int], _: int) -> int:
        at = len(consumed) - 1
        while at > 0 and consumed[at] != self._start:
            at -= 1
        opening = next((o for o in self._openings if list(consumed[at : at + len(o)]) == o), None)
        if opening is None:  # asked for within the prompt, which the prefill does: nobody samples it
            return self._end
        begin = at + len(opening)
        answer = self._answer(tuple(consumed[:begin]))
        made = len(consumed) - begin
        return answer[min(made, len(answer) - 1)]

    def _new_answer(self, prompt: tuple[int, ...]) -> list[int]:
        raw = b"".join(self._tokenizer.token_bytes(token, skip_special=False) for token in prompt)
        return [*self._tokenizer.encode(answer_to(raw.decode("utf-8", "replace"), self._file)), self._end]


def make_model(file: Path) -> Model:
    tokenizer = Tokenizer.load(DEMO)
    backend = FakeBackend(tokenizer.size, MAX_CONTEXT, Script(tokenizer, file))
    return Model("scripted", Engine(backend), tokenizer, DEMO)


if __name__ == "__main__":
    model = make_model(Path(sys.argv[1]))
    onekernel.api.load = lambda *_, **__: model  # type: ignore[assignment]
    sys.exit(main(["serve", *sys.argv[2:]]))
