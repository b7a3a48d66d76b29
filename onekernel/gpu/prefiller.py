"""Prefiller: prompts on the GPU, many tokens a launch. It shares the decoder's weights and leaves its kind of state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onekernel.errors import BackendError, NotEnoughMemory
from onekernel.gpu.compile import compile_all
from onekernel.gpu.decoder import REPORT, Decoder, State
from onekernel.gpu.device import Gpu
from onekernel.gpu.driver import check
from onekernel.gpu.kernel import CooperativeKernel
from onekernel.gpu.memory import DeviceBuffer
from onekernel.gpu.prefill_layout import (
    MOST_CHUNK_TOKENS,
    NARROW_TOKENS,
    PrefillArguments,
    PrefillLayout,
    matrix_offsets,
)
from onekernel.gpu.source import assemble


def prefill_source(layout: PrefillLayout) -> str:
    return assemble("prefill.cu", layout.constants(), layout.declarations())


class _Kernel(CooperativeKernel):
    """The prefill kernel compiled for one layout."""

    def __init__(self, gpu: Gpu, layout: PrefillLayout) -> None:
        """Raises: see CooperativeKernel."""
        super().__init__(gpu, "prefill", prefill_source(layout), layout.blocks, threads="block_threads")
        self.layout = layout


class Prefiller:
    """The prefill kernel beside a decoder. Scratch memory is taken when first needed, for the longest chunk so far."""

    def __init__(self, decoder: Decoder, layout: PrefillLayout) -> None:
        """Compile (or take from the cache) and load.

        Raises:
            BackendError: it does not compile, or its blocks do not fit on the GPU together.
        """
        self.decoder, self.layout, self.shape = decoder, layout, layout.shape
        gpu = decoder.gpu
        plans = PrefillLayout.plans(layout.decode, gpu.sm_count, gpu.shared_memory, gpu.arch)
        narrow = next((plan for plan in plans if plan.narrow), None)
        compile_all([prefill_source(plan) for plan in (layout, narrow) if plan], gpu.arch, "prefill")
        self._wide = _Kernel(gpu, layout)
        self._narrow = _Kernel(gpu, narrow) if narrow else None
        self.matrix_offsets = DeviceBuffer.of(matrix_offsets(self.shape, layout.decode.blocks))
        self.barrier = DeviceBuffer(4)
        self.times = DeviceBuffer(8 * (layout.phases + 1))
        self.token_ids = DeviceBuffer(4 * MOST_CHUNK_TOKENS)
        self.scratch: dict[str, DeviceBuffer] = {}
        self.scratch_tokens = 0

    def prefill(self, state: State, tokens: Sequence[int]) -> None:
        """Consume `tokens`.

        Raises:
            NotEnoughMemory: before anything is consumed; names the tokens and bytes.
            BackendError: the kernel failed.
        """
        self._prepare(state, len(tokens))
        ids = self._upload(tokens)
        for start in range(0, len(tokens), MOST_CHUNK_TOKENS):  # one behind the other, without a word from the host
            part = tokens[start : start + MOST_CHUNK_TOKENS]
            self.launch(state, part, 0, self.layout.phases, ids=ids + 4 * start, ahead=start)
        self.wait()
        state.position += len(tokens)

    def logits(self, state: State, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Consume `tokens`; float32 [up to token_tile, vocab] logits after each, slice after slice.

        Raises: see prefill.
        """
        most = self.layout.token_tile
        self._prepare(state, len(tokens), 4 * most * self.shape.vocab)
        buffer = DeviceBuffer(4 * most * self.shape.vocab)
        for start in range(0, len(tokens), MOST_CHUNK_TOKENS):
            part = tokens[start : start + MOST_CHUNK_TOKENS]
            self.launch(state, part, 0, self.layout.phases)
            step = self._kernel(len(part)).layout.token_tile  # whole tiles: see input_place in prefill/model.cuh
            for first in range(0, len(part), step):
                count = min(step, len(part) - first)
                head = self.layout.phases
                self.launch(state, part, head, head + 1, logits=buffer, logits_first=first, logits_count=count)
                self.wait()
                yield buffer.read(np.float32, count * self.shape.vocab).reshape(count, self.shape.vocab)
            state.position += len(part)

    def _kernel(self, tokens: int) -> _Kernel:
        return self._narrow if self._narrow and tokens <= NARROW_TOKENS else self._wide

    def memory_needed(self, tokens: int) -> int:
        """Bytes of scratch memory that a prompt of `tokens` tokens needs beyond what is there already."""
        chunk = min(tokens, MOST_CHUNK_TOKENS)
        if chunk <= self.scratch_tokens:
            return 0
        return sum(self._scratch_bytes(chunk).values()) - sum(buffer.nbytes for buffer in self.scratch.values())

    def _scratch_bytes(self, tokens: int) -> dict[str, int]:
        """Of each array, for chunks of up to `tokens` tokens."""
        needed = self._wide.layout.scratch(tokens)
        if self._narrow:
            narrow = self._narrow.layout.scratch(min(tokens, NARROW_TOKENS))
            needed = {name: max(nbytes, narrow[name]) for name, nbytes in needed.items()}
        return needed

    def _prepare(self, state: State, tokens: int, more: int = 0) -> None:
        self.decoder.gpu.make_current()
        self.decoder.reserve(state, state.position + tokens)
        if needed := self.memory_needed(tokens) + more:  # asking what is free takes time
            self._require(tokens, needed)
        chunk = min(tokens, MOST_CHUNK_TOKENS)
        if chunk > self.scratch_tokens:
            for buffer in self.scratch.values():
                buffer.free()
            self.scratch = {name: DeviceBuffer(nbytes) for name, nbytes in self._scratch_bytes(chunk).items()}
            self.scratch_tokens = chunk

    def _upload(self, tokens: Sequence[int]) -> int:
        """The address of `tokens` on the GPU, until the next upload."""
        from cuda.bindings import driver

        given = np.asarray(tokens, np.int32)
        if given.nbytes > self.token_ids.nbytes:
            self.token_ids.free()
            self.token_ids = DeviceBuffer(given.nbytes)
        check(driver.cuMemcpyHtoDAsync(self.token_ids.address, given.ctypes.data, given.nbytes, self.decoder.stream))
        return self.token_ids.address

    def _require(self, tokens: int, needed: int) -> None:
        """Raises NotEnoughMemory if so many bytes are not free."""
        if needed <= self.decoder.gpu.memory_free():
            return
        self.decoder.pool.clear()
        if needed > (free := self.decoder.gpu.memory_free()):
            raise NotEnoughMemory(
                f"prefill of {tokens} tokens needs {needed:,} bytes of scratch memory on the GPU, and {free:,} are "
                "free: close sessions that are no longer needed, or other programs that use the GPU"
            )

    def launch(
        self,
        state: State,
        tokens: Sequence[int],
        first_phase: int,
        end_phase: int,
        timed: bool = False,
        logits: DeviceBuffer | None = None,
        logits_first: int = 0,
        logits_count: int = 0,
        ids: int = 0,
        ahead: int = 0,
    ) -> None:
        """Start one launch over phases [first_phase, end_phase) of one chunk; the state's position stays.

        Args:
            timed: for `times`, the end of each phase.
            ids: where `tokens` are on the GPU, if they are.
            ahead: tokens behind the state's position that launches before this one consume.
        """
        from cuda.bindings import driver

        decoder, count, kernel = self.decoder, len(tokens), self._kernel(len(tokens))
        arguments = PrefillArguments(
            tape=decoder.tape.address,
            matrix_offsets=self.matrix_offsets.address,
            embedding=decoder.embedding.address if decoder.embedding else 0,
            parameters=decoder.parameters.address,
            rope=decoder.rope.address,
            state=state.buffer.address,
            **{name: buffer.address for name, buffer in self.scratch.items()},
            logits=logits.address if logits else 0,
            barrier=self.barrier.address,
            times=self.times.address if timed else 0,
            report=decoder.mapped.address + 8 * REPORT,
            spin_limit=decoder.spin_limit,
            tokens=count,
            position=state.position + ahead,
            max_context=state.capacity,
            first_phase=first_phase,
            end_phase=end_phase,
            **kernel.layout.plan_launch(count, state.position + ahead),
            logits_first=logits_first,
            logits_count=logits_count,
        )
        stream = decoder.stream
        if not ahead:
            decoder.mapped.words[REPORT] = 0
        arguments.token_ids = ids or self._upload(tokens)
        check(driver.cuMemsetD8Async(self.barrier.address, 0, 4, stream))
        decoder.clock.begin()
        kernel.launch(arguments, stream)
        decoder.clock.end()

    def wait(self) -> None:
        """Until the launches so far are done.

        Raises:
            BackendError: one failed; the message says in which phase it waited, if it did.
        """
        from cuda.bindings import driver

        while True:
            (status,) = driver.cuStreamQuery(self.decoder.stream)
            if status == driver.CUresult.CUDA_SUCCESS:
                return
            if status != driver.CUresult.CUDA_ERROR_NOT_READY:
                raise BackendError(self._failure(status))
            time.sleep(20e-6)

    def _failure(self, status: Any) -> str:
        report = int(self.decoder.mapped.words[REPORT])
        where = (
            f"behind phase {report >> 32 & 0xFFFF}, block {report & 0xFFFFFFFF} waited too long"
            if report
            else status.name
        )
        return f"the prefill kernel failed ({where}); start again, and report this"

    def close(self) -> None:
        """Free the GPU's memory; the decoder stays."""
        for buffer in (self.matrix_offsets, self.barrier, self.times, self.token_ids, *self.scratch.values()):
            buffer.free()
        self.scratch, self.scratch_tokens = {}, 0
        for kernel in (self._wide, self._narrow):
            if kernel:
                kernel.unload()
