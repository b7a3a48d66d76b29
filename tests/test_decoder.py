"""The host's side of a launch that needs no GPU: what a stopped kernel reports, and how much memory a model takes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from onekernel.checkpoint.sizes import SIZES
from onekernel.gpu import decoder
from onekernel.gpu.chips import CHIPS
from onekernel.gpu.layout import PHASES, Layout


@pytest.mark.parametrize(("index", "name"), list(enumerate(PHASES))[1:])
def test_report_of_a_stopped_kernel_names_phase_layer_and_block(index: int, name: str) -> None:
    """The word is made in primitive/watchdog.cuh."""
    word = 1 << 63 | index << 48 | 17 << 32 | 131
    assert decoder.stopped_itself(word, 2_000_000_000) == (
        f"the decode kernel stopped itself: waiting for {PHASES[name]} in layer 17, block 131 took more than 2 s"
    )


def test_memory_is_mostly_the_weights_and_grows_with_the_model() -> None:
    needed = []
    for shape in SIZES.values():
        chip = CHIPS["sm_90a"]
        layout = Layout.plan(shape, shape.vocab, chip.sm_count, chip.shared_memory)
        needed.append(decoder.memory_needed(shape, layout))
        free_head = dataclasses.replace(shape, tied=False)
        untied = decoder.memory_needed(free_head, dataclasses.replace(layout, shape=free_head))
        assert untied - needed[-1] == (2 * shape.vocab * shape.hidden if shape.tied else 0)
    assert needed == sorted(needed)
    assert needed[-1] == pytest.approx(2 * 26_895_998_464, rel=0.02)


def test_memory_that_is_kept_for_states_counts_as_free() -> None:
    """Otherwise parking a state would gain nothing, and whoever waits for room would wait on."""
    one = object.__new__(decoder.Decoder)
    one.gpu, one.pool = SimpleNamespace(memory_free=lambda: 1000), SimpleNamespace(spare=200)
    assert one.memory_free() == 1200


@pytest.mark.parametrize(
    ("positions", "capacity"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (8192, 8192), (100_000, 131_072)]
)
def test_capacities_double(positions: int, capacity: int) -> None:
    assert decoder.capacity_for(positions) == capacity
    assert decoder.state_bytes(SIZES["0.8b"], capacity) == (
        decoder.recurrent_bytes(SIZES["0.8b"]) + decoder.cache_bytes(SIZES["0.8b"], capacity)
    )


def test_cache_and_recurrent_state_have_the_sizes_of_the_documentation() -> None:
    shape = SIZES["0.8b"]  # 6 attention layers of 2 kv heads; 18 delta-net layers of 16 heads
    assert decoder.cache_bytes(shape, 1000) == 6 * 2 * 2 * 256 * 1000 * 2
    assert decoder.recurrent_bytes(shape) == 18 * 4 * (16 * 128 * 128 + 4 * 6144)
