"""How far a batch is from the float32 reference, and the kernel of single sequences beside it."""

from __future__ import annotations

import numpy as np
from batch_rows import advance, ids, new_row
from state_parts import errors

from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.gpu.batch_decoder import BatchDecoder
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import Gpu
from onekernel.gpu.layout import Layout
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State as ReferenceState
from onekernel.sampling.params import SamplingParams

LIMIT = 0.02  # relative error of a state, as in test_prefill.py
MOST_TURNED = 6  # times the error of a logit: more of a lead than errors of two logits turn around


def load(gpu: Gpu, shape: Shape, weights: Weights, vocabulary_size: int | None = None) -> Decoder:
    layout = Layout.plan(shape, vocabulary_size or shape.vocab, gpu.sm_count, gpu.shared_memory)
    return Decoder(gpu, layout, weights)


def compare(batch: BatchDecoder, weights: Weights, prompts: list[list[int]], rows: int, steps: int) -> dict[str, float]:
    """The worst relative errors of the first `rows` prompts' states, and of their logits the mean error in standard
    deviations, of this kernel and of that of single sequences: both against the reference, told the same tokens.

    The kernels multiply in bf16: of this model that moves a logit by 0.012 of the standard deviation (NumPy, products
    of rounded inputs), and so turns around leads of 0.03. Whose error is how large is what can be compared.
    """
    decoder, shape = batch.decoder, batch.decoder.shape
    parameters = Parameters.load(weights, shape, mtp=False)
    all_rows = [new_row(decoder, prompt, SamplingParams(logprobs=0)) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    scores: list[list[np.ndarray]] = [[] for _ in prompts[:rows]]
    for _ in range(steps):
        for tokens, new in zip(made, ids(advance(batch, all_rows, 1)), strict=True):
            tokens += new
        for place, ours in enumerate(scores):
            ours.append(batch._sampling[place].logits.read(np.float32, shape.vocab))
            assert made[place][-1] == np.argmax(ours[-1])
    worst: dict[str, float] = {}
    batched, single = [], []
    for row, prompt, tokens, ours in zip(all_rows[:rows], prompts, made, scores, strict=False):
        reference, alone = ReferenceState.empty(shape), decoder.new_state()
        if prompt[1:]:
            model.forward(parameters, reference, prompt[:-1])
        decoder.consume(alone, prompt[:-1])
        for token, logits in zip([prompt[-1], *tokens[:-1]], ours, strict=True):
            right = model.forward(parameters, reference, [token])
            batched.append(np.std(logits - right) / right.std())
            single.append(np.std(decoder.next_logits(alone, [token]) - right) / right.std())
            assert (right.max() - right[np.argmax(logits)]) / right.std() < MOST_TURNED * batched[-1]
        assert row.state.position == reference.position
        for part, values in errors(decoder, row.state, reference).items():
            worst[part] = max(worst.get(part, 0), max(values))
    return worst | {"logits": float(np.mean(batched)), "logits_of_single": float(np.mean(single))}


def check(found: dict[str, float], record_property) -> None:
    for part, error in found.items():
        record_property(f"error_{part}", float(f"{error:.3g}"))
    assert found["logits"] < 1.15 * found["logits_of_single"], found
    assert all(error < LIMIT for error in found.values()), found
