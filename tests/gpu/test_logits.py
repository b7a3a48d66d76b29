"""Logits of the whole 0.8B shape, random weights: no further from float32 than Transformers' own bf16 forward is."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from measures import random_tokens, relative_error
from random_model import SIZES, VOCABULARY_SIZE

from onekernel.checkpoint.safetensors import Tensor
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import Weights
from onekernel.reference import model
from onekernel.reference.parameters import Parameters
from onekernel.reference.state import State

# Where flash-linear-attention is installed, Transformers computes its "float32" with kernels that multiply in TF32.
sys.modules["fla"] = None  # type: ignore[assignment]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXTS = (1, 2, 3, 5, 17, 64, 65, 128, 300, 520, 777, 1000, 1500, 1904, 2000)
CHECKED = 12  # tokens on which the float32 reference itself is compared with the NumPy model


def make_theirs(shape: Shape, seed: int):
    """Transformers' model on the GPU, in bf16, with random weights."""
    config = transformers.Qwen3_5TextConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        layer_types=list(shape.layer_types),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        linear_num_key_heads=shape.key_heads,
        linear_num_value_heads=shape.value_heads,
        linear_key_head_dim=shape.key_head_dim,
        linear_value_head_dim=shape.value_head_dim,
        max_position_embeddings=shape.max_context,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": shape.rotary_dim / shape.head_dim,
            "mrope_section": [11, 11, 10],
        },
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        theirs = transformers.Qwen3_5ForCausalLM(config).eval().to(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device="cuda")
        uniform = torch.rand(parameter.shape, generator=generator, device="cuda")
        if name.endswith("A_log"):
            values = torch.log(0.5 + 7.5 * uniform)
        elif name.endswith("dt_bias"):
            step = torch.exp(math.log(1e-3) + math.log(100.0) * uniform)
            values = step + torch.log(-torch.expm1(-step))
        elif name.endswith("linear_attn.norm.weight"):
            values = 1 + 0.1 * values
        elif "conv1d" in name:
            values = 0.4 * values
        elif parameter.ndim == 1:
            values = 0.1 * values
        else:
            values = values * (0.02 if "embed" in name or "head" in name else parameter.shape[1] ** -0.5)
        parameter.data = values.to(parameter.dtype)
    theirs.tie_weights()
    return theirs


def weights_of(theirs, shape: Shape) -> Weights:
    """The same bits for us."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.")
        if shape.tied and name == "lm_head.weight":
            continue
        bits = tensor.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
        tensors[name] = Tensor(name, "BF16", bits.shape, bits)
    return Weights(tensors)


def their_logits(theirs, tokens: list[int], contexts) -> np.ndarray:
    with torch.no_grad():
        hidden = theirs.model(torch.tensor([tokens], device="cuda"), use_cache=False).last_hidden_state[0]
        chosen = hidden[[context - 1 for context in contexts]]
        return theirs.lm_head(chosen).float().cpu().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # what Transformers warns of is not our business
def test_logits_are_as_close_to_float32_as_transformers_bf16(seed: int, make_decoder, record_property) -> None:
    shape = SIZES["0.8b"]
    theirs = make_theirs(shape, seed)
    weights = weights_of(theirs, shape)
    tokens = random_tokens(shape, max(CONTEXTS), seed)
    bf16 = their_logits(theirs, tokens, CONTEXTS)
    theirs.float()
    exact = their_logits(theirs, tokens, CONTEXTS)
    del theirs
    torch.cuda.empty_cache()
    if seed == 0:
        reference = model.forward(
            Parameters.load(weights, shape, mtp=False), State.empty(shape), tokens[:CHECKED], all_logits=True
        )
        short = [i for i, context in enumerate(CONTEXTS) if context <= CHECKED]
        agreement = relative_error(exact[short], reference[[CONTEXTS[i] - 1 for i in short]])
        record_property("float32_references_differ_by", float(f"{agreement:.3g}"))
        assert agreement < 1e-4
        del reference

    decoder = make_decoder(weights, shape, VOCABULARY_SIZE)
    state = decoder.new_state()
    ours = np.stack([decoder.next_logits(state, tokens[state.position : context]) for context in CONTEXTS])
    our_errors = [relative_error(ours[i], exact[i]) for i in range(len(CONTEXTS))]
    their_errors = [relative_error(bf16[i], exact[i]) for i in range(len(CONTEXTS))]
    for name, errors in (("ours", our_errors), ("transformers_bf16", their_errors)):
        record_property(f"mean_error_{name}", float(f"{np.mean(errors):.4g}"))
        record_property(f"worst_error_{name}", float(f"{max(errors):.4g}"))
    record_property("contexts", list(CONTEXTS))
    assert np.mean(our_errors) <= np.mean(their_errors)
    assert max(our_errors) <= max(their_errors)
