"""Decoder: a model on the GPU. It starts launches of the decode kernel and hears from them as they run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.errors import BackendError, NotEnoughMemory
from onekernel.gpu import parameters, sampling, tape
from onekernel.gpu.clock import LaunchClock
from onekernel.gpu.device import Gpu
from onekernel.gpu.driver import LOST, check
from onekernel.gpu.kernel import DecodeKernel
from onekernel.gpu.layout import (
    FAILURE_SHIFT,
    MARKS_OF_A_BLOCK,
    MOST_STOP_TOKENS,
    OUTPUT_RING,
    PHASES,
    DecodeArguments,
    Layout,
)
from onekernel.gpu.memory import DeviceBuffer, MappedMemory, copy_rows
from onekernel.gpu.pool import BufferPool
from onekernel.gpu.sampling import DeviceSampling, SamplingArguments, is_plain
from onekernel.sampling.params import SampledToken
from onekernel.sampling.sampler import Sampler, damaged

MOST_GIVEN = 4096  # tokens of a prompt in one launch
FIRST_CAPACITY = 4096  # positions that a new state's KV cache has room for
SPIN_LIMIT = 2_000_000_000  # nanoseconds
POOL_SHARE = 32  # of the GPU's memory, one part may be kept for the next states and snapshots
CONSUMED, REPORT, CANCEL = OUTPUT_RING, OUTPUT_RING + 1, OUTPUT_RING + 2  # words of the mapped memory
POLL = 20e-6  # seconds


@dataclass
class State:
    """One timeline on the GPU: conv windows and recurrent states (float32), then the KV cache (16 bit).

    Its layout is that of state.cuh: [linear layers] x (conv window [conv_dim, 4], state [value_heads, 128, 128]), then
    [full layers] x (keys, values), each [kv_heads, capacity, head_dim].
    """

    buffer: DeviceBuffer
    capacity: int  # positions
    position: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The bytes of a state that count, on the GPU."""

    buffer: DeviceBuffer
    position: int


def recurrent_bytes(shape: Shape) -> int:
    """Bytes of all conv windows and recurrent states of one timeline."""
    state = shape.value_heads * shape.value_head_dim * shape.key_head_dim
    return 4 * shape.linear_layers * (4 * shape.conv_dim + state)


def cache_rows(shape: Shape) -> tuple[int, int]:
    """How a timeline's KV cache is cut: (rows, each contiguous; bytes of one position in a row)."""
    return shape.full_layers * 2 * shape.kv_heads, 2 * shape.head_dim


def cache_bytes(shape: Shape, positions: int) -> int:
    """Bytes of the KV cache of one timeline."""
    rows, row = cache_rows(shape)
    return rows * row * positions


def capacity_for(positions: int) -> int:
    """Positions that a state has room for which must hold so many: capacities double."""
    return max(FIRST_CAPACITY, 1 << (positions - 1).bit_length())


def state_bytes(shape: Shape, capacity: int) -> int:
    """Bytes of the buffer of a State."""
    return recurrent_bytes(shape) + cache_bytes(shape, capacity)


def memory_needed(shape: Shape, layout: Layout) -> int:
    """Bytes of GPU memory for the model and one timeline at its first capacity."""
    fixed = tape.plan(shape, layout.blocks).nbytes + (0 if shape.tied else 2 * shape.vocab * shape.hidden)
    scratch = 8 * layout.channel_words + 4 * shape.vocab + FIRST_CAPACITY * shape.rotary_dim * 4
    scratch += sampling.memory_needed(shape.vocab, layout.blocks)
    return fixed + scratch + state_bytes(shape, FIRST_CAPACITY)


def check_memory(gpu: Gpu, layout: Layout) -> None:
    """Raises NotEnoughMemory, with the numbers, if the model and one timeline do not fit into what is free."""
    needed, free = memory_needed(layout.shape, layout), gpu.memory_free()
    if needed > free:
        raise NotEnoughMemory(
            f"this model needs {needed / 2**30:.1f} GiB of GPU memory, and {free / 2**30:.1f} GiB are free on "
            f"{gpu.name}: close other programs that use it, choose a smaller model, or use the backend cpu"
        )


def stopped_itself(report: int, spin_limit: int) -> str:
    """What the word that a Watchdog left (primitive/watchdog.cuh) says."""
    phase, layer, block = report >> 48 & 0x7FFF, report >> 32 & 0xFFFF, report & 0xFFFFFFFF
    return (
        f"the decode kernel stopped itself: waiting for {list(PHASES.values())[phase]} in layer {layer}, block {block} "
        f"took more than {spin_limit / 1e9:g} s"
    )


class Decoder:
    def __init__(self, gpu: Gpu, layout: Layout, weights: Weights, spin_limit: int = SPIN_LIMIT) -> None:
        """Compile the kernel and bring the weights to the GPU.

        Raises:
            NotEnoughMemory: before anything is allocated.
            BackendError: see DecodeKernel.
        """
        from cuda.bindings import driver

        shape = layout.shape
        check_memory(gpu, layout)
        self.gpu, self.shape, self.layout, self.spin_limit = gpu, shape, layout, spin_limit
        self.kernel = DecodeKernel(gpu, layout)
        self.stream = check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.clock = LaunchClock(self.stream)
        half = gpu.capability < (8, 0)
        plan = tape.plan(shape, layout.blocks)
        self.tape = DeviceBuffer(plan.nbytes)
        for offset, piece in tape.pack(weights, shape, layout.blocks, half):
            self.tape.write(piece, offset)
        self.tape_offsets = DeviceBuffer.of(plan.offsets)
        self.head_offsets = DeviceBuffer.of(plan.head_offsets)
        self.embedding = None
        if not shape.tied:
            matrix = tape.Matrix(shape.vocab, shape.hidden, ("embed_tokens.weight",))
            self.embedding = DeviceBuffer.of(np.ascontiguousarray(tape.rows_of(weights, matrix, half)))
        self.parameters = DeviceBuffer.of(parameters.pack(weights, shape))
        self.exchange = DeviceBuffer(8 * layout.channel_words)
        self.candidates = DeviceBuffer(32 * layout.blocks)
        self.last_logits = DeviceBuffer(4 * shape.vocab)
        self.sampling = DeviceSampling(shape.vocab, layout.blocks, OUTPUT_RING)
        self.tokens = DeviceBuffer(4 * MOST_GIVEN)
        self.rope = DeviceBuffer(0)
        self.mapped = MappedMemory(OUTPUT_RING + 3)
        self.pool = BufferPool(gpu.memory // POOL_SHARE)  # of states and snapshots
        self.timeline = DeviceBuffer(8 * layout.blocks * MARKS_OF_A_BLOCK if layout.timeline else 0)
        self._running = False
        self._failure: str | None = None

    def model_addresses(self) -> dict[str, int]:
        """The fields of a kernel's arguments that say where the model is. `reserve` may move `rope`."""
        return {
            "tape": self.tape.address,
            "tape_offsets": self.tape_offsets.address,
            "head_offsets": self.head_offsets.address,
            "embedding": self.embedding.address if self.embedding else 0,
            "parameters": self.parameters.address,
            "rope": self.rope.address,
        }

    # ---- states ----

    def new_state(self) -> State:
        state = State(DeviceBuffer(0), 0)
        self.reserve(state, FIRST_CAPACITY)
        return state

    def reserve(self, state: State, positions: int) -> None:
        """Make room for `positions`, doubling what there is.

        Raises:
            NotEnoughMemory: names the tokens and bytes; the state is as it was.
        """
        if positions <= state.capacity:
            return
        capacity = capacity_for(positions)
        fixed, nbytes = recurrent_bytes(self.shape), state_bytes(self.shape, capacity)
        if not self.pool.has(nbytes) and nbytes > (free := self.memory_free()):
            raise NotEnoughMemory(
                f"a context of {positions} tokens needs a cache of {nbytes / 2**30:.2f} GiB on the GPU, and "
                f"{free / 2**30:.2f} GiB are free: shorten the prompt, or close sessions that are no longer needed"
            )
        self._grow_rope(capacity)
        buffer = self._take(nbytes)
        buffer.clear()
        if state.capacity:
            copy_rows(state.buffer.address, fixed, buffer.address, fixed, fixed, 1)
            self._copy_cache(
                state.buffer.address + fixed, state.capacity, buffer.address + fixed, capacity, state.position
            )
        state.buffer.free()
        state.buffer, state.capacity = buffer, capacity

    def snapshot(self, state: State) -> Snapshot:
        fixed = recurrent_bytes(self.shape)
        buffer = self._take(state_bytes(self.shape, state.position))
        copy_rows(state.buffer.address, fixed, buffer.address, fixed, fixed, 1)
        self._copy_cache(
            state.buffer.address + fixed, state.capacity, buffer.address + fixed, state.position, state.position
        )
        return Snapshot(buffer, state.position)

    def restore(self, snapshot: Snapshot) -> State:
        fixed = recurrent_bytes(self.shape)
        state = State(DeviceBuffer(0), 0)
        self.reserve(state, max(FIRST_CAPACITY, snapshot.position))
        state.position = snapshot.position
        source = snapshot.buffer.address
        copy_rows(source, fixed, state.buffer.address, fixed, fixed, 1)
        self._copy_cache(
            source + fixed, snapshot.position, state.buffer.address + fixed, state.capacity, state.position
        )
        return state

    def memory_free(self) -> int:
        """Bytes that states and snapshots can have: what the GPU has free, and what is kept for them."""
        return self.gpu.memory_free() + self.pool.spare

    def _take(self, nbytes: int) -> DeviceBuffer:
        """Memory for a state or a snapshot, with anything in it."""
        from cuda.bindings import driver

        if not self._failure:
            check(driver.cuStreamSynchronize(self.stream))  # a launch that told its end may still be at its last lines
        return self.pool.take(nbytes)

    def _copy_cache(self, source: int, source_capacity: int, target: int, target_capacity: int, positions: int) -> None:
        rows, row = cache_rows(self.shape)
        copy_rows(source, source_capacity * row, target, target_capacity * row, positions * row, rows)

    def _grow_rope(self, positions: int) -> None:
        table_bytes = self.shape.rotary_dim * 4
        if positions * table_bytes > self.rope.nbytes:
            table = parameters.rope_table(self.shape, capacity_for(positions))
            self.rope.free()
            self.rope = DeviceBuffer.of(table.astype(np.float32))

    # ---- launches ----

    def consume(self, state: State, tokens: Sequence[int]) -> None:
        """Consume tokens without the LM head."""
        for start in range(0, len(tokens), MOST_GIVEN):
            self._start(state, tokens[start : start + MOST_GIVEN], max_tokens=0)
            self._finish(state)

    def logits(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        """Consume at most MOST_GIVEN tokens; float32 [tokens, vocab] logits after each."""
        buffer = DeviceBuffer(4 * len(tokens) * self.shape.vocab)
        self._start(state, tokens, max_tokens=0, logits=buffer, all_logits=True)
        self._finish(state)
        return buffer.read(np.float32, len(tokens) * self.shape.vocab).reshape(len(tokens), self.shape.vocab)

    def next_logits(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        """Consume tokens; float32 [vocab] logits after the last."""
        self.consume(state, tokens[:-1])
        self._start(state, tokens[-1:], max_tokens=1, logits=self.last_logits)
        self._finish(state)
        return self.last_logits.read(np.float32, self.shape.vocab)

    def generate(
        self, state: State, tokens: Sequence[int], sampler: Sampler, max_tokens: int, stop_tokens: frozenset[int]
    ) -> Generator[SampledToken, None, None]:
        """Consume `tokens`, then yield at most `max_tokens` (at most OUTPUT_RING), as the one launch makes them.

        Every token but the last is consumed as well; `sampler` is told each. Closing the iterator stops the launch
        within one token.

        Raises:
            BackendError, InvalidRequest: as Sampler.choose.
        """
        self.consume(state, tokens[:-1])
        plain = is_plain(sampler.params)
        self._start(state, tokens[-1:], max_tokens, stop_tokens, None if plain else self.last_logits, sampler=sampler)
        try:
            for made, word in enumerate(self._outputs(max_tokens)):
                if failure := word >> FAILURE_SHIFT & 7:
                    self._finish(state)
                    raise self._no_token(state, sampler, failure, has_logits=not plain)
                token = self.sampling.sampled(sampler.params, word & (1 << FAILURE_SHIFT) - 1, made)
                sampler.record(token.id)
                yield token
        finally:
            self.mapped.words[CANCEL] = 1
            self._finish(state)

    def _no_token(self, state: State, sampler: Sampler, failure: int, has_logits: bool) -> BackendError:
        """Why the launch that ended could not choose a token; raises InvalidRequest if the request is to blame."""
        if has_logits:
            # The reference has the words for it.
            sampler.choose(self.last_logits.read(np.float32, self.shape.vocab), state.position)
            return BackendError("the scores of the tokens are too large for float32: use smaller penalties")
        return damaged((float("nan"), float("inf"), float("-inf"))[failure - 1], state.position)

    def _start(
        self,
        state: State,
        tokens: Sequence[int],
        max_tokens: int,
        stop_tokens: frozenset[int] = frozenset(),
        logits: DeviceBuffer | None = None,
        all_logits: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        from cuda.bindings import driver

        if self._failure:
            raise BackendError(self._failure)
        steps = len(tokens) + max(0, max_tokens - 1)
        assert 0 < len(tokens) <= MOST_GIVEN
        assert max_tokens <= OUTPUT_RING
        assert not self._running
        self.gpu.make_current()
        self.reserve(state, state.position + steps)
        self.mapped.words[:] = 0
        stops = sorted(stop_tokens)[:MOST_STOP_TOKENS]
        arguments = DecodeArguments(
            **self.model_addresses(),
            state=state.buffer.address,
            exchange=self.exchange.address,
            candidates=self.candidates.address,
            logits=logits.address if logits else 0,
            tokens=self.tokens.address,
            output=self.mapped.address,
            consumed=self.mapped.address + 8 * CONSUMED,
            report=self.mapped.address + 8 * REPORT,
            cancel=self.mapped.address + 8 * CANCEL,
            timeline=self.timeline.address,
            spin_limit=self.spin_limit,
            steps=steps,
            given=len(tokens),
            max_tokens=max_tokens,
            position=state.position,
            max_context=state.capacity,
            all_logits=all_logits,
            no_head=max_tokens == 0,
            stop_count=len(stops),
            stop_tokens=(ctypes.c_int * MOST_STOP_TOKENS)(*stops),
            sampling=self.sampling.arguments(sampler, self.stream) if sampler else SamplingArguments(active=0),
        )
        given = np.asarray(tokens, np.int32)
        check(driver.cuMemcpyHtoDAsync(self.tokens.address, given.ctypes.data, given.nbytes, self.stream))
        check(driver.cuMemsetD8Async(self.exchange.address, 0, self.exchange.nbytes, self.stream))
        check(driver.cuMemsetD8Async(self.candidates.address, 0, self.candidates.nbytes, self.stream))
        self.clock.begin()
        self.kernel.launch(arguments, self.stream)
        self.clock.end()
        self._running = True

    def _outputs(self, max_tokens: int) -> Iterator[int]:
        for count in range(1, max_tokens + 1):
            while int(word := self.mapped.words[count - 1]) >> 32 != count:
                if self.mapped.words[CONSUMED] and int(self.mapped.words[count - 1]) >> 32 != count:
                    return
                self._pause()
            yield int(word) & 0x7FFFFFFF
            if int(word) >> 31 & 1:
                return

    def _finish(self, state: State) -> None:
        """Wait for the end of the launch and note what it consumed."""
        if not self._running:
            return
        while not self.mapped.words[CONSUMED]:
            self._pause()
        self._running = False
        state.position += int(self.mapped.words[CONSUMED]) & 0x7FFFFFFF

    def _pause(self) -> None:
        """Wait a moment for the kernel; raises BackendError if it has failed."""
        from cuda.bindings import driver

        time.sleep(POLL)
        (status,) = driver.cuStreamQuery(self.stream)
        if status in (driver.CUresult.CUDA_ERROR_NOT_READY, driver.CUresult.CUDA_SUCCESS):
            return
        self._running = False
        report = int(self.mapped.words[REPORT])
        self._failure = (
            stopped_itself(report, self.spin_limit) if report else f"the decode kernel failed ({status.name})"
        )
        self._failure += LOST
        raise BackendError(self._failure)

    def close(self) -> None:
        """Free the GPU's memory."""
        for buffer in (self.tape, self.tape_offsets, self.head_offsets, self.embedding, self.parameters, self.exchange):
            if buffer:
                buffer.free()
        for buffer in (self.candidates, self.last_logits, self.tokens, self.rope, self.timeline):
            buffer.free()
        self.pool.close()
        self.sampling.free()
        self.mapped.free()
        self.clock.close()
        self.kernel.unload()
