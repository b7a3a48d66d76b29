"""BatchDecoder: a step of many sequences at once on the GPU, many steps a launch, beside the decoder of single ones."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from onekernel.errors import BackendError, InvalidRequest, NotEnoughMemory, OnekernelError
from onekernel.gpu.batch_layout import BUCKETS, BatchArguments, BatchLayout, BatchRow, bucket_of, most_splits
from onekernel.gpu.compile import compile_all
from onekernel.gpu.decoder import POLL, Decoder, State, stopped_itself
from onekernel.gpu.driver import LOST, check
from onekernel.gpu.kernel import CooperativeKernel
from onekernel.gpu.layout import FAILURE_SHIFT, MOST_STOP_TOKENS, Layout
from onekernel.gpu.memory import DeviceBuffer, MappedMemory
from onekernel.gpu.sampling import DeviceSampling, SamplingArguments, is_plain
from onekernel.gpu.source import assemble
from onekernel.sampling.params import SampledToken
from onekernel.sampling.sampler import Sampler, damaged

MOST_STEPS = 256  # of one launch


class Row(Protocol):
    """One sequence of a batch; see onekernel/backend/batch.py."""

    state: State  # with room for the tokens to come
    tokens: Sequence[int]  # the last is consumed first
    sampler: Sampler  # without a constraint
    max_tokens: int  # to make, at least 1
    stop_tokens: frozenset[int]  # at most MOST_STOP_TOKENS
    error: OnekernelError | None


def batch_source(layout: BatchLayout) -> str:
    return assemble("batch.cu", layout.constants(), layout.declarations())


def layouts_for(decode: Layout, buckets: Sequence[int]) -> dict[int, BatchLayout]:
    """The kernels of those buckets (ascending) that fit on the chip.

    Raises:
        NotEnoughMemory: not even the first.
    """
    layouts: dict[int, BatchLayout] = {}
    for bucket in buckets:
        try:
            layouts[bucket] = BatchLayout.plan(decode, bucket)
        except NotEnoughMemory:
            if not layouts:
                raise
            break
    return layouts


class BatchDecoder:
    """The batch kernels of one decoder, one for each bucket of rows."""

    def __init__(self, decoder: Decoder, slots: int, buckets: Sequence[int] = BUCKETS) -> None:
        """Compile (or take from the cache) the kernels for up to `slots` rows, and load them.

        Args:
            buckets: those to choose from. `slots` is less afterwards where the chip has no room for the largest.

        Raises:
            UnsupportedModel: more slots than any kernel has columns.
            NotEnoughMemory: this chip has too little shared memory even for the smallest.
            BackendError: see CooperativeKernel.
        """
        self.decoder = decoder
        gpu = decoder.gpu
        gpu.make_current()
        self.layouts = layouts_for(decoder.layout, [bucket for bucket in buckets if bucket <= bucket_of(slots)])
        self.slots = slots = min(slots, max(self.layouts))
        from cuda.core import Program  # noqa: F401  (now: its first import must not be by several threads at once)

        sources = {bucket: batch_source(layout) for bucket, layout in self.layouts.items()}
        compile_all(list(sources.values()), gpu.arch, "batch")
        self.kernels = {
            bucket: CooperativeKernel(gpu, "batch", source, decoder.layout.blocks) for bucket, source in sources.items()
        }
        self.scratch: dict[str, DeviceBuffer] = {}
        self.table = DeviceBuffer(ctypes.sizeof(BatchRow) * slots)
        self.words = DeviceBuffer(8)  # the barrier's counter, `stop`
        self.times = DeviceBuffer(8 * (8 * decoder.shape.layers + 256))
        self.mapped = MappedMemory(MOST_STEPS * slots + 2)
        self._sampling: dict[int, DeviceSampling] = {}  # by place in the batch
        self._products = 0  # that blocks have shared so far, see batch/gemm_split.cuh
        self._running = False

    def run(
        self,
        rows: Sequence[Row],
        steps: int,
        interrupted: Callable[[], bool] = lambda: False,
        timed: bool = False,
    ) -> Iterator[list[tuple[int, SampledToken]]]:
        """Make up to `steps` tokens (or MOST_STEPS) of every row in one launch; yields those of each step, with the
        place of their row, as they are made.

        A row ends behind a stop token or its max_tokens, and alone: `error` is set where its logits were damaged. Its
        sampler is told each token, its last token is not consumed. `interrupted` is asked between steps; if it
        says so, or the iterator is closed, the launch ends behind the step that is being made.

        Raises:
            NotEnoughMemory: at the call, before any row has moved.
            BackendError: the kernel failed.
        """
        assert 0 < len(rows) <= self.slots
        assert steps > 0
        assert not self._running
        steps = min(steps, MOST_STEPS)
        if self.decoder._failure:
            raise BackendError(self.decoder._failure)
        self.decoder.gpu.make_current()
        for row in rows:
            self.decoder.reserve(row.state, row.state.position + min(steps, row.max_tokens))
        bucket = next(b for b in self.layouts if b >= len(rows))
        splits = most_splits(max(row.state.position for row in rows) + steps - 1)
        self._reserve_scratch(bucket, splits)
        for place, row in enumerate(rows):
            if not is_plain(row.sampler.params) and place not in self._sampling:
                shape, blocks = self.decoder.shape, self.decoder.layout.blocks
                self._sampling[place] = DeviceSampling(shape.vocab, blocks, MOST_STEPS)
        return self._run(rows, steps, interrupted, bucket, splits, timed)

    def _reserve_scratch(self, bucket: int, splits: int) -> None:
        needed = self.layouts[bucket].scratch(splits)
        more = sum(max(0, size - self._held(name)) for name, size in needed.items())
        if more > (free := self.decoder.gpu.memory_free()):
            raise NotEnoughMemory(
                f"a step of {bucket} sequences needs {more:,} more bytes of scratch memory on the GPU, and {free:,} "
                "are free: use fewer slots, or shorter contexts"
            )
        for name, size in needed.items():
            if size > self._held(name):
                if name in self.scratch:
                    self.scratch[name].free()
                self.scratch[name] = DeviceBuffer(size)
                self.scratch[name].clear()  # columns without a row are multiplied as well, for nothing

    def _held(self, name: str) -> int:
        return self.scratch[name].nbytes if name in self.scratch else 0

    def _run(
        self,
        rows: Sequence[Row],
        steps: int,
        interrupted: Callable[[], bool],
        bucket: int,
        splits: int,
        timed: bool,
    ) -> Iterator[list[tuple[int, SampledToken]]]:
        self._launch(rows, steps, bucket, splits, timed)
        consumed, active = np.zeros(len(rows), np.int64), np.arange(len(rows))
        try:
            for step in range(steps):
                if interrupted():
                    self._cancel()
                words = self._await_step(step, len(rows), active)
                if words is None:
                    break
                consumed[active] += 1
                made = []
                for place, word in zip(active.tolist(), words.tolist(), strict=True):
                    row, token = rows[place], word & (1 << FAILURE_SHIFT) - 1
                    if failure := word >> FAILURE_SHIFT & 7:
                        row.error = _no_token(row, failure)
                        continue
                    made.append((place, self._sampled(row, place, token, step)))
                    row.sampler.record(token)
                active = active[words >> np.uint64(31) & np.uint64(1) == 0]
                yield made
                if not len(active):
                    break
        finally:
            self._cancel()
            self._finish()
            for row, count in zip(rows, consumed.tolist(), strict=True):
                row.state.position += count

    def _sampled(self, row: Row, place: int, token: int, step: int) -> SampledToken:
        if row.sampler.params.logprobs is None:
            return SampledToken(token)
        return self._sampling[place].sampled(row.sampler.params, token, step)

    def _launch(self, rows: Sequence[Row], steps: int, bucket: int, splits: int, timed: bool) -> None:
        from cuda.bindings import driver

        decoder, stream = self.decoder, self.decoder.stream
        self.mapped.words[: steps * len(rows)] = 0
        self.mapped.words[-2:] = 0
        check(driver.cuMemsetD8Async(self.words.address, 0, self.words.nbytes, stream))
        table = (BatchRow * len(rows))(*(self._row(place, row, steps) for place, row in enumerate(rows)))
        check(driver.cuMemcpyHtoDAsync(self.table.address, ctypes.addressof(table), ctypes.sizeof(table), stream))
        arguments = BatchArguments(
            **decoder.model_addresses(),
            row_table=self.table.address,
            **{name: buffer.address for name, buffer in self.scratch.items()},
            barrier=self.words.address,
            stop=self.words.address + 4,
            output=self.mapped.address,
            report=self.mapped.address + 8 * (len(self.mapped.words) - 2),
            cancel=self.mapped.address + 8 * (len(self.mapped.words) - 1),
            times=self.times.address if timed else 0,
            spin_limit=decoder.spin_limit,
            rows=len(rows),
            steps=steps,
            most_splits=splits,
            draws=any(not row.sampler.params.greedy for row in rows),
            logprobs=any(row.sampler.params.logprobs is not None for row in rows),
            first_product=self._products,
        )
        self._products = (self._products + 2 * decoder.shape.layers * steps) % 2**31
        self.kernels[bucket].launch(arguments, stream)
        self._running = True

    def _row(self, place: int, row: Row, steps: int) -> BatchRow:
        assert len(row.stop_tokens) <= MOST_STOP_TOKENS
        assert row.sampler.constraint is None
        sampling = self._sampling.get(place)
        plain = is_plain(row.sampler.params)
        return BatchRow(
            state=row.state.buffer.address,
            logits=0 if row.sampler.params.logprobs is None or sampling is None else sampling.logits.address,
            max_context=row.state.capacity,
            position=row.state.position,
            token=row.tokens[-1],
            max_tokens=row.max_tokens,
            stop_count=len(row.stop_tokens),
            stop_tokens=(ctypes.c_int * MOST_STOP_TOKENS)(*sorted(row.stop_tokens)),
            sampling=(
                SamplingArguments(active=0)
                if plain or sampling is None
                else sampling.arguments(row.sampler, self.decoder.stream)
            ),
        )

    def _await_step(self, step: int, rows: int, active: np.ndarray) -> np.ndarray | None:
        """uint64 [active]: the words of a step; None if the launch ended before it."""
        words = self.mapped.words[step * rows : (step + 1) * rows]
        ended = False
        while True:
            found: np.ndarray = words[active]
            if np.all(found >> np.uint64(32) == step + 1):
                return found
            if ended:
                return None
            ended = self._has_ended()

    def _has_ended(self) -> bool:
        """Waits a moment. Raises BackendError if the kernel has failed."""
        from cuda.bindings import driver

        time.sleep(POLL)
        (status,) = driver.cuStreamQuery(self.decoder.stream)
        if status == driver.CUresult.CUDA_SUCCESS:
            return True
        if status == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._running = False
        report = int(self.mapped.words[-2])
        failure = f"the batch kernel failed ({status.name})"
        if report:
            failure = stopped_itself(report, self.decoder.spin_limit).replace("decode kernel", "batch kernel")
        self.decoder._failure = failure + LOST
        raise BackendError(self.decoder._failure)

    def _cancel(self) -> None:
        self.mapped.words[-1] = 1

    def _finish(self) -> None:
        while self._running and not self._has_ended():
            pass
        self._running = False

    def close(self) -> None:
        """Free the GPU's memory; the decoder stays."""
        for buffer in (self.table, self.words, self.times, *self.scratch.values()):
            buffer.free()
        for sampling in self._sampling.values():
            sampling.free()
        self.scratch, self._sampling = {}, {}
        self.mapped.free()
        for kernel in self.kernels.values():
            kernel.unload()


def _no_token(row: Row, failure: int) -> OnekernelError:
    """Why no token of a row could be chosen."""
    forbidden: Any = row.sampler.params.logit_bias
    if failure == 3 and forbidden:
        return InvalidRequest("logit_bias forbids every token that could be chosen; allow at least one")
    if not is_plain(row.sampler.params) and failure == 2:
        return BackendError("the scores of the tokens are too large for float32: use smaller penalties")
    return damaged((float("nan"), float("inf"), float("-inf"))[failure - 1], row.state.position)
