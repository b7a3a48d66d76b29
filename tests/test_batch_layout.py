"""What the host tells the batch kernel: buckets, splits of the context, room in shared memory."""

from __future__ import annotations

import pytest

from onekernel.checkpoint.sizes import SIZES
from onekernel.errors import NotEnoughMemory, UnsupportedModel
from onekernel.gpu.batch_decoder import layouts_for
from onekernel.gpu.batch_layout import BUCKETS, BatchLayout, bucket_of, most_splits, splits
from onekernel.gpu.chips import CHIPS
from onekernel.gpu.layout import Layout


def decode_layout(size: str, arch: str) -> Layout:
    chip = CHIPS[arch]
    return Layout.plan(SIZES[size], 1000, chip.sm_count, chip.shared_memory)


def test_the_smallest_bucket_that_has_the_columns() -> None:
    assert [bucket_of(n) for n in (1, 8, 9, 33, 256)] == [8, 8, 16, 64, 256]
    with pytest.raises(UnsupportedModel, match="up to 256 sequences a step, not 257"):
        bucket_of(257)


def test_no_position_up_to_the_last_has_more_splits_than_there_is_room_for() -> None:
    worst = 0
    for position in range(40000):
        worst = max(worst, splits(position))
        assert worst <= most_splits(position)
    assert most_splits(10**6) == worst == 256


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_86", "sm_80", "sm_75"])
def test_every_chip_has_a_bucket_and_columns_come_out_even(size: str, arch: str) -> None:
    try:
        layouts = layouts_for(decode_layout(size, arch), BUCKETS)
    except NotEnoughMemory:
        assert arch == "sm_75"
        return
    for bucket, layout in layouts.items():
        constants = layout.constants()
        assert 8 * int(constants["COLUMN_GROUPS"]) * int(constants["PASSES"]) == bucket
        assert layout.ring_stages >= 2
    if arch == "sm_90a":
        assert list(layouts) == list(BUCKETS)


def test_scratch_grows_with_columns_and_splits() -> None:
    layout = decode_layout("0.8b", "sm_90a")
    small, large = BatchLayout.plan(layout, 8), BatchLayout.plan(layout, 64)
    assert all(8 * small.scratch(4)[name] == size for name, size in large.scratch(4).items())
    assert small.scratch(8)["partial"] == 2 * small.scratch(4)["partial"]
