"""The gated delta rule in its two forms: one token at a time (decode) and 64 at a time (prefill).

A value head keeps a matrix S [key_head_dim, value_head_dim] that maps keys to values. Each token lets S fade by
exp(decay), reads what S holds for its key, and writes the difference to its value back, scaled by beta:

    S ← exp(g_t) S;   δ = β_t (v_t - Sᵀ k_t);   S ← S + k_t δᵀ;   o_t = Sᵀ q_t

Both functions take and return, with N value heads, K = key_head_dim and V = value_head_dim:

    query, key  [T, N, K]  after l2_norm and, for the query, the scale K^-0.5; key heads already repeated
    value       [T, N, V]
    decay, beta [T, N]     decay = g ≤ 0, beta in (0, 1)
    state       [N, K, V]  before the first token; not modified
    -> output [T, N, V], state [N, K, V] after the last token

They compute the same in any floating-point dtype; only rounding differs.
"""

from __future__ import annotations

import numpy as np

CHUNK = 64


def recurrent_delta_rule(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, as the formula stands. See the module for shapes."""
    output = np.empty_like(value)
    for t in range(len(value)):
        state = state * np.exp(decay[t])[:, None, None]
        read = np.matmul(key[t][:, None, :], state)[:, 0, :]
        delta = beta[t][:, None] * (value[t] - read)
        state += key[t][:, :, None] * delta[:, None, :]
        output[t] = np.matmul(query[t][:, None, :], state)[:, 0, :]
    return output, state


def chunked_delta_rule(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray, beta: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same in matrix products over chunks of 64 tokens (WY representation, UT transform).

    In a chunk, the δ of each token depends on those of the tokens before it through the lower triangular matrix A
    below. Solving for all of them at once leaves only two products that must wait for the state of the chunk before.
    """
    tokens = len(value)
    query, key, value, decay, beta = (_in_chunks(x) for x in (query, key, value, decay, beta))
    # From here on the axes are [N, chunks, CHUNK, ...]; decay and beta are columns [N, chunks, CHUNK, 1].
    decay, beta = decay[..., None], beta[..., None]

    # Independent of the state: all chunks at once.
    total = np.cumsum(decay, axis=2)  # γ_i: log of what is left at token i of the state that entered the chunk
    lower = np.tri(CHUNK, dtype=bool)
    fade = total - total.swapaxes(2, 3)  # γ_i - γ_j, from token j to token i; above the diagonal it might overflow
    fade = np.exp(np.where(lower, fade, -np.inf))
    correlation = beta * np.matmul(key, key.swapaxes(2, 3)) * fade
    correlation[..., ~np.tri(CHUNK, k=-1, dtype=bool)] = 0  # A, strictly lower triangular
    # (I + A) X = [β v | β e^γ k]. The matrix is unit lower triangular and its entries stay below 1, so the LU
    # decomposition inside `solve` never swaps rows: L is the matrix itself and this is plain forward substitution.
    right = np.concatenate([beta * value, beta * np.exp(total) * key], axis=-1)
    solved = np.linalg.solve(correlation + np.eye(CHUNK, dtype=value.dtype), right)
    own_delta, state_weight = np.split(solved, [value.shape[-1]], axis=-1)  # U and W: δ = U - W S
    attention = np.matmul(query, key.swapaxes(2, 3)) * fade
    faded_query = query * np.exp(total)
    key_to_end = (key * np.exp(total[:, :, -1:] - total)).swapaxes(2, 3)
    chunk_fade = np.exp(total[:, :, -1:])

    # Sequential: each chunk needs the state that the one before it left.
    output = np.empty_like(value)
    for c in range(value.shape[1]):
        delta = own_delta[:, c] - np.matmul(state_weight[:, c], state)
        output[:, c] = np.matmul(faded_query[:, c], state) + np.matmul(attention[:, c], delta)
        state = state * chunk_fade[:, c] + np.matmul(key_to_end[:, c], delta)

    heads, chunks, _, dim = output.shape
    return output.reshape(heads, chunks * CHUNK, dim).swapaxes(0, 1)[:tokens], state


def _in_chunks(x: np.ndarray) -> np.ndarray:
    """[T, N, ...] -> [N, chunks, CHUNK, ...], padded with zeros: tokens of decay 0 and beta 0 leave the state as is."""
    tokens, heads = x.shape[:2]
    chunks = -(-tokens // CHUNK)
    result = np.zeros((heads, chunks * CHUNK, *x.shape[2:]), x.dtype)
    result[:, :tokens] = x.swapaxes(0, 1)
    return result.reshape(heads, chunks, CHUNK, *x.shape[2:])
