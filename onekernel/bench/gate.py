"""The correctness gate: how far an engine's logits are from the float32 reference, and whether that is only rounding.

The engine is given a fixed sequence and says after every token what comes next (teacher forcing: one wrong token does
not spoil the rest). A verdict needs no threshold made up for one model: the allowance is a multiple of what rounding
activations to bf16 does to this very model on this very sequence (oracle.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onekernel.bench.oracle import Oracle

ALLOWANCE = 8.0  # times the divergence of the rounded reference
LEAST_ALLOWANCE = 1e-4  # nats: float32 engines differ from each other too
CLEAR = 8.0  # a margin of so many times the noise of a logit leaves no doubt about the best token
MOST_WRONG = 0.02  # of the clear positions
AGREES, WRONG, QUANTISED, UNCHECKED = "agrees", "wrong", "quantised", "not checked"
FULL_WIDTH = ("bf16", "float16", "float32")  # weights; others may differ by more than rounding of activations does


@dataclass(frozen=True)
class Agreement:
    """Of one engine with the reference.

    Attributes:
        verdict: AGREES, WRONG, QUANTISED (outside the allowance, with fewer bits a weight) or UNCHECKED.
        tokens: positions compared.
        top1: share of them at which the engine's most probable token is the reference's.
        clear: positions at which the reference leaves no doubt; `clear_wrong` of them were answered differently.
        kl: mean KL divergence of the engine from the reference, nats; None if it gives no logits.
        kl_rounding: the same for the reference with activations rounded to bf16.
        reason: of WRONG and UNCHECKED.
    """

    verdict: str
    tokens: int = 0
    top1: float | None = None
    top1_rounding: float | None = None
    clear: int = 0
    clear_wrong: int = 0
    kl: float | None = None
    kl_rounding: float | None = None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    oracle: Oracle, answer: np.ndarray | Sequence[int | None], vocabulary: int, weights: str = "bf16"
) -> Agreement:
    """Compare an engine's answer with the oracle.

    Args:
        answer: float32 logits [tokens, at least vocabulary], or the most probable token after each (None: the engine
            cannot tell; at least a quarter of them must be known).
        vocabulary: tokens that the tokenizer defines; the padding rows of the LM head are left aside.
        weights: dtype of the engine's weights.
    """
    exact, rounded = oracle.exact[:, :vocabulary], oracle.rounded[:, :vocabulary]
    best = exact.argmax(-1)
    kl: float | None
    if isinstance(answer, np.ndarray):
        logits = np.asarray(answer, np.float32)
        if logits.shape[0] != len(exact) or logits.shape[1] < vocabulary or not np.isfinite(logits).all():
            problem = f"its logits are {list(logits.shape)}" if np.isfinite(logits).all() else "it gave NaN or infinity"
            return Agreement(WRONG, tokens=len(exact), reason=problem)
        logits = logits[:, :vocabulary]
        chosen = logits.argmax(-1)
        kl, allowed = divergence(exact, logits), divergence(exact, rounded)
    else:
        if len(answer) != len(best):
            return Agreement(WRONG, tokens=len(exact), reason=f"it gave {len(answer)} tokens for {len(best)} positions")
        known = np.array([token is not None for token in answer])
        if known.sum() < len(best) / 4:
            return Agreement(UNCHECKED, reason=f"it named only {int(known.sum())} tokens of {len(best)}")
        exact, rounded, best = exact[known], rounded[known], best[known]
        chosen = np.array([token for token in answer if token is not None])
        kl, allowed = None, divergence(exact, rounded)
    margins = np.sort(np.partition(exact, -2, axis=-1)[:, -2:], axis=-1)
    noise = float((rounded - exact).std())
    clear = margins[:, 1] - margins[:, 0] > CLEAR * noise
    clear_wrong = int((clear & (chosen != best)).sum())
    reason = ""
    if clear_wrong > MOST_WRONG * max(1, int(clear.sum())):
        reason = f"{clear_wrong} of {int(clear.sum())} clear choices differ"
    top1, top1_rounding = float((chosen == best).mean()), float((rounded.argmax(-1) == best).mean())
    # Where nothing is clear (flat distributions), the share of equal choices has to decide.
    if not reason and top1 < top1_rounding - 4 * (top1_rounding * (1 - top1_rounding) / len(best)) ** 0.5 - 0.05:
        reason = f"{top1:.1%} of the choices are the reference's, and rounding explains {top1_rounding:.1%}"
    if kl is not None and kl > max(ALLOWANCE * allowed, LEAST_ALLOWANCE):
        reason = f"KL divergence {kl:.2g} nats; rounding explains {allowed:.2g}"
    verdict = AGREES if not reason else WRONG if weights in FULL_WIDTH else QUANTISED
    return Agreement(
        verdict,
        tokens=len(best),
        top1=top1,
        top1_rounding=top1_rounding,
        clear=int(clear.sum()),
        clear_wrong=clear_wrong,
        kl=kl,
        kl_rounding=allowed,
        reason=reason,
    )


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean over the rows of KL(softmax(exact) || softmax(other)), nats."""

    def of_row(first: np.ndarray, second: np.ndarray) -> float:  # a row of a vocabulary in float64 is 2 MB
        p, q = _log_softmax(first), _log_softmax(second)
        return float(np.sum(np.exp(p) * (p - q)))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return sum(pool.map(of_row, exact, other)) / len(exact)


def _log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    wide -= wide.max()
    result: np.ndarray = wide - np.log(np.exp(wide).sum())
    return result
