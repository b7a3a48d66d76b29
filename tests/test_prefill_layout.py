"""The prefill kernel's view of the tape, as a NumPy twin of group_place and tile_offset in prefill/model.cuh."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import small_shape

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.sizes import SIZES
from onekernel.checkpoint.weights import Weights, expected_tensors
from onekernel.gpu import tape
from onekernel.gpu.layout import CONSUMER_WARPS, STAGE_BYTES, TILES_PER_STAGE, Layout, first_group
from onekernel.gpu.prefill_layout import MOST_SPLITS, PrefillArguments, PrefillLayout, matrix_offsets, wgmma_source

H200 = (132, 232448)  # SMs, bytes of shared memory a block may use
ARCH = "sm_90a"
SMALL = dataclasses.replace(
    small_shape.SMALL, hidden=768, intermediate=1792, vocab=200, kv_heads=1, key_heads=2, value_heads=4
)


def random_weights(shape: Shape) -> Weights:
    random = np.random.default_rng(0)
    return Weights(
        {
            name: Tensor(name, "BF16", dims, random.integers(0, 2**16, dims, np.uint16))
            for name, dims in expected_tensors(shape).items()
        }
    )


def tile_at(whole: np.ndarray, offsets: np.ndarray, matrix: tape.Matrix, group: int, column_tile: int) -> np.ndarray:
    """uint16 [8, 32]: what group_place and tile_offset find."""
    blocks = len(offsets)
    groups, tiles = -(-matrix.rows // 8), matrix.columns // CONSUMER_WARPS // 32
    block = ((group + 1) * blocks - 1) // groups
    begin, end = first_group(groups, block, blocks), first_group(groups, block + 1, blocks)
    assert begin <= group < end
    warp, tile = column_tile // tiles, column_tile % tiles
    stage = tile // TILES_PER_STAGE
    count = min(TILES_PER_STAGE, tiles - stage * TILES_PER_STAGE)
    at = int(offsets[block]) + (group - begin) * matrix.columns * 16 + stage * STAGE_BYTES
    at += (warp * count + tile % TILES_PER_STAGE) * 512
    return whole[at : at + 512].view(np.uint16).reshape(8, 32)


@pytest.mark.parametrize("blocks", [7, 96])
def test_every_tile_of_every_matrix_is_found_on_the_tape(blocks: int) -> None:
    weights = random_weights(SMALL)
    whole = np.zeros(tape.plan(SMALL, blocks).nbytes, np.uint8)
    for offset, piece in tape.pack(weights, SMALL, blocks, half=False):
        whole[offset : offset + piece.nbytes] = piece
    offsets = matrix_offsets(SMALL, blocks)
    assert len(offsets) == 4 * SMALL.layers + 1
    for matrix, where in zip(tape.matrices(SMALL), offsets, strict=True):
        rows = tape.rows_of(weights, matrix, half=False)
        for group in range(len(rows) // 8):
            for tile in range(matrix.columns // 32):
                expected = rows[8 * group : 8 * group + 8, 32 * tile : 32 * tile + 32]
                assert np.array_equal(tile_at(whole, where, matrix, group, tile), expected), (matrix, group, tile)


@pytest.mark.parametrize("tokens", [1, 64, 520, 2048])
def test_scratch_has_room_for_the_splits_of_every_shorter_chunk(tokens: int) -> None:
    layout = PrefillLayout.plan(Layout.plan(SMALL, 200, *H200), *H200, ARCH)
    assert layout is not None
    rows = layout.scratch(tokens)["partials"] // 2 // SMALL.hidden
    for count in range(1, tokens + 1):
        for columns in (SMALL.intermediate, SMALL.value_dim, SMALL.query_dim):
            splits = layout.splits(count, columns)
            assert 1 <= splits <= MOST_SPLITS
            assert splits * count <= rows


def test_less_shared_memory_means_fewer_stages_and_too_little_is_none() -> None:
    decode = Layout.plan(SMALL, 200, *H200)
    large, small = PrefillLayout.plan(decode, *H200, ARCH), PrefillLayout.plan(decode, 132, 101376, "sm_86")
    assert large is not None
    assert small is not None
    assert (large.token_tile, large.gemm_stages) > (small.token_tile, small.gemm_stages)
    for layout, shared in ((large, H200[1]), (small, 101376)):
        assert layout.gemm_stages * layout.token_tile * 128 + 1024 <= shared
    assert PrefillLayout.plan(decode, 40, 65536, "sm_75") is None
    assert PrefillLayout.plans(decode, 40, 65536, "sm_75") == []


@pytest.mark.parametrize(("tokens", "position"), [(1, 0), (16, 8192), (520, 0), (2048, 6144), (2048, 129024)])
def test_keys_are_dealt_to_more_blocks_where_there_are_few_tokens(tokens: int, position: int) -> None:
    layout = PrefillLayout.plan(Layout.plan(SIZES["0.8b"], 248077, *H200), *H200, ARCH)
    assert layout is not None
    splits = layout.attention_splits(tokens, position)
    needed = 4 * splits * tokens * layout.shape.heads * (layout.shape.head_dim + 4)
    assert needed <= layout.scratch(tokens)["attention"]
    assert 1 <= splits <= layout.blocks
    if tokens == 16:
        assert splits > 40


def test_the_generated_declarations_agree_with_the_struct_and_the_tile() -> None:
    source = PrefillArguments.source()
    assert [line.split()[-1].strip(";") for line in source.splitlines()[1:-1]] == [
        name for name, _ in PrefillArguments._fields_
    ]
    assert wgmma_source(192, 32).count("acc[") == 96 + 32 + 64 + 16 + 16 + 2 * 64
    assert "m64n192k16" in wgmma_source(192, 32)


def test_memory_for_a_long_prompt_is_bounded_by_the_chunk() -> None:
    shape = dataclasses.replace(SMALL, vocab=248320)
    layout = PrefillLayout.plan(Layout.plan(shape, 248077, *H200), *H200, ARCH)
    assert layout is not None
    assert sum(layout.scratch(2048).values()) < 2**28
