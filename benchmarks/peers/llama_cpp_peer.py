"""llama.cpp through llama-cpp-python's bindings of its C interface, on a GGUF file that we make of the checkpoint.

A token is one `llama_decode` and the largest of its logits, found by NumPy; llama.cpp's own samplers would first copy
the whole vocabulary. Option "kind": bf16 (default), q8_0 or q4_0 weights.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.bench.protocol import Decoded, Unavailable, serve

BATCH = 1024  # tokens of a prompt at a time: faster than the default 512 on a large GPU


class LlamaCppPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed (pip install llama-cpp-python gguf)") from None
        from gguf_converter import converted

        self.api: Any = llama_cpp
        kind = options.get("kind", "bf16")
        device = options["device"]
        if device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
            raise Unavailable("llama-cpp-python was built without CUDA")
        path = converted(Path(folder), kind)
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 999 if device == "cuda" else 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        if not self.model:
            raise Unavailable(f"llama.cpp does not load {path.name}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = -(-int(options["max_context"]) // 256) * 256
        context.n_batch = context.n_ubatch = BATCH
        context.n_threads = context.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise Unavailable("llama.cpp makes no context of this size")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return {
            "title": f"llama.cpp, {kind}",
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "weights": kind,
            "device": device,
            "notes": f"llama_decode and argmax from Python; batches of {BATCH}",
        }

    def _run(self, tokens: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Consume tokens at the end of the timeline; logits of the last, or of all [tokens, vocab]."""
        rows = []
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            batch = self.api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = all_logits or start + i == len(tokens) - 1
            status = self.api.llama_decode(self.context, batch)
            self.api.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode answers {status} for {len(part)} tokens at {self.position}")
            self.position += len(part)
            if all_logits:
                rows.append(self._logits(len(part)).copy())
        return np.concatenate(rows) if all_logits else self._logits(1)[0]

    def _logits(self, rows: int) -> np.ndarray:
        """A view of what llama.cpp holds; it waits for the device."""
        pointer = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        self._clear()
        return Decoded([int(self._run(tokens).argmax())])

    def prepare(self, tokens: Sequence[int]) -> None:
        self._clear()
        if len(tokens) > 1:
            self._run(tokens[:-1])
        self.last, self.start = tokens[-1], self.position
        size = self.api.llama_state_seq_get_size(self.context, 0)
        self.saved = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.context, self.saved, size, 0)

    def decode(self, count: int) -> Decoded:
        self._clear()
        if self.start:
            self.api.llama_state_seq_set_data(self.context, self.saved, len(self.saved), 0)
        self.position = self.start
        begin = time.perf_counter()
        tokens, token = [], self.last
        for _ in range(count):
            token = int(self._run([token]).argmax())
            tokens.append(token)
        return Decoded(tokens, wall_s=time.perf_counter() - begin)

    def logits(self, tokens: Sequence[int]) -> Any:
        """The first half in one batch, the rest token by token: both paths are judged."""
        self._clear()
        half = len(tokens) // 2
        rows = [self._run(tokens[:half], all_logits=True)]
        rows += [self._run([token], all_logits=True) for token in tokens[half:]]
        return np.concatenate(rows)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    import sys

    sys.path.append(str(Path(__file__).parent))  # for gguf_converter; -P leaves it out
    serve(LlamaCppPeer())
