"""SamplingParams: how the next token is chosen, and SampledToken, the result; defined once for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from onekernel.errors import InvalidRequest

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Applied to the logits in this order: penalties, logit_bias, temperature, top_k, top_p, min_p.

    Attributes:
        temperature: 0 (or below 1e-6) is greedy: argmax, ties to the lowest id; otherwise logits are divided by it.
            In [0, 100].
        top_k: keep the k largest logits (ties to the lowest id); 0 keeps all.
        top_p: of those, keep the smallest set of most probable tokens whose probability reaches top_p. In (0, 1].
        min_p: keep tokens at least min_p times as probable as the most probable one. In [0, 1).
        presence_penalty: subtracted once from every token generated so far (the prompt does not count).
            In [-100, 100].
        frequency_penalty: subtracted for each time a token was generated so far. In [-100, 100].
        repetition_penalty: logits of tokens in prompt or output are divided (if > 0) or multiplied (if < 0) by it.
            In [0.01, 100]; 1 is none.
        logit_bias: added to the logits of these token ids. In [-1000, 1000]; -inf forbids a token.
        seed: of the counter-based generator; None takes a fresh one. In [0, 2**64).
        logprobs: None for none, else the number (0 to 20) of most probable alternatives to report beside the chosen
            token. Log-probabilities are those of the model: of the raw logits, before any of the above.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check = self._check
        check("temperature", Real, lambda value: 0 <= value <= 100, "must be between 0 (greedy) and 100")
        check("top_k", Integral, lambda value: value >= 0, "must be 0 (all tokens) or a positive integer")
        check("top_p", Real, lambda value: 0 < value <= 1, "must be greater than 0 and at most 1")
        check("min_p", Real, lambda value: 0 <= value < 1, "must be at least 0 and less than 1")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, Real, lambda value: -100 <= value <= 100, "must be between -100 and 100")
        rule = "must be between 0.01 and 100 (1 is none)"
        check("repetition_penalty", Real, lambda value: 0.01 <= value <= 100, rule)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest(f"logit_bias = {self.logit_bias!r} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            known = isinstance(token, Integral) and int(token) >= 0 and isinstance(bias, Real)
            if not (known and (-1000 <= bias <= 1000 or bias == -math.inf)):
                raise InvalidRequest(f"logit_bias[{token!r}] = {bias!r}: needs a token id and -1000 to 1000 (or -inf)")
        if self.seed is not None:
            check("seed", Integral, lambda value: 0 <= value < 2**64, "must be an integer between 0 and 2**64 - 1")
        if self.logprobs is not None:
            rule = f"must be an integer between 0 and {MAX_LOGPROBS}"
            check("logprobs", Integral, lambda value: 0 <= value <= MAX_LOGPROBS, rule)

    def _check(self, name: str, kind: type, in_range: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not in_range(value):
            raise InvalidRequest(f"{name} = {value!r} {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6


@dataclass(frozen=True)
class SampledToken:
    """One generated token; the log-probabilities are present if SamplingParams.logprobs asked for them."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most probable first
