"""The CUDA backend: the prefill and the decode kernel on one NVIDIA GPU."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from onekernel.backend.batch import Batch
from onekernel.backend.cuda_batch import CudaBatch
from onekernel.backend.stepwise import StepwiseBackend, check_limits
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.errors import BackendError, NotEnoughMemory, UnsupportedModel
from onekernel.gpu import decoder, parking
from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.batch_layout import BUCKETS
from onekernel.gpu.compile import compiler_version
from onekernel.gpu.decoder import MOST_GIVEN, Decoder, Snapshot, State
from onekernel.gpu.device import Gpu, find_gpu
from onekernel.gpu.layout import MOST_STOP_TOKENS, Layout
from onekernel.gpu.parking import Parked
from onekernel.gpu.prefill_layout import MOST_CHUNK_TOKENS, PrefillLayout
from onekernel.gpu.prefiller import Prefiller
from onekernel.sampling.params import SampledToken
from onekernel.sampling.sampler import Sampler

TOKENS_PER_LAUNCH = 256
LEAST_PREFILL = 5  # tokens from which on one prefill takes less time than so many steps of the decode kernel


def usable_gpu() -> Gpu:
    """The GPU that CudaBackend would use.

    Raises:
        BackendError: there is none, or no compiler for its kernels; one sentence says why.
    """
    gpu = find_gpu()
    compiler_version()
    return gpu


def check_fits(gpu: Gpu, shape: Shape) -> None:
    """Whether a model of this shape runs on `gpu` beside what is there now.

    Raises:
        UnsupportedModel, NotEnoughMemory: it does not; the message says why.
    """
    decoder.check_memory(gpu, _layout(gpu, shape, shape.vocab))


def memory_needed(shape: Shape) -> int:
    """Bytes of GPU memory that a model of this shape takes with one session of 4,096 tokens."""
    gpu = find_gpu()
    layout = _layout(gpu, shape, shape.vocab)
    prefill = PrefillLayout.plan(layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
    scratch = sum(prefill.scratch(MOST_CHUNK_TOKENS).values()) if prefill else 0
    return decoder.memory_needed(shape, layout) + scratch


def state_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of GPU memory of a state that holds so many tokens."""
    return decoder.state_bytes(shape, decoder.capacity_for(tokens))


def _layout(gpu: Gpu, shape: Shape, vocabulary_size: int) -> Layout:
    return Layout.plan(shape, vocabulary_size, gpu.sm_count, gpu.shared_memory)


class CudaBackend(StepwiseBackend[State]):
    """Generation runs ahead on the GPU, many tokens a launch, sampling included."""

    name = "cuda"
    runs_ahead = True
    prefill_chunk = prefill_cut = MOST_CHUNK_TOKENS
    most_slots = BUCKETS[-1]

    def __init__(
        self,
        decoder: Decoder,
        vocabulary_size: int,
        max_context: int | None = None,
        prefiller: Prefiller | None = None,
    ) -> None:
        """Args: see StepwiseBackend; without a prefiller, prompts go through the decode kernel."""
        super().__init__(decoder.shape, vocabulary_size, max_context)
        self._decoder: Decoder | None = decoder
        self._prefiller = prefiller

    @classmethod
    def load(cls, folder: Path, shape: Shape, vocabulary_size: int, max_context: int | None = None) -> CudaBackend:
        """Compile the kernel for this GPU and this shape, and bring the checkpoint in `folder` to the GPU.

        Raises:
            InvalidRequest: see check_limits; before anything is read.
            NotEnoughMemory: before anything is read.
            BackendError: there is no GPU to use, or the kernel cannot run on it.
            CheckpointError: see load_weights.
        """
        check_limits(shape, vocabulary_size, max_context)
        gpu = usable_gpu()
        layout = _layout(gpu, shape, vocabulary_size)
        prefill = PrefillLayout.plan(layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
        decoder = Decoder(gpu, layout, load_weights(folder, shape))
        prefiller = Prefiller(decoder, prefill) if prefill else None
        return cls(decoder, vocabulary_size, max_context, prefiller)

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            raise BackendError("this backend was closed; load the model again")
        self._decoder.gpu.make_current()
        return self._decoder

    @property
    def device_seconds(self) -> float:
        """GPU time of all launches so far, of both kernels."""
        return self.decoder.clock.seconds

    def new_state(self) -> State:
        return self.decoder.new_state()

    def prefill(self, state: State, tokens: Sequence[int]) -> None:
        self._check(state, tokens)
        self._advance(state, tokens)

    def _advance(self, state: State, tokens: Sequence[int]) -> None:
        decoder = self.decoder
        if self._prefiller and len(tokens) >= LEAST_PREFILL:
            self._prefiller.prefill(state, tokens)
        else:
            decoder.consume(state, tokens)

    def _consume(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        self._advance(state, tokens[:-1])
        return self.decoder.next_logits(state, tokens[-1:])

    def _generate(
        self, state: State, tokens: Sequence[int], sampler: Sampler, max_tokens: int, stop_tokens: frozenset[int]
    ) -> Generator[SampledToken, None, None]:
        if sampler.constraint is not None or len(stop_tokens) > MOST_STOP_TOKENS:
            yield from super()._generate(state, tokens, sampler, max_tokens, stop_tokens)
            return
        self._advance(state, tokens[:-1])
        tokens = tokens[-1:]
        while max_tokens > 0:
            # The last token of a launch is not consumed by it, so it may stand right behind the end of the context.
            room = self.max_context - state.position - len(tokens) + 1
            count = min(max_tokens, room, TOKENS_PER_LAUNCH)
            with closing(self.decoder.generate(state, tokens, sampler, count, stop_tokens)) as made:
                for token in made:
                    yield token
            max_tokens -= count
            if token.id in stop_tokens or count == room:
                return
            tokens = [token.id]

    def batch(self, slots: int) -> Batch:
        alone = super().batch(slots)
        try:
            kernel = BatchDecoder(self.decoder, slots)
        except (UnsupportedModel, NotEnoughMemory, BackendError) as error:
            print(f"onekernel: the batch kernel cannot run here, so sequences take turns: {error}", file=sys.stderr)
            return alone
        return CudaBatch(kernel, alone, self._prepare, self._advance, MOST_STOP_TOKENS, self.max_context)

    def logits(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        self._check(state, tokens)
        decoder, parts = self.decoder, []
        if self._prefiller and len(tokens) >= LEAST_PREFILL:
            parts = list(self._prefiller.logits(state, tokens))
        else:
            for start in range(0, len(tokens), MOST_GIVEN):
                parts.append(decoder.logits(state, tokens[start : start + MOST_GIVEN]))
        return np.concatenate(parts) if parts else np.empty((0, self.shape.vocab), np.float32)

    def snapshot(self, state: State) -> Snapshot:
        return self.decoder.snapshot(state)

    def park(self, state: State) -> Parked:
        return parking.park(self.decoder, state)

    def restore(self, snapshot: Snapshot | Parked) -> State:
        if isinstance(snapshot, Parked):
            return parking.unpark(self.decoder, snapshot)
        return self.decoder.restore(snapshot)

    def state_bytes(self, tokens: int) -> int:
        return state_bytes(self.shape, tokens)

    def memory_free(self) -> int | None:
        return self.decoder.memory_free()

    def _reserve(self, state: State, positions: int) -> None:
        self.decoder.reserve(state, positions)

    def close(self) -> None:
        if self._decoder is not None:
            if self._prefiller is not None:
                self._prefiller.close()
            self._decoder.close()
            self._decoder = self._prefiller = None
