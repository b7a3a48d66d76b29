"""The tape: what the kernel will read is W, in whichever order; multiplied as the kernel does, it gives W x."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES
from onekernel.checkpoint.weights import Weights, expected_tensors
from onekernel.gpu import tape
from onekernel.gpu.layout import (
    CONSUMER_WARPS,
    ROW_GROUP,
    TILE_BYTES,
    TILE_COLUMNS,
    TILES_PER_STAGE,
    first_group,
)


def small(tied: bool) -> Shape:
    """Few layers and rows, but columns that make whole and broken stages: 1, 5 and 9 tiles a warp."""
    base = SIZES["0.8b"]
    return dataclasses.replace(
        base,
        **{"hidden": 256, "intermediate": 2304, "layer_types": base.layer_types[2:4], "vocab": 203, "tied": tied},
        **{"heads": 5, "kv_heads": 1, "key_heads": 2, "value_heads": 10},
    )


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)
    tensors = {}
    for name, dims in expected_tensors(shape).items():
        bits = tape.bf16_bits(random.standard_normal(dims, dtype=np.float32))
        tensors[name] = Tensor(name, "BF16", dims, bits)
    return Weights(tensors)


def widened(bits: np.ndarray, half: bool) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32) if half else (bits.astype(np.uint32) << 16).view(np.float32)


class NaiveReader:
    """Reads one block's part of the tape as the kernel's documentation says, number by number."""

    def __init__(self, memory: np.ndarray, at: int, half: bool) -> None:
        self.memory, self.at, self.half = memory, at, half

    def group(self, columns: int) -> np.ndarray:
        """The next 8 rows, [8, columns]."""
        tiles = columns // CONSUMER_WARPS // TILE_COLUMNS
        rows = np.full((ROW_GROUP, columns), np.nan, np.float32)
        for start in range(0, tiles, TILES_PER_STAGE):
            count = min(TILES_PER_STAGE, tiles - start)
            for warp in range(CONSUMER_WARPS):
                for tile in range(count):
                    offset = self.at + (warp * count + tile) * TILE_BYTES
                    numbers = widened(self.memory[offset : offset + TILE_BYTES].view(np.uint16), self.half)
                    for lane, eight in enumerate(numbers.reshape(32, 8)):
                        column = warp * (columns // CONSUMER_WARPS) + (start + tile) * TILE_COLUMNS + lane % 4 * 8
                        rows[lane // 4, column : column + 8] = eight
            self.at += CONSUMER_WARPS * count * TILE_BYTES
        return rows


def written(weights: Weights, shape: Shape, blocks: int, half: bool) -> np.ndarray:
    plan = tape.plan(shape, blocks)
    memory, times = np.zeros(plan.nbytes, np.uint8), np.zeros(plan.nbytes, np.uint8)
    for offset, piece in tape.pack(weights, shape, blocks, half):
        assert piece.flags.c_contiguous
        memory[offset : offset + piece.nbytes] = piece
        times[offset : offset + piece.nbytes] += 1
    assert (times == 1).all()  # every byte once
    return memory


@pytest.mark.parametrize(("tied", "half", "blocks"), [(True, False, 1), (False, False, 7), (True, True, 3)])
def test_matrices_multiplied_from_the_tape_are_the_checkpoints(tied: bool, half: bool, blocks: int) -> None:
    shape = small(tied)
    weights = random_weights(shape)
    memory = written(weights, shape, blocks, half)
    plan = tape.plan(shape, blocks)
    readers = [NaiveReader(memory, int(plan.offsets[block]), half) for block in range(blocks)]
    random = np.random.default_rng(1)
    for matrix in tape.matrices(shape):
        x = random.standard_normal(matrix.columns).astype(np.float32)
        groups = -(-matrix.rows // ROW_GROUP)
        head = matrix.tensors[0] in ("embed_tokens.weight", "lm_head.weight")
        products = []
        for block, reader in enumerate(readers):
            if head:
                assert reader.at == plan.offsets[block] + plan.head_offsets[block]
            for _ in range(first_group(groups, block, blocks), first_group(groups, block + 1, blocks)):
                products.append(reader.group(matrix.columns) @ x)
        y = np.concatenate(products)
        parts = [weights.float32(name) @ x for name in matrix.tensors]
        if matrix.interleaved:  # 4 rows of gate_proj, the same 4 of up_proj
            gate, up = (part.reshape(-1, 4) for part in parts)
            expected = np.stack([gate, up], 1).reshape(-1)
        else:
            expected = np.concatenate(parts)
        # fp16 keeps the 8 significant bits of a bf16 weight, too, unless the weight is tiny.
        np.testing.assert_allclose(y[: len(expected)], expected, rtol=1e-4, atol=1e-3)
        assert not y[len(expected) :].any()  # rows that fill up the last group
    ends = [*plan.offsets[1:], plan.nbytes]
    assert [reader.at for reader in readers] == [int(end) for end in ends]


@pytest.mark.parametrize("name", SIZES)
def test_plan_holds_every_weight_of_a_matrix_once(name: str) -> None:
    shape = SIZES[name]
    matrices = {name: dims for name, dims in expected_tensors(shape).items() if len(dims) == 2}
    if not shape.tied:
        del matrices["embed_tokens.weight"]
    assert sorted(matrices) == sorted(tensor for matrix in tape.matrices(shape) for tensor in matrix.tensors)
    plan = tape.plan(shape, 132)
    fill = shape.linear_layers * (-2 * shape.value_heads % ROW_GROUP) * shape.hidden
    assert plan.nbytes == 2 * (sum(rows * columns for rows, columns in matrices.values()) + fill)
    assert plan.offsets.dtype == plan.head_offsets.dtype == np.int64
    assert (plan.head_offsets < np.diff([*plan.offsets, plan.nbytes])).all()
    shares = np.diff([*plan.offsets, plan.nbytes])
    assert shares.max() < 1.1 * shares.mean()  # the slowest block sets the pace


def test_bf16_rounds_to_nearest_even() -> None:
    import torch

    random = np.random.default_rng(0)
    x = np.concatenate([random.standard_normal(10_000), 1 + 2.0**-9 * np.arange(-8, 9), [0.0, -0.0, 3e38, 1e-40]])
    x = x.astype(np.float32)
    theirs = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(tape.bf16_bits(x), theirs)


def test_float32_tensors_are_rounded_and_bf16_ones_kept() -> None:
    values = np.linspace(-2, 2, 256 * 8, dtype=np.float32).reshape(8, 256)
    weights = Weights({"w": Tensor("w", "F32", values.shape, values)})
    matrix = tape.Matrix(8, 256, ("w",))
    np.testing.assert_array_equal(tape.rows_of(weights, matrix, False), tape.bf16_bits(values))
    np.testing.assert_array_equal(tape.rows_of(weights, matrix, True).view(np.float16), values.astype(np.float16))
