"""The tape: all weight matrices as 16-bit numbers, in the exact order in which each block of the kernel reads them.

A matrix [rows, columns] is cut into groups of 8 rows, and block b owns groups G b / BLOCKS up to G (b + 1) / BLOCKS.
Each of the 8 warps multiplies its eighth of the columns, in tiles of 8 rows x 32 columns (512 bytes). A group is stored
in stages of 4 tiles a warp, as [warp][tile][lane][16 bytes], where lane 4 r + c has row r and columns 8 c to 8 c + 7;
the last stage of a group may be shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import FULL, Shape
from onekernel.checkpoint.weights import Weights
from onekernel.gpu.layout import CONSUMER_WARPS, ROW_GROUP, TILE_BYTES, TILE_COLUMNS, TILES_PER_STAGE, first_group

LANE_BYTES = 16
Bits = np.ndarray  # uint16: bf16 or fp16


@dataclass(frozen=True)
class Matrix:
    """One matrix on the tape: its size, and the tensors that it is made of."""

    rows: int
    columns: int
    tensors: tuple[str, ...]
    interleaved: bool = False  # gate_proj and up_proj, by 4 rows in turn


def matrices(shape: Shape) -> Iterator[Matrix]:
    """All matrices in the order of use."""
    for i, kind in enumerate(shape.layer_types):
        layer = f"layers.{i}"
        if kind == FULL:
            mixer = f"{layer}.self_attn"
            names = tuple(f"{mixer}.{part}_proj.weight" for part in ("q", "k", "v"))
            yield Matrix(2 * shape.query_dim + 2 * shape.kv_dim, shape.hidden, names)
            yield Matrix(shape.hidden, shape.query_dim, (f"{mixer}.o_proj.weight",))
        else:
            mixer = f"{layer}.linear_attn"
            names = tuple(f"{mixer}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
            yield Matrix(shape.conv_dim + shape.value_dim + 2 * shape.value_heads, shape.hidden, names)
            yield Matrix(shape.hidden, shape.value_dim, (f"{mixer}.out_proj.weight",))
        names = (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight")
        yield Matrix(2 * shape.intermediate, shape.hidden, names, interleaved=True)
        yield Matrix(shape.hidden, shape.intermediate, (f"{layer}.mlp.down_proj.weight",))
    yield Matrix(shape.vocab, shape.hidden, ("embed_tokens.weight" if shape.tied else "lm_head.weight",))


@dataclass(frozen=True)
class Tape:
    """Where things lie on the tape, in bytes."""

    offsets: np.ndarray  # int64 [blocks]: where a block's part begins
    head_offsets: np.ndarray  # int64 [blocks]: where in it the LM head begins
    nbytes: int


def plan(shape: Shape, blocks: int) -> Tape:
    sizes = np.zeros((blocks,), np.int64)
    for matrix in matrices(shape):
        head = sizes.copy()  # the LM head comes last
        sizes += share_bytes(matrix, blocks)
    return Tape(sizes.cumsum() - sizes, head, int(sizes.sum()))


def pack(weights: Weights, shape: Shape, blocks: int, half: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(offset on the tape, uint8 bytes) of every piece of every matrix.

    Args:
        half: fp16 in place of bf16 (for sm_75, whose tensor cores know no bf16).
    """
    at = plan(shape, blocks).offsets.copy()
    for matrix in matrices(shape):
        bits = rows_of(weights, matrix, half)
        packed = pack_matrix(bits)
        for block in range(blocks):
            first, end = (first_group(len(packed), b, blocks) for b in (block, block + 1))
            if first < end:
                piece = packed[first:end].reshape(-1)
                yield int(at[block]), piece
                at[block] += piece.nbytes


def rows_of(weights: Weights, matrix: Matrix, half: bool) -> Bits:
    """uint16 [rows rounded up to whole groups, columns]."""
    parts = [_bits(weights, name, half) for name in matrix.tensors]
    if matrix.interleaved:
        joined = np.stack([part.reshape(-1, ROW_GROUP // 2, matrix.columns) for part in parts], 1)
        return joined.reshape(matrix.rows, matrix.columns)
    missing = -matrix.rows % ROW_GROUP
    if missing:
        parts.append(np.zeros((missing, matrix.columns), np.uint16))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pack_matrix(bits: Bits) -> np.ndarray:
    """uint8 [groups, bytes of a group] of uint16 [rows, columns]."""
    rows, columns = bits.shape
    groups, tiles = rows // ROW_GROUP, columns // CONSUMER_WARPS // TILE_COLUMNS
    lanes = TILE_COLUMNS * 2 // LANE_BYTES
    chunks = np.ascontiguousarray(bits).view("V16")  # 8 columns at a time
    chunks = chunks.reshape(groups, ROW_GROUP, CONSUMER_WARPS, tiles, lanes)
    packed = np.empty((groups, columns * ROW_GROUP * 2 // LANE_BYTES), "V16")
    for start in range(0, tiles, TILES_PER_STAGE):
        stage = chunks[:, :, :, start : start + TILES_PER_STAGE].transpose(0, 2, 3, 1, 4)
        at = start * CONSUMER_WARPS * TILE_BYTES // LANE_BYTES
        packed[:, at : at + stage[0].size] = stage.reshape(groups, -1)
    return packed.view(np.uint8)


def share_bytes(matrix: Matrix, blocks: int) -> np.ndarray:
    """int64 [blocks]: bytes of each block's part of a matrix."""
    groups = -(-matrix.rows // ROW_GROUP)
    first = np.array([first_group(groups, block, blocks) for block in range(blocks + 1)], np.int64)
    return np.diff(first) * ROW_GROUP * matrix.columns * 2


def _bits(weights: Weights, name: str, half: bool) -> Bits:
    """A tensor as the 16-bit numbers that the tensor cores take."""
    tensor = weights[name]
    if half:
        return np.asarray(tensor.float32(), np.float16).view(np.uint16)
    if tensor.dtype == "BF16":
        return tensor.data
    return bf16_bits(tensor.float32())


def bf16_bits(x: np.ndarray) -> Bits:
    """float32 to bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
