"""llama.cpp's own benchmark program, given by path: llama.cpp as its authors measure it, without sampling.

Option "binary": path of llama-bench. It gives times only, so its output cannot be compared with the reference; run the
engine llama.cpp for that, on the same GGUF file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onekernel.bench.protocol import Decoded, Unavailable, serve


class LlamaBenchPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        if not options.get("binary"):
            raise Unavailable("no binary was given (--llama-bench PATH)")
        self.binary = options["binary"]
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise Unavailable("gguf is not installed (pip install gguf)") from None
        from gguf_converter import converted

        kind = options.get("kind", "bf16")
        self.path = converted(Path(folder), kind)
        self.layers = "999" if options["device"] == "cuda" else "0"
        try:
            row = self._run("-p", "8", "-n", "0")
        except OSError as error:
            raise Unavailable(f"{self.binary} does not run ({error})") from None
        return {
            "title": f"llama-bench, {kind}",
            "versions": {"llama.cpp": f"{row.get('build_number')} ({row.get('build_commit')})"},
            "weights": kind,
            "device": options["device"],
            "notes": "times of llama-bench: forward passes with random tokens, nothing is sampled",
            "kinds": ["prefill", "decode"],
        }

    def _run(self, *arguments: str) -> dict[str, Any]:
        command = [self.binary, "-m", str(self.path), "-ngl", self.layers, "-fa", "1", "-r", "1", "-o", "json"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llama-bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        row: dict[str, Any] = json.loads(done.stdout)[0]
        return row

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        row = self._run("-p", str(len(tokens)), "-n", "0")
        return Decoded(0, wall_s=row["samples_ns"][0] / 1e9)

    def prepare(self, tokens: Sequence[int]) -> None:
        self.context = len(tokens) - 1

    def decode(self, count: int) -> Decoded:
        depth = ["-d", str(self.context)] if self.context else []
        row = self._run("-p", "0", "-n", str(count), *depth)
        return Decoded(count, wall_s=row["samples_ns"][0] / 1e9)

    def logits(self, tokens: Sequence[int]) -> Any:
        raise Unavailable("llama-bench gives no logits: the engine llama.cpp runs the same file and is checked")

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))  # for gguf_converter; -P leaves it out
    serve(LlamaBenchPeer())
