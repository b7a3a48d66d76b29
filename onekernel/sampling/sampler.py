"""Sampler: logits in, one token out. The definition of sampling that every backend reproduces bit for bit.

All arithmetic is float32, one rounded operation at a time in the order written here (no fused multiply-add), or on
integers; nothing depends on the order in which tokens are visited. So a GPU can do every step in parallel:

* penalties, bias and temperature act on each logit alone;
* top_k and top_p cut the list of tokens in the order (logit descending, id ascending), which a search for the cut needs
  no sort for. The probabilities that top_p adds up are integers, so that any order of additions gives the same sum;
* the token is drawn by the Gumbel-max trick: add to each logit its own random number, take the largest. That is exactly
  a draw from the softmax, with no prefix sum (E. J. Gumbel, 1954; see also Maddison et al., "A* sampling", 2014).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from onekernel.errors import BackendError, InvalidRequest
from onekernel.sampling import elementary
from onekernel.sampling.constraint import Constraint
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.philox import WORD, philox4x32

# top_p counts probability in units of 2^-40 of the most probable token's: fine enough that the tail of the vocabulary
# counts, coarse enough that a vocabulary of 2^23 tokens cannot overflow 63 bits.
MASS_BITS = 40


class Sampler:
    """Chooses the tokens of one generation, and remembers them for the penalties."""

    def __init__(
        self,
        params: SamplingParams,
        vocabulary_size: int,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
        generated: int = 0,
    ) -> None:
        """Args:
            params: with a seed, unless it is greedy.
            vocabulary_size: tokens that the tokenizer defines; rows of the logits from there on are padding and never
                chosen.
            prompt: all tokens before the first one to come, for repetition_penalty.
            constraint: tokens that it does not allow are never chosen; it is told those that are.
            generated: so many tokens at the end of `prompt` were generated in an earlier part of the same answer:
                presence_penalty and frequency_penalty count them.

        Raises:
            InvalidRequest: logit_bias names a token that does not exist, or there is no seed.
        """
        for token in params.logit_bias:
            if token >= vocabulary_size:
                raise InvalidRequest(f"logit_bias[{token}]: the last token of this model is {vocabulary_size - 1}")
        if params.seed is None and not params.greedy:
            raise InvalidRequest("seed = None: sampling at a temperature needs a seed")
        self.params = params
        self.vocabulary_size = vocabulary_size
        self.constraint = constraint
        self.generated: Counter[int] = Counter(prompt[len(prompt) - generated :] if generated else ())
        self.seen = np.zeros(vocabulary_size, bool)  # tokens of prompt and output
        if params.repetition_penalty != 1:
            ids = np.asarray(prompt, np.int64)
            self.seen[ids[ids < vocabulary_size]] = True  # a prompt may hold rows of padding

    def choose(self, logits: np.ndarray, position: int) -> SampledToken:
        """Choose the token that will stand at `position` of the timeline.

        Args:
            logits: float32 [vocab], not modified.

        Raises:
            BackendError: the logits are not numbers.
            InvalidRequest: logit_bias and the constraint leave no token to choose.
        """
        raw = logits[: self.vocabulary_size]
        highest = raw.max()
        if not np.isfinite(highest):  # NaN spreads through max
            raise damaged(float(highest), position)
        scores = self._adjusted(raw)
        if self.constraint is not None and (allowed := self.constraint.allowed()) is not None:
            scores = np.where(allowed, scores, np.float32(-np.inf))
        if self.params.greedy:
            token = int(scores.argmax())  # the lowest id among equals
        else:
            scores = _tempered(scores, self.params.temperature)
            kept = keep(scores, self.params.top_k, self.params.top_p, self.params.min_p)
            assert self.params.seed is not None
            token = int(kept[np.argmax(scores[kept] + gumbel(self.params.seed, position, kept))])
        if scores[token] == -np.inf:
            raise InvalidRequest(
                "logit_bias (or the grammar) forbids every token that could be chosen; allow at least one"
            )
        self.record(token)
        return self._reported(raw, token)

    def record(self, token: int) -> None:
        """Remember a token that was chosen elsewhere: a backend that chooses on its own device tells each one."""
        self.generated[token] += 1
        self.seen[token] = True
        if self.constraint is not None:
            self.constraint.accept(token)

    def _adjusted(self, raw: np.ndarray) -> np.ndarray:
        """Logits after penalties and bias, in float32."""
        params = self.params
        scores = raw.astype(np.float32)
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            scores = np.where(self.seen, np.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.generated and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self.generated, np.int64)
            counts = np.fromiter(self.generated.values(), np.float32)
            scores[ids] -= counts * np.float32(params.frequency_penalty)
            scores[ids] -= np.float32(params.presence_penalty)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias, np.int64)
            scores[ids] += np.fromiter(params.logit_bias.values(), np.float32)
        return scores

    def _reported(self, raw: np.ndarray, token: int) -> SampledToken:
        """With log-probabilities of the raw logits, if asked for."""
        count = self.params.logprobs
        if count is None:
            return SampledToken(token)
        shifted = raw - raw.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        top = largest(raw, count)
        return SampledToken(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def damaged(highest: float, position: int) -> BackendError:
    """The error for logits whose maximum is no finite number."""
    return BackendError(
        f"the model computed logits with a maximum of {highest} at position {position}: "
        "weights or memory are damaged; check the files of the model, then report this as a bug"
    )


def _tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """(score - highest) / temperature, so that the highest becomes 0 and no temperature overflows."""
    highest = scores.max()
    if highest == -np.inf:
        return scores
    with np.errstate(over="ignore"):  # -inf is the right limit
        return (scores - highest) / np.float32(temperature)


def keep(scores: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Ids, ascending, of the tokens that top_k, top_p and min_p leave, each applied to what the one before it left.

    Args:
        scores: float32 [vocabulary_size], logits / temperature, the highest being 0.
    """
    ids = np.arange(len(scores))
    if 0 < top_k < len(ids):
        ids = np.sort(largest(scores, top_k))
    if top_p < 1:
        mass = (elementary.exp(scores[ids]) * np.float32(2**MASS_BITS)).astype(np.int64)
        order = np.argsort(-scores[ids], kind="stable")  # equal scores stay in the order of their ids
        reached = np.cumsum(mass[order]) >= int(np.ceil(np.float64(top_p) * np.float64(mass.sum())))
        ids = np.sort(ids[order[: int(reached.argmax()) + 1]])
    if min_p > 0:
        ids = ids[elementary.exp(scores[ids]) >= np.float32(min_p)]
    return ids


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest scores, largest first; the lowest id first among equals."""
    if count == 0:
        return np.empty(0, np.int64)
    count = min(count, len(scores))
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:count]]


def gumbel(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise of tokens `ids` (ascending) at `position`: float32 -log(-log(u)).

    u is odd / 2^24, odd = the upper 24 bits of a Philox word with the lowest of them set: exact in float32, never 0
    or 1. The word is number `id % 4` of the four that Philox4x32-10 gives for the key `seed` and the counter
    (id // 4, lower word of position, upper word of position, 0). So one call serves four neighbouring tokens.
    """
    blocks = ids >> 2
    first = np.concatenate([[True], blocks[1:] != blocks[:-1]])  # each block once
    counter = np.zeros((np.count_nonzero(first), 4), np.uint32)
    counter[:, 0] = blocks[first]
    counter[:, 1] = position & WORD
    counter[:, 2] = position >> 32
    words = philox4x32(counter, seed)[np.cumsum(first) - 1, ids & 3]
    uniform = ((words >> np.uint32(8)) | np.uint32(1)).astype(np.float32) * np.float32(2**-24)
    return -elementary.log(-elementary.log(uniform))
