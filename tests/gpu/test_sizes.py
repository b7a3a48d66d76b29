"""Every size of the family, true dimensions with four layers, against the NumPy reference: logits and whole states.

The states hold what each phase leaves behind: conv windows (input projections), recurrent states (convolution, norms,
gates, delta rule), keys and values (projections, norm, RoPE) of the last layer, whose input passed all layers before;
the logits add attention, the MLP and the head.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from measures import random_tokens, relative_error
from random_model import SIZES, random_weights, shortened
from state_parts import errors

from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State

LENGTH = 70
# Relative error against float32 where matrices take bf16 inputs: 2^-9 a rounding, some roundings a layer.
LOGITS, STATE = 0.02, 0.02


@pytest.mark.parametrize("name", [*SIZES, "0.8b untied", "demo"])
@pytest.mark.timeout(300)
def test_logits_and_states_equal_the_reference(name: str, make_decoder, demo_shape, record_property) -> None:
    if name == "demo":
        shape = dataclasses.replace(demo_shape, mtp_layers=0, layer_types=demo_shape.layer_types[:4])
    else:
        shape = shortened(name.removesuffix(" untied"))
        if name.endswith("untied"):
            shape = dataclasses.replace(shape, tied=False)
    weights = random_weights(shape, seed=3)
    decoder = make_decoder(weights, shape)
    tokens = random_tokens(shape, LENGTH)

    reference = Parameters.load(weights, shape, mtp=False)
    their_state = State.empty(shape)
    expected = model.forward(reference, their_state, tokens, all_logits=True)
    state = decoder.new_state()
    logits = decoder.logits(state, tokens)
    assert state.position == their_state.position == LENGTH

    found = {part: max(values) for part, values in errors(decoder, state, their_state).items()}
    found["logits"] = relative_error(logits, expected)
    for part, error in found.items():
        record_property(f"error_{part}", float(f"{error:.3g}"))
    assert np.isfinite(logits).all()
    assert found["logits"] < LOGITS
    assert all(found[part] < STATE for part in ("conv_window", "recurrent", "keys", "values")), found
    # The same again in one go without the head: prompt tokens take the same way.
    consumed = decoder.new_state()
    decoder.consume(consumed, tokens)
    assert {part: max(values) for part, values in errors(decoder, consumed, their_state).items()} == {
        part: error for part, error in found.items() if part != "logits"
    }


@pytest.mark.timeout(300)
def test_attention_over_many_splits_equals_the_reference(make_decoder, record_property) -> None:
    """A context that every SM takes a part of, one block's new keys among them."""
    shape = shortened("0.8b")
    weights = random_weights(shape, seed=4)
    decoder = make_decoder(weights, shape)
    tokens = random_tokens(shape, 2100, seed=4)
    their_state = State.empty(shape)
    reference = Parameters.load(weights, shape, mtp=False)
    expected = model.forward(reference, their_state, tokens, all_logits=True)
    state = decoder.new_state()
    logits = decoder.logits(state, tokens)
    worst = max(relative_error(logits[i], expected[i]) for i in range(len(tokens)))
    record_property("worst_error_of_a_position", float(f"{worst:.3g}"))
    assert worst < 2 * LOGITS
    found = {part: max(values) for part, values in errors(decoder, state, their_state).items()}
    assert all(error < STATE for error in found.values()), found
