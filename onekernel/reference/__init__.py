"""The model in NumPy float32, written to be read: the oracle of the GPU kernels and the CPU backend.

One function per phase of the forward pass; the kernels use the same names. Formulas are those of transformers' Qwen3_5
(`models/qwen3_5/modeling_qwen3_5.py`, 5.17) and of flash-linear-attention's gated delta rule. A linear layer is
`y = x Wᵀ` with `W [out, in]`; the first axis of activations is the token.
"""
