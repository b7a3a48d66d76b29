"""A decoder of any true size with random weights and any context, made on the GPU in seconds: for measuring speed only.

No checkpoint is read or written. One block of random bf16 numbers is repeated over all weights (no cache holds it, and
every byte is read as it would be), and over the keys and values of the context: nothing was decoded to get there. The
text that comes out means nothing; that the kernel is right is what tests/gpu shows.
"""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import VOCABULARY_SIZE
from onekernel.checkpoint.weights import Weights, expected_tensors
from onekernel.gpu import tape
from onekernel.gpu.decoder import Decoder, State, cache_bytes, recurrent_bytes
from onekernel.gpu.device import Gpu
from onekernel.gpu.layout import Layout
from onekernel.gpu.memory import DeviceBuffer, copy_rows

BLOCK = 1 << 26  # bytes of random numbers: more than the L2 cache
DEVIATION = 0.02  # of a weight


def plan(gpu: Gpu, shape: Shape) -> Layout:
    """The layout that the backend would choose for a checkpoint of this shape."""
    return Layout.plan(shape, VOCABULARY_SIZE, gpu.sm_count, gpu.shared_memory)


def random_decoder(gpu: Gpu, layout: Layout, seed: int = 0) -> Decoder:
    """A decoder whose weights are random. Raises what Decoder raises."""
    with patch.object(tape, "pack", lambda *_: iter(())):  # the tape is filled below
        decoder = Decoder(gpu, layout, small_tensors(layout.shape, seed))
    fill(decoder.tape, 0, decoder.tape.nbytes, bf16(BLOCK // 2, DEVIATION, seed))
    return decoder


def state_at(decoder: Decoder, position: int, more: int, seed: int = 1) -> State:
    """A state with `position` tokens of context, whose keys and values are random, and room for `more`."""
    state = decoder.new_state()
    decoder.reserve(state, position + more)
    start = recurrent_bytes(decoder.shape)
    fill(state.buffer, start, cache_bytes(decoder.shape, state.capacity), bf16(BLOCK // 2, 1.0, seed))
    state.position = position
    return state


def fill(buffer: DeviceBuffer, start: int, nbytes: int, block: np.ndarray) -> None:
    """Repeat `block` over `nbytes` bytes from byte `start` on."""
    done = min(nbytes, block.nbytes)
    buffer.write(block.view(np.uint8)[:done], start)
    while done < nbytes:
        part = min(block.nbytes, nbytes - done)
        copy_rows(buffer.address + start, part, buffer.address + start + done, part, part, 1)
        done += part


def bf16(count: int, deviation: float, seed: int) -> np.ndarray:
    """uint16 [count]: the bits of normal numbers, cut to bf16."""
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(deviation)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def small_tensors(shape: Shape, seed: int) -> Weights:
    """All that is not on the tape: norms, convolutions, decays, and the embedding if the head is another matrix."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, dims in expected_tensors(shape).items():
        if name == "embed_tokens.weight" and not shape.tied:
            data = np.resize(bf16(1 << 22, DEVIATION, seed), dims)
            tensors[name] = Tensor(name, "BF16", dims, data)
            continue
        if len(dims) > 1 and not name.endswith("conv1d.weight"):
            continue
        if name.endswith("A_log"):
            values = np.log(random.uniform(1, 16, dims))
        elif name.endswith("dt_bias"):
            step = np.exp(random.uniform(math.log(1e-3), math.log(1e-1), dims))
            values = np.log(np.expm1(step))
        else:
            centre = 1.0 if name.endswith("linear_attn.norm.weight") else 0.0
            values = centre + (0.4 if name.endswith("conv1d.weight") else 0.1) * random.standard_normal(dims)
        tensors[name] = Tensor(name, "F32", dims, values.astype(np.float32))
    return Weights(tensors)
