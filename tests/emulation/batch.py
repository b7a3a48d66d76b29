"""A model in host memory and rows of a batch, for the batch kernel on the CPU (kernel.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emulation.kernel import compile_batch
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.gpu import parameters, tape
from onekernel.gpu.batch_layout import BatchArguments, BatchLayout, BatchRow, most_splits
from onekernel.gpu.decoder import cache_bytes, recurrent_bytes
from onekernel.gpu.layout import FAILURE_SHIFT, Layout
from onekernel.gpu.sampling import (
    HISTOGRAM_BYTES,
    LIST_WORDS,
    RECORD_WORDS,
    SamplingArguments,
    _bias,
    _counts,
    is_plain,
    numbers,
    reported,
)
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler

SHARED_MEMORY = 232448
CAPACITY = 256  # positions of a state


def aligned(nbytes: int, fill: int = 0) -> np.ndarray:
    """uint8 [nbytes] at a multiple of 256, as the driver would give them."""
    whole = np.full(nbytes + 256, fill, np.uint8)
    start = -whole.ctypes.data % 256
    return whole[start : start + nbytes]


@dataclass(eq=False)
class HostRow:
    """One sequence: its state, its pending token, and what its sampling works in."""

    state: np.ndarray
    token: int
    sampler: Sampler
    position: int = 0
    max_tokens: int = 1 << 20
    stop_tokens: tuple[int, ...] = ()
    work: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def logits(self) -> np.ndarray:
        return self.work["logits"].view(np.float32)


class HostModel:
    """Weights as the kernel reads them, and the kernels compiled so far."""

    def __init__(self, shape: Shape, weights: Weights, vocabulary_size: int, blocks: int, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self.layout = Layout.plan(shape, vocabulary_size, blocks, SHARED_MEMORY)
        plan = tape.plan(shape, self.layout.blocks)
        self.arrays = {"tape": aligned(plan.nbytes), "tape_offsets": plan.offsets, "head_offsets": plan.head_offsets}
        for offset, piece in tape.pack(weights, shape, self.layout.blocks, half=False):
            self.arrays["tape"][offset : offset + piece.nbytes] = piece
        self.arrays["parameters"] = _copy(parameters.pack(weights, shape))
        self.arrays["rope"] = _copy(parameters.rope_table(shape, CAPACITY).astype(np.float32))
        if not shape.tied:
            matrix = tape.Matrix(shape.vocab, shape.hidden, ("embed_tokens.weight",))
            self.arrays["embedding"] = _copy(tape.rows_of(weights, matrix, half=False))
        self._libraries: dict[BatchLayout, ctypes.CDLL] = {}

    def row(self, token: int, params: SamplingParams | None = None, **options: object) -> HostRow:
        params = params or SamplingParams()
        state = aligned(recurrent_bytes(self.shape) + cache_bytes(self.shape, CAPACITY))
        sampler = Sampler(params, self.layout.vocabulary_size, [token])
        return HostRow(state, token, sampler, **options)  # type: ignore[arg-type]

    def run(self, rows: Sequence[HostRow], steps: int, layout: BatchLayout) -> list[list[SampledToken]]:
        """One launch: the tokens of each row; samplers are told, states and pending tokens move on.

        What is in scratch memory at the start is no number, so that any use of it shows.
        """
        if layout not in self._libraries:
            self._libraries[layout] = compile_batch(layout, self.folder)
        splits = most_splits(max(row.position for row in rows) + steps - 1)
        scratch = {name: aligned(nbytes, 0xFF) for name, nbytes in layout.scratch(splits).items()}
        table = (BatchRow * len(rows))(*(self._entry(row, steps) for row in rows))
        words, host = np.zeros(2, np.uint32), np.zeros(2, np.uint64)
        output = np.zeros((steps, len(rows)), np.uint64)
        arguments = BatchArguments(
            **{name: array.ctypes.data for name, array in (self.arrays | scratch).items()},
            row_table=ctypes.addressof(table),
            barrier=words.ctypes.data,
            stop=words.ctypes.data + 4,
            output=output.ctypes.data,
            report=host.ctypes.data,
            cancel=host.ctypes.data + 8,
            rows=len(rows),
            steps=steps,
            most_splits=splits,
            draws=any(not row.sampler.params.greedy for row in rows),
            logprobs=any(row.sampler.params.logprobs is not None for row in rows),
        )
        stuck = self._libraries[layout].run_batch(ctypes.byref(arguments))
        assert stuck == 0, f"{stuck} threads are stuck"
        return [self._take(row, output[:, place]) for place, row in enumerate(rows)]

    def _take(self, row: HostRow, words: np.ndarray) -> list[SampledToken]:
        made = []
        for step, word in enumerate(words[words != 0].tolist()):
            assert word >> 32 == step + 1
            assert not word >> FAILURE_SHIFT & 7
            row.token = word & (1 << FAILURE_SHIFT) - 1
            row.position += 1
            row.sampler.record(row.token)
            count = row.sampler.params.logprobs
            if count is None:
                made.append(SampledToken(row.token))
            else:
                record = row.work["records"].view(np.uint64)[step * RECORD_WORDS : (step + 1) * RECORD_WORDS]
                made.append(reported(record, count, row.token))
        return made

    def _entry(self, row: HostRow, steps: int) -> BatchRow:
        params, vocab = row.sampler.params, self.shape.vocab
        sampling = SamplingArguments(active=0)
        if not is_plain(params):
            lists = 2 * self.layout.blocks * LIST_WORDS * 8
            sizes = {"scores": 4 * vocab, "histograms": HISTOGRAM_BYTES, "lists": lists}
            row.work = {name: aligned(size) for name, size in sizes.items()}
            row.work |= {"records": aligned(8 * steps * RECORD_WORDS), "logits": aligned(4 * vocab)}
            for name, values in (("counts", _counts(row.sampler, vocab)), ("bias", _bias(params, vocab))):
                if values is not None:
                    row.work[name] = _copy(values)
            sampling = SamplingArguments(
                **{name: array.ctypes.data for name, array in row.work.items() if name != "logits"},
                **numbers(params, vocab),
            )
        return BatchRow(
            state=row.state.ctypes.data,
            logits=row.work["logits"].ctypes.data if "logits" in row.work and params.logprobs is not None else 0,
            max_context=CAPACITY,
            position=row.position,
            token=row.token,
            max_tokens=row.max_tokens,
            stop_count=len(row.stop_tokens),
            stop_tokens=(ctypes.c_int * 8)(*row.stop_tokens),
            sampling=sampling,
        )


def _copy(array: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    copy = aligned(bits.nbytes)
    copy[:] = bits
    return copy
