"""A backend and a tokenizer made of arithmetic: the engine and everything above it are tested without weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onekernel.backend.base import SampledToken
from onekernel.checkpoint.shape import Shape
from onekernel.sampling.params import SamplingParams

VOCABULARY = 256 + 8


def shape() -> Shape:
    return Shape.from_config(
        {
            "model_type": "qwen3_5_text",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_theta": 10000.0},
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 1,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
        }
    )


@dataclass
class ArithmeticState:
    consumed: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.consumed)


class ArithmeticBackend:
    """The next token is a hash of all tokens before it and of the seed, so a wrong timeline shows at once."""

    name = "fake"

    def __init__(self, max_context: int = 4096, runs_ahead: bool = False, delay_s: float = 0.0) -> None:
        self.shape = shape()
        self.max_context = max_context
        self.runs_ahead = runs_ahead
        self.delay_s = delay_s
        self.consumed_in_all = 0
        self.fail_after: int | None = None  # tokens until a BackendError-like failure
        self.seeds: list[int] = []
        self.calls: list[str] = []
        self.closed = 0
        self._busy = threading.Lock()

    def script(self, text: str) -> None:
        """Make the backend say `text` (its UTF-8 bytes as ids), whatever the prompt; then the end token 256."""
        self._script = [*text.encode(), 256]
        self._script_start: int | None = None

    def new_state(self) -> ArithmeticState:
        self.calls.append("new_state")
        return ArithmeticState()

    def _consume(self, state: ArithmeticState, tokens: Sequence[int]) -> None:
        assert self._busy.acquire(blocking=False), "two threads at once"
        try:
            time.sleep(self.delay_s)
            state.consumed += tokens
            self.consumed_in_all += len(tokens)
        finally:
            self._busy.release()

    def _next(self, state: ArithmeticState, seed: int) -> int:
        if hasattr(self, "_script"):
            if self._script_start is None:
                self._script_start = state.position
            return self._script[(state.position - self._script_start) % len(self._script)]
        value = seed
        for token in state.consumed:
            value = (value * 31 + token + 1) % 1_000_003
        return value % 250

    def prefill(self, state: ArithmeticState, tokens: Sequence[int]) -> None:
        self.calls.append("prefill")
        self._consume(state, tokens)

    def generate(
        self,
        state: ArithmeticState,
        tokens: Sequence[int],
        history: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        stop_tokens: frozenset[int],
    ) -> Generator[SampledToken, None, None]:
        assert tokens
        assert list(history) == state.consumed
        assert sampling.seed is not None
        self.calls.append("generate")
        self.seeds.append(sampling.seed)
        if hasattr(self, "_script"):
            self._script_start = None
        seed = 0 if sampling.greedy else sampling.seed
        try:
            for made in range(max_tokens):
                self._consume(state, tokens)
                if made == self.fail_after:
                    raise RuntimeError("the backend broke")
                token = self._next(state, seed)
                tokens = [token]
                logprob = -0.5 if sampling.logprobs is not None else None
                yield SampledToken(token, logprob, ((token, -0.5),) * (sampling.logprobs or 0))
                if token in stop_tokens:
                    return
        except GeneratorExit:
            if self.runs_ahead:
                self._consume(state, [7, 7, 7])
            raise

    def logits(self, state: ArithmeticState, tokens: Sequence[int]) -> np.ndarray:
        rows = np.zeros((len(tokens), VOCABULARY), np.float32)
        for row, token in zip(rows, tokens, strict=True):
            self._consume(state, [token])
            row[self._next(state, 0)] = 1
        return rows

    def snapshot(self, state: ArithmeticState) -> list[int]:
        self.calls.append("snapshot")
        return list(state.consumed)

    def restore(self, snapshot: list[int]) -> ArithmeticState:
        self.calls.append("restore")
        return ArithmeticState(list(snapshot))

    def close(self) -> None:
        self.closed += 1
