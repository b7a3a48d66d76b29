"""A server in a thread of the test's own process, and models that play fixed texts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fakes import WatchedBackend

import onekernel
from onekernel.api import Model
from onekernel.engine import Engine
from onekernel.server import run
from onekernel.server.settings import Settings
from onekernel.text.tokenizer import Tokenizer

DEMO = Path(onekernel.__file__).parent / "demo"
KEY = "not-needed"


class ServerThread:
    """A real server on a free port of the loopback interface."""

    def __init__(self, model: Model, **settings: Any) -> None:
        self.settings = Settings(**{"port": 0, "model_name": "demo", "grace_s": 2.0, **settings})
        self.model = model
        listener = run.listen(self.settings)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        listener.listen(2048)
        self.server = run.make_server(model, self.settings)
        self.service = self.server._service
        self._thread = threading.Thread(target=self.server.run, args=([listener],), name="server")
        self._thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not end"

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Script:
    """The next tokens of a model that plays fixed answers: the n-th one in the n-th turn of a conversation."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str]) -> None:
        start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        assert start is not None
        assert end is not None
        self._start = start
        self._answers = [[*tokenizer.encode(answer), end] for answer in answers]
        # Longest first: the opening without thinking begins like the one with it.
        openings = ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n")
        self._openings = [tokenizer.encode(opening) for opening in openings]
        self._assistant = tokenizer.encode("<|im_start|>assistant\n")

    def __call__(self, consumed: Sequence[int], _: int) -> int:
        turns, at = [], 0
        for _ in range(consumed.count(self._start)):
            at = consumed.index(self._start, at) + 1
            if list(consumed[at - 1 : at - 1 + len(self._assistant)]) == self._assistant:
                turns.append(at - 1)
        if not turns:
            return self._answers[0][-1]
        begin = turns[-1]
        for opening in self._openings:
            if list(consumed[begin : begin + len(opening)]) == opening:
                begin += len(opening)
                break
        answer = self._answers[(len(turns) - 1) % len(self._answers)]
        return answer[min(len(consumed) - begin, len(answer) - 1)]


def scripted_model(*answers: str, max_context: int = 32768, delay: float = 0.0) -> Model:
    """A model with the tokenizer and the chat template of the demo model that plays `answers`."""
    tokenizer = Tokenizer.load(DEMO)
    backend = WatchedBackend(tokenizer.size, max_context, Script(tokenizer, answers), delay=delay)
    return Model("scripted", Engine(backend), tokenizer, DEMO)
