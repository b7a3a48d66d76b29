"""The MTP head: from the model's hidden state after token p and the token p + 1, guess token p + 2.

Used for speculative decoding. It is one attention layer with a KV cache of its own and shares embedding and LM head
with the model. (Formulas as in vLLM's `qwen3_5_mtp.py`; transformers has no MTP for this family.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.reference.attention import attention
from onekernel.reference.mlp import mlp
from onekernel.reference.model import embed
from onekernel.reference.norm import rms_norm
from onekernel.reference.parameters import Attention, Parameters
from onekernel.reference.state import KeyValueCache


@dataclass
class MTPState:
    position: int  # pairs of hidden state and token consumed so far
    cache: KeyValueCache

    @classmethod
    def empty(cls, shape: Shape) -> MTPState:
        return cls(0, KeyValueCache.empty(shape.kv_heads, shape.head_dim))

    def copy(self) -> MTPState:
        return MTPState(self.position, self.cache.copy(self.position))


def mtp_hidden(
    parameters: Parameters, state: MTPState, hidden: np.ndarray, next_tokens: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Consume T pairs of a hidden state and the token that came after it.

    Args:
        parameters: loaded with the MTP head.
        hidden: [T, hidden] from `model.final_hidden` for positions p, p + 1, ...; to draft further ahead, the output
            of this function.
        next_tokens: [T] ids of the tokens at positions p + 1, p + 2, ...

    Returns:
        [T, hidden] after the head's own norm; `model.head` turns it into the logits of the tokens at p + 2, ...
    """
    shape, mtp = parameters.shape, parameters.mtp
    if mtp is None:
        raise ValueError("these parameters were loaded without an MTP head")
    embedding = rms_norm(embed(parameters, next_tokens), mtp.pre_fc_norm_embedding, shape.norm_eps)
    context = rms_norm(hidden, mtp.pre_fc_norm_hidden, shape.norm_eps)
    x = np.concatenate([embedding, context], axis=-1) @ mtp.fc.T
    layer = mtp.layer
    assert isinstance(layer.mixer, Attention)  # never a delta net
    normed = rms_norm(x, layer.input_layernorm, shape.norm_eps)
    x = x + attention(layer.mixer, shape, state.cache, state.position, normed)
    x = x + mlp(layer.mlp, rms_norm(x, layer.post_attention_layernorm, shape.norm_eps))
    state.position += len(x)
    return rms_norm(x, mtp.norm, shape.norm_eps)
