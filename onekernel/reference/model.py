"""The forward pass: embedding, layers, final norm, LM head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onekernel.reference.attention import attention
from onekernel.reference.linear_attention import linear_attention
from onekernel.reference.mlp import mlp
from onekernel.reference.norm import rms_norm
from onekernel.reference.parameters import LinearAttention, Parameters
from onekernel.reference.state import LinearState, State


def forward(
    parameters: Parameters, state: State, tokens: Sequence[int] | np.ndarray, all_logits: bool = False
) -> np.ndarray:
    """Consume `tokens` (at least one id, each below `vocab`) from any state, which then stands behind the last of them.

    One token is a decode step, more are a prefill. Returns float32 logits: [vocab] after the last token, or
    [T, vocab] after each of them with `all_logits`. Rows beyond the tokenizer's vocabulary are included.
    """
    hidden = final_hidden(parameters, state, tokens)
    return head(parameters, hidden) if all_logits else head(parameters, hidden[-1])


def final_hidden(parameters: Parameters, state: State, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """As `forward`, but returns what the LM head (and the MTP head) gets: [T, hidden] after the final norm."""
    shape = parameters.shape
    x = embed(parameters, tokens)
    linear: dict[int, LinearState] = {}
    for i, layer in enumerate(parameters.layers):
        normed = rms_norm(x, layer.input_layernorm, shape.norm_eps)
        if isinstance(layer.mixer, LinearAttention):
            mixed, linear[i] = linear_attention(layer.mixer, shape, state.linear[i], normed)
        else:
            mixed = attention(layer.mixer, shape, state.full[i], state.position, normed)
        x = x + mixed
        x = x + mlp(layer.mlp, rms_norm(x, layer.post_attention_layernorm, shape.norm_eps))
    # All at once at the end: a forward pass that is interrupted (Ctrl-C) leaves the state as it was.
    state.linear, state.position = linear, state.position + len(x)
    return rms_norm(x, parameters.norm, shape.norm_eps)


def embed(parameters: Parameters, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids [T] -> [T, hidden]."""
    return parameters.embed_tokens[np.asarray(tokens, np.int64)]


def head(parameters: Parameters, hidden: np.ndarray) -> np.ndarray:
    """Logits [..., vocab] of hidden states [..., hidden] that passed the final norm."""
    return hidden @ parameters.lm_head.T
