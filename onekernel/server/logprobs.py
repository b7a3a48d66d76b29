"""Log-probabilities in the form that OpenAI's APIs share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onekernel.sampling.params import SampledToken
from onekernel.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no -inf


def entries(tokenizer: Tokenizer, tokens: Iterable[SampledToken]) -> list[dict[str, Any]]:
    """One entry a token."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": finite(logprob)}

    return [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*other) for other in token.top_logprobs]}
        for token in tokens
    ]


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token, special ones by their name."""
    return tokenizer.token_bytes(token, skip_special=False)


def finite(logprob: float | None) -> float:
    """None: the token was not drawn but put in by force."""
    return LEAST if logprob is None else max(logprob, LEAST)
