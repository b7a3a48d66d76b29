"""onekernel as the harness's worker: the public engine, as a Python user drives it, on the CPU or the GPU.

Decoding goes through Session.stream, one Python iteration a token, so that its wall time is what a user sees. Device
time comes from the backend, if it counts it (`device_seconds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.bench.protocol import Decoded, Unavailable, serve


class OwnEngine:
    """The adapter (protocol.Adapter) of this package's own engine."""

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        import onekernel
        from onekernel.backend.choose import choose, load_backend
        from onekernel.checkpoint.shape import Shape
        from onekernel.engine import Engine
        from onekernel.errors import BackendError, NotEnoughMemory
        from onekernel.text.tokenizer import Tokenizer

        path = Path(folder)
        shape = Shape.load(path)
        try:
            name = choose(options["device"]).name
            self.backend = load_backend(name, path, shape, Tokenizer.load(path).size, options.get("max_context"))
        except (BackendError, NotEnoughMemory) as error:
            raise Unavailable(str(error)) from None
        self.engine = Engine(self.backend)
        return {
            "title": f"onekernel ({name})",
            "versions": {"onekernel": onekernel.__version__, "numpy": np.__version__},
            "weights": "float32" if name == "cpu" else "bf16",
            "device": name,
            "notes": "tokens come one by one through Session.stream, as a Python user sees them",
        }

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        before = self._device_seconds()
        session = self.engine.new_session()
        session.extend(tokens)
        made = [token.id for token in session.generate(max_tokens=1)]
        return Decoded(made, device_s=self._since(before))

    def prepare(self, tokens: Sequence[int]) -> None:
        self.session = self.engine.new_session()
        self.session.extend(tokens)
        self.start = self.session.snapshot()
        self.session.restore(self.start)
        self.session.prefill()  # rebuilds the state now, and not when the clock runs

    def decode(self, count: int) -> Decoded:
        import time

        before, begin = self._device_seconds(), time.perf_counter()
        tokens = [token.id for token in self.session.stream(max_tokens=count)]
        wall, device = time.perf_counter() - begin, self._since(before)
        self.session.restore(self.start)
        self.session.prefill()
        return Decoded(tokens, device_s=device, wall_s=wall)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The first half through prefill and one row a token after it, so that both paths are judged."""
        half = len(tokens) // 2
        with self.engine.exclusive() as backend:
            state = backend.new_state()
            rows = [backend.logits(state, tokens[:half])]
            rows += [backend.logits(state, [token]) for token in tokens[half:]]
        return np.concatenate(rows)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()

    def _device_seconds(self) -> float | None:
        """GPU time of all launches so far; None on a backend that does not count it."""
        seconds: float | None = getattr(self.backend, "device_seconds", None)
        return seconds

    def _since(self, before: float | None) -> float | None:
        after = self._device_seconds()
        return None if before is None or after is None else after - before


if __name__ == "__main__":
    serve(OwnEngine())
