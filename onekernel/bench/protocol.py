"""How the harness talks to an engine in a process of its own: one JSON object a line, over stdin and stdout.

The engine's side is `serve(adapter)`; an adapter has a handful of methods, and all loops and clocks are here, the same
for every engine. The other side is EngineProcess (process.py). Only the standard library is imported at the top, so
that an engine may run in an interpreter of its own that has no more than what it needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

VERSION = 1


class Unavailable(Exception):
    """The engine cannot run here; the message is the reason that the table shows."""


@dataclass
class Decoded:
    """What one `decode` or `prefill` made.

    Attributes:
        tokens: the new token ids, or only how many (an engine behind a URL may tell no more).
        device_s: seconds on the GPU by its own clock, if the engine can tell.
        wall_s: if the engine has to keep the time itself (a URL: from the first to the last token); else None.
    """

    tokens: list[int] | int
    device_s: float | None = None
    wall_s: float | None = None

    @property
    def count(self) -> int:
        return self.tokens if isinstance(self.tokens, int) else len(self.tokens)


class Adapter(Protocol):
    """An engine as the harness sees it. Token ids in, token ids out; greedy; end tokens end nothing."""

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """Make ready to run. Options: "device" ("cuda" or "cpu"), "max_context" (tokens), and those of the peer.

        Returns facts: "title", "versions" {name: version}, "weights" (their dtype), "device", "notes".
        Raises Unavailable.
        """

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        """Consume `tokens` from an empty state and have the first new token on the host."""

    def prepare(self, tokens: Sequence[int]) -> None:
        """Consume all `tokens` but the last, so that `decode` starts there. Not timed."""

    def decode(self, count: int) -> Decoded:
        """`count` forward passes with LM head and greedy choice: `count` new tokens, all on the host in the end.

        Every call starts where `prepare` ended.
        """

    def logits(self, tokens: Sequence[int]) -> Any:
        """Teacher forcing: float32 NumPy array [len(tokens), vocab], row i after tokens[: i + 1], by the path that
        the speed is measured on; or a list with the id of the most probable token after each, if it gives no more
        (None where it cannot tell).
        """

    def close(self) -> None: ...


class Worker:
    """Carries out requests on an adapter. Separate from `serve` for tests."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.decode_tokens: list[int] = []

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = getattr(self, f"do_{request['do']}")(request)
        return result

    def do_load(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        facts = self.adapter.load(request["folder"], request["options"])
        return {"facts": facts, "wall_s": time.perf_counter() - start}

    def do_prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        made = self.adapter.prefill(request["tokens"])
        wall = time.perf_counter() - start
        return {
            "wall_s": wall if made.wall_s is None else made.wall_s,
            "device_s": made.device_s,
            "count": len(request["tokens"]),
        }

    def do_prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.adapter.prepare(request["tokens"])
        return {"wall_s": time.perf_counter() - start}

    def do_decode(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        decoded = self.adapter.decode(request["count"])
        wall = time.perf_counter() - start
        return {
            "wall_s": wall if decoded.wall_s is None else decoded.wall_s,
            "device_s": decoded.device_s,
            "count": decoded.count,
            "tokens": decoded.tokens if isinstance(decoded.tokens, list) else None,
        }

    def do_steady(self, request: dict[str, Any]) -> dict[str, Any]:
        """Decode (or prefill) again and again for `seconds`: the work of an energy window. "tokens": the first ones."""
        begin = time.perf_counter()
        end = begin + request["seconds"]
        count, busy, first = 0, 0.0, None
        while (now := time.perf_counter()) < end:
            if request["kind"] == "prefill":
                self.adapter.prefill(request["tokens"])
                count += len(request["tokens"])
                busy += time.perf_counter() - now
            else:
                decoded = self.adapter.decode(request["count"])
                first = decoded.tokens if first is None else first
                count += decoded.count
                busy += time.perf_counter() - now if decoded.wall_s is None else decoded.wall_s
        tokens = first if isinstance(first, list) else None
        return {"count": count, "window_s": time.perf_counter() - begin, "busy_s": busy, "tokens": tokens}

    def do_logits(self, request: dict[str, Any]) -> dict[str, Any]:
        logits = self.adapter.logits(request["tokens"])
        if isinstance(logits, list):
            return {"best": logits}
        import numpy as np

        np.save(request["path"], np.asarray(logits, np.float32))
        return {"path": request["path"]}


def serve(adapter: Adapter) -> None:
    """Answer requests until stdin ends. What libraries print goes to stderr, never between the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer({"ready": VERSION, "python": sys.version.split()[0]})
    worker = Worker(adapter)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            answer({"ok": worker.handle(request)})
        except Unavailable as reason:
            if reason.__cause__ is not None:
                traceback.print_exc()
            answer({"unavailable": str(reason)})
        except Exception as error:  # of any library: it is told to the other side, with its traceback on stderr
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
    adapter.close()
