"""The released sizes, for what needs their dimensions and no weights: compiling kernels, random checkpoints."""

from __future__ import annotations

from onekernel.checkpoint.shape import FULL, LINEAR, Shape

VOCABULARY_SIZE = 248_077  # tokens of the released tokenizer; the embedding has 248,320 rows


def _size(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, value_heads: int, tied: bool
) -> Shape:
    return Shape(
        hidden=hidden,
        intermediate=intermediate,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * (layers // 4),
        vocab=248_320,
        tied=tied,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        key_heads=16,
        value_heads=value_heads,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel=4,
        norm_eps=1e-6,
        max_context=262_144,
        mtp_layers=0,
        eos_token_ids=(248_044,),
    )


SIZES = {
    "0.8b": _size(1024, 3584, 24, 8, 2, 16, True),
    "2b": _size(2048, 6144, 24, 8, 2, 16, True),
    "4b": _size(2560, 9216, 32, 16, 4, 32, True),
    "9b": _size(4096, 12288, 32, 16, 4, 32, False),
    "27b": _size(5120, 17408, 64, 24, 4, 48, False),
}
