"""Sampling on the device: what the kernel is told of SamplingParams, the memory that it works in, what it reports."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from onekernel.gpu.driver import check
from onekernel.gpu.memory import DeviceBuffer, MappedMemory
from onekernel.gpu.structure import ctypes_fields
from onekernel.sampling import elementary, philox
from onekernel.sampling.params import MAX_LOGPROBS, SampledToken, SamplingParams
from onekernel.sampling.sampler import MASS_BITS, Sampler

BINS = 256
HISTOGRAM_BYTES = 3 * BINS * (8 + 4) + 8  # `Histograms` in select.cuh
LIST_WORDS = 1 + MAX_LOGPROBS  # 64-bit words that a block leaves for the log-probabilities
RECORD_WORDS = 2 + MAX_LOGPROBS  # 64-bit words of log-probabilities for the host, beside each token
SEEN = 1 << 31  # in a word of the counts: in the prompt or generated

CONSTANTS: dict[str, int | float | tuple[float, ...]] = {
    "MASS_BITS": MASS_BITS,
    "HISTOGRAM_BYTES": HISTOGRAM_BYTES,
    "MOST_LOGPROBS": MAX_LOGPROBS,
    "RECORD_WORDS": RECORD_WORDS,
    "EXP_TERMS": tuple(map(float, elementary.EXP_TERMS)),
    "LOG_TERMS": tuple(map(float, elementary.LOG_TERMS)),
    "LN2_HIGH": float(elementary.LN2_HIGH),
    "LN2_LOW": float(elementary.LN2_LOW),
    "LOG2_E": float(elementary.LOG2_E),
    "SQRT_HALF": float(elementary.SQRT_HALF),
    "SMALLEST_EXPONENT": float(elementary.SMALLEST_EXPONENT),
    "PHILOX_ROUNDS": philox.ROUNDS,
    "PHILOX_MULTIPLIER_0": int(philox.MULTIPLIERS[0]),
    "PHILOX_MULTIPLIER_1": int(philox.MULTIPLIERS[1]),
    "PHILOX_KEY_INCREMENT_0": philox.KEY_INCREMENTS[0],
    "PHILOX_KEY_INCREMENT_1": philox.KEY_INCREMENTS[1],
}


class SamplingArguments(ctypes.Structure):
    """Part of the arguments of the decode kernel. Pointers are device addresses."""

    _FIELDS_IN_C = (
        ("float*", "scores"),  # [VOCAB]: working space
        ("unsigned int*", "counts"),  # [VOCAB]: times generated | seen << 31; null without penalties
        ("const float*", "bias"),  # [VOCAB], or null
        ("unsigned char*", "histograms"),  # `Histograms`, zeroed before the launch
        ("unsigned long long*", "lists"),  # [2, BLOCKS, LIST_WORDS]: working space
        ("unsigned long long*", "records"),  # host [OUTPUT_RING, RECORD_WORDS]
        ("unsigned long long", "seed"),
        ("double", "top_p"),
        ("float", "temperature"),
        ("float", "min_p"),
        ("float", "presence_penalty"),
        ("float", "frequency_penalty"),
        ("float", "repetition_penalty"),
        ("int", "top_k"),
        ("int", "greedy"),  # the highest score is the token
        ("int", "logprobs"),  # -1: none; else how many of the most probable tokens to report
        ("int", "active"),  # 0: the highest logit is the token, and nothing else of this is looked at
    )
    _fields_ = ctypes_fields(_FIELDS_IN_C)


def is_plain(params: SamplingParams) -> bool:
    """Whether the token is the highest of the logits as they are, and nothing is reported of it."""
    return (
        params.greedy
        and params.logprobs is None
        and not params.logit_bias
        and params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
    )


def numbers(params: SamplingParams, vocab: int) -> dict[str, Any]:
    """The fields of SamplingArguments that are no addresses, for parameters that are not plain."""
    return {
        "seed": params.seed or 0,
        "top_p": params.top_p,
        "temperature": params.temperature,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "top_k": min(params.top_k, vocab),
        "greedy": params.greedy,
        "logprobs": -1 if params.logprobs is None else params.logprobs,
        "active": 1,
    }


def memory_needed(vocab: int, blocks: int) -> int:
    """Bytes of GPU memory that sampling works in."""
    return 3 * 4 * vocab + HISTOGRAM_BYTES + 2 * blocks * LIST_WORDS * 8


class DeviceSampling:
    """The memory of one decoder's sampling, and both directions of what passes through it."""

    def __init__(self, vocab: int, blocks: int, ring: int) -> None:
        """Args:
        vocab: rows of the LM head.
        ring: tokens that one launch may make.
        """
        self._vocab, self._ring = vocab, ring
        self._scores, self._counts, self._bias = (DeviceBuffer(4 * vocab) for _ in range(3))
        self._histograms = DeviceBuffer(HISTOGRAM_BYTES)
        self._lists = DeviceBuffer(2 * blocks * LIST_WORDS * 8)
        self._logits: DeviceBuffer | None = None
        self._records = MappedMemory(ring * RECORD_WORDS)

    def arguments(self, sampler: Sampler, stream: Any) -> SamplingArguments:
        """What the next launch on `stream` needs to go on where `sampler` stands."""
        from cuda.bindings import driver

        params = sampler.params
        if is_plain(params):
            return SamplingArguments(active=0)
        counts, bias = _counts(sampler, self._vocab), _bias(params, self._vocab)
        for buffer, array in ((self._counts, counts), (self._bias, bias)):
            if array is not None:
                check(driver.cuMemcpyHtoDAsync(buffer.address, array.ctypes.data, array.nbytes, stream))
        check(driver.cuMemsetD8Async(self._histograms.address, 0, self._histograms.nbytes, stream))
        return SamplingArguments(
            scores=self._scores.address,
            counts=0 if counts is None else self._counts.address,
            bias=0 if bias is None else self._bias.address,
            histograms=self._histograms.address,
            lists=self._lists.address,
            records=self._records.address,
            **numbers(params, self._vocab),
        )

    @property
    def logits(self) -> DeviceBuffer:
        """float32 [vocab], for those who do not bring their own."""
        if self._logits is None:
            self._logits = DeviceBuffer(4 * self._vocab)
        return self._logits

    def sampled(self, params: SamplingParams, token: int, made: int) -> SampledToken:
        """Token number `made` (from 0) of the launch, with its log-probabilities if they were asked for."""
        if params.logprobs is None:
            return SampledToken(token)
        start = made % self._ring * RECORD_WORDS
        return reported(self._records.words[start : start + RECORD_WORDS].copy(), params.logprobs, token)

    def free(self) -> None:
        for buffer in (self._scores, self._counts, self._bias, self._histograms, self._lists):
            buffer.free()
        if self._logits:
            self._logits.free()
        self._records.free()


def reported(record: np.ndarray, count: int, token: int) -> SampledToken:
    """Decode a record of report_logprobs (logprobs.cuh): uint64 [RECORD_WORDS]."""
    sum_of_exponentials, highest = record[:1].view(np.float32)
    normalizer = np.log(sum_of_exponentials)
    keys = record[2 : 2 + count]
    keys = keys[keys != 0]  # there may be fewer tokens than were asked for
    ids = ~keys.astype(np.uint32)
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    logits = np.where(ordered >> 31 != 0, ordered ^ np.uint32(1 << 31), ~ordered).view(np.float32)
    chosen = record[1:2].astype(np.uint32).view(np.float32)
    logprobs = np.concatenate([chosen, logits]) - highest - normalizer
    top = zip(ids.tolist(), logprobs[1:].tolist(), strict=True)
    return SampledToken(token, float(logprobs[0]), tuple(top))


def _counts(sampler: Sampler, vocab: int) -> np.ndarray | None:
    params = sampler.params
    if params.repetition_penalty == 1 and params.presence_penalty == params.frequency_penalty == 0:
        return None
    counts = np.zeros(vocab, np.uint32)
    counts[: len(sampler.seen)] = np.where(sampler.seen, np.uint32(SEEN), np.uint32(0))
    for token, count in sampler.generated.items():
        counts[token] |= count
    return counts


def _bias(params: SamplingParams, vocab: int) -> np.ndarray | None:
    if not params.logit_bias:
        return None
    bias = np.zeros(vocab, np.float32)
    for token, value in params.logit_bias.items():
        bias[token] = value
    return bias
