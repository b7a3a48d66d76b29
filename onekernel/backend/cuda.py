"""The CUDA backend: the decode kernel on one NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from onekernel.backend.stepwise import StepwiseBackend, check_limits
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.errors import BackendError
from onekernel.gpu import decoder
from onekernel.gpu.decoder import MOST_GIVEN, Decoder, Snapshot, State
from onekernel.gpu.device import find_gpu
from onekernel.gpu.layout import MOST_STOP_TOKENS, Layout
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.sampling.sampler import Sampler

TOKENS_PER_LAUNCH = 256


def memory_needed(shape: Shape) -> int:
    """Bytes of GPU memory that a model of this shape takes with one session of 4,096 tokens."""
    gpu = find_gpu()
    return decoder.memory_needed(shape, Layout.plan(shape, shape.vocab, gpu.sm_count, gpu.shared_memory))


class CudaBackend(StepwiseBackend[State]):
    """Greedy generation runs ahead on the GPU, many tokens a launch; other sampling takes one launch a token for now."""

    name = "cuda"
    runs_ahead = True

    def __init__(self, decoder: Decoder, vocabulary_size: int, max_context: int | None = None) -> None:
        super().__init__(decoder.shape, vocabulary_size, max_context)
        self._decoder: Decoder | None = decoder

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
        gpu = find_gpu()
        layout = Layout.plan(shape, vocabulary_size, gpu.sm_count, gpu.shared_memory)
        return cls(Decoder(gpu, layout, load_weights(folder, shape)), vocabulary_size, max_context)

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            raise BackendError("this backend was closed; load the model again")
        self._decoder.gpu.make_current()
        return self._decoder

    def new_state(self) -> State:
        return self.decoder.new_state()

    def prefill(self, state: State, tokens: Sequence[int]) -> None:
        self._check(state, tokens)
        self.decoder.consume(state, tokens)

    def _consume(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        return self.decoder.next_logits(state, tokens)

    def _generate(
        self, state: State, tokens: Sequence[int], sampler: Sampler, max_tokens: int, stop_tokens: frozenset[int]
    ) -> Generator[SampledToken, None, None]:
        if sampler.constraint is not None or not on_device(sampler.params) or len(stop_tokens) > MOST_STOP_TOKENS:
            yield from super()._generate(state, tokens, sampler, max_tokens, stop_tokens)
            return
        while max_tokens > 0:
            # The last token of a launch is not consumed by it, so it may stand right behind the end of the context.
            room = self.max_context - state.position - len(tokens) + 1
            count = min(max_tokens, room, TOKENS_PER_LAUNCH)
            with closing(self.decoder.greedy(state, tokens, count, stop_tokens)) as made:
                for token in made:
                    yield SampledToken(token)
            max_tokens -= count
            if token in stop_tokens or count == room:
                return
            tokens = [token]

    def logits(self, state: State, tokens: Sequence[int]) -> np.ndarray:
        self._check(state, tokens)
        parts = [
            self.decoder.logits(state, tokens[start : start + MOST_GIVEN])
            for start in range(0, len(tokens), MOST_GIVEN)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.shape.vocab), np.float32)

    def snapshot(self, state: State) -> Snapshot:
        return self.decoder.snapshot(state)

    def restore(self, snapshot: Snapshot) -> State:
        return self.decoder.restore(snapshot)

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


def on_device(sampling: SamplingParams) -> bool:
    """Whether the kernel itself can choose the tokens."""
    return (
        sampling.greedy
        and sampling.logprobs is None
        and not sampling.logit_bias
        and sampling.presence_penalty == sampling.frequency_penalty == 0
        and sampling.repetition_penalty == 1
    )
