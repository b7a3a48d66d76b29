"""What host and kernel agree on: limits, how blocks share rows, and the argument struct."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest

from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE
from onekernel.errors import NotEnoughMemory, UnsupportedModel
from onekernel.gpu import layout
from onekernel.gpu.chips import CHIPS
from onekernel.gpu.compile import ARCHITECTURES
from onekernel.gpu.layout import DecodeArguments, Layout, first_group
from onekernel.gpu.sampling import SamplingArguments


def plan(name: str, arch: str) -> Layout:
    chip = CHIPS[arch]
    return Layout.plan(SIZES[name], VOCABULARY_SIZE, chip.sm_count, chip.shared_memory)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_layout_on_every_chip(name: str, arch: str) -> None:
    if (name, arch) == ("27b", "sm_75"):  # 54 GB of weights: no chip of that architecture holds them anyway
        with pytest.raises(NotEnoughMemory, match=r"needs \d+ bytes of shared memory .* the chip has 64512"):
            plan(name, arch)
        return
    made = plan(name, arch)
    assert SIZES[name].kv_heads <= made.blocks <= CHIPS[arch].sm_count
    assert layout.LEAST_STAGES <= made.ring_stages <= layout.MOST_STAGES
    assert made.splits >= 1
    # A block that has more rows than the others makes all wait: what leaving SMs out costs must come back.
    groups = made.shape.vocab // layout.ROW_GROUP
    shares = [first_group(groups, b + 1, made.blocks) - first_group(groups, b, made.blocks) for b in range(made.blocks)]
    assert sum(shares) == groups
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 1000}, "hidden = 1000 to be a multiple of 256"),
        ({"intermediate": 3500}, "intermediate = 3500"),
        ({"head_dim": 128, "heads": 16}, "head_dim 256"),
        ({"value_head_dim": 64, "value_heads": 32}, "linear head dims of 128"),
        ({"rotary_dim": 32}, "64 rotary dims"),
        ({"heads": 16}, "GQA up to 6"),
    ],
)
def test_shape_that_the_kernel_cannot_run_is_named(changed: dict[str, int], message: str) -> None:
    shape = dataclasses.replace(SIZES["0.8b"], **changed)
    with pytest.raises(UnsupportedModel, match=message):
        Layout.plan(shape, VOCABULARY_SIZE, 132, 232448)


def test_constants_cover_what_the_shape_says() -> None:
    constants = plan("27b", "sm_90a").constants()
    shape = SIZES["27b"]
    assert constants["FULL_LAYER_MASK"] == sum(1 << i for i in range(3, 64, 4))
    assert constants["CONV_DIM"] == 2 * shape.key_dim + shape.value_dim
    assert constants["TIED"] is False
    assert constants["DEAD_BLOCK"] == -1  # no planted failure


@pytest.mark.parametrize("structure", [DecodeArguments, SamplingArguments])
def test_argument_struct_is_the_same_in_c_and_python(structure: type[ctypes.Structure]) -> None:
    """Every field of the C text, in order, where C puts it: at the next multiple of its own size (8 for a struct)."""
    name = structure.__name__
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", DecodeArguments.source(), re.DOTALL)
    assert body is not None
    fields = re.findall(r"^    (.+?)(\w+)(?:\[(\d+)\])?;$", body[1], re.MULTILINE)
    assert [field for _, field, _ in fields] == [field for field, *_ in structure._fields_]
    offset = 0
    for kind, field, count in fields:
        if kind.strip() == "SamplingArguments":
            size, alignment = ctypes.sizeof(SamplingArguments), 8
        else:
            alignment = 8 if "*" in kind or "long long" in kind or "double" in kind else 4
            size = alignment * int(count or 1)
        offset += -offset % alignment
        member = getattr(structure, field)
        assert (member.offset, member.size) == (offset, size), field
        offset += size
    assert ctypes.sizeof(structure) == offset + -offset % 8
    assert ctypes.sizeof(structure) < 4096  # what a launch may pass


def test_enums_are_in_the_order_of_the_names() -> None:
    text = layout.enums()
    assert re.search(r"enum Phase .*PHASE_NONE, .*PHASE_TOKEN", text)
    assert len(layout.PHASES) < 2**15  # of the report word
