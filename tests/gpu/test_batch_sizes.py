"""The batch kernel for shapes of other sizes, two layers of each."""

from __future__ import annotations

import dataclasses

import pytest
from batch_errors import check, compare, load
from batch_rows import advance, ids, new_row
from measures import random_tokens
from random_model import SIZES, random_weights, shortened
from state_parts import state_bytes

from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.device import Gpu


@pytest.mark.parametrize("size", ["2b", "27b"])
def test_the_other_sizes(gpu: Gpu, size: str, record_property) -> None:
    shape = dataclasses.replace(shortened(size), layer_types=SIZES[size].layer_types[2:4])  # one of each kind
    decoder = load(gpu, shape, weights := random_weights(shape))
    batch = BatchDecoder(decoder, 32)
    prompts = [random_tokens(shape, 20 + i, seed=i) for i in range(20)]
    rows = [new_row(decoder, prompt) for prompt in prompts]
    alone = new_row(decoder, prompts[3])
    made = ids(advance(batch, rows, 4))
    assert ids(advance(batch, [alone], 4))[0] == made[3]
    assert state_bytes(decoder, alone.state) == state_bytes(decoder, rows[3].state)
    found = compare(batch, weights, prompts, 2, 4)
    batch.close()
    decoder.close()
    check(found, record_property)
