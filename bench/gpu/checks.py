"""Results of the GPU benches against NumPy, for a few queries of each."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bench import shapes

CHECKED = 6  # queries whose results are compared
# Relative to the spread of a query's scores: Hopper adds e4m3 products with 14 bits, block means carry 8.
TOKENS, BLOCKS = 2e-3, 2e-2


def scores_of(q: Array, k: Array | np.ndarray, k_scale: Array | np.ndarray | None, w: Array) -> np.ndarray:
    """[H, D], [s, D], [s] or None, [H] -> [s] float32."""
    products = np.maximum(np.asarray(k, np.float32) @ np.asarray(q, np.float32).T, 0) @ np.asarray(w, np.float32)
    return products if k_scale is None else products * np.asarray(k_scale)


def block_means(k: Array, k_scale: Array | None, block_size: int) -> np.ndarray:
    """[S, D], [S] or None -> [S / block_size, D] float32."""
    values = k.astype(jnp.float32) if k_scale is None else k.astype(jnp.float32) * k_scale[:, None]
    return np.asarray(values.reshape(-1, block_size, k.shape[1]).mean(1))


def checked_rows(B: int, T: int) -> Sequence[tuple[int, int]]:
    """Sequence and query of what is compared: some queries of the first and the last sequence."""
    queries = sorted({int(t) for t in np.linspace(0, T - 1, CHECKED)})
    return [(b, t) for b in sorted({0, B - 1}) for t in queries]


def check_hisa(out: Any, inputs: Any, model: shapes.Model) -> None:
    """`out`: indices, count and blocks, [B, T, ...]; `inputs`: see `inputs.Inputs`."""
    indices, count, blocks = out
    q, k, k_scale, w, visible = inputs
    for b, t in checked_rows(*visible.shape):
        scale, seen = None if k_scale is None else k_scale[b], int(visible[b, t])
        kept = np.asarray(blocks[b, t])[np.asarray(blocks[b, t]) >= 0]
        check_blocks(kept, scores_of(q[b, t], block_means(k[b], scale, model.block_size), None, w[b, t]), seen, model)
        tokens = (kept[:, None] * model.block_size + np.arange(model.block_size)).ravel()
        tokens = tokens[tokens < seen]
        scores = scores_of(q[b, t], k[b, tokens], None if scale is None else scale[tokens], w[b, t])
        check_tokens(indices[b, t], count[b, t], scores, tokens, model.topk)


def check_flat(out: Any, inputs: Any, topk: int) -> None:
    """`out`: indices and count."""
    q, k, k_scale, w, visible = inputs
    for b, t in checked_rows(*visible.shape):
        seen = int(visible[b, t])
        scores = scores_of(q[b, t], k[b, :seen], None if k_scale is None else k_scale[b, :seen], w[b, t])
        check_tokens(out[0][b, t], out[1][b, t], scores, np.arange(seen), topk)


def check_blocks(kept: np.ndarray, scores: np.ndarray, visible: int, model: shapes.Model) -> None:
    """The forced blocks and the best of the rest, but for those near the threshold."""
    n, m = -(-visible // model.block_size), model.block_topk
    assert len(kept) == min(n, m) and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == n - 1
    if n > m:
        inner = scores[1 : n - 1]
        cut = np.sort(inner)[::-1][m - 3]
        off = np.setxor1d(kept[1:-1] - 1, np.flatnonzero(inner >= cut))
        assert (np.abs(inner[off] - cut) < BLOCKS * inner.std()).all()


def check_tokens(
    indices: Any, count: Any, scores: np.ndarray, tokens: np.ndarray, topk: int, spread: float | None = None
) -> None:
    """The best of `tokens`, which have these `scores`, but for those near the threshold.

    Args:
        spread: of the scores of all that the query sees, if `tokens` are but the upper end of them.
    """
    k = min(topk, len(tokens))
    chosen = np.asarray(indices)
    assert int(count) == k and (chosen[k:] == -1).all() and (np.diff(chosen[:k]) > 0).all()
    assert np.isin(chosen[:k], tokens).all()
    cut = np.sort(scores)[::-1][k - 1]
    off = np.setxor1d(chosen[:k], tokens[scores >= cut])
    wrong = np.abs(scores[np.searchsorted(tokens, off)] - cut).max(initial=0) / (spread or scores.std())
    assert wrong < TOKENS, f"a token is chosen or left out that is {wrong:.2g} of the spread from the threshold"


def check_attention(out: Any, q: Array, kv: Array, indices: Array, value_dim: int, scale: float) -> None:
    """The first and the last query of the first and the last sequence."""
    for b, t in {(b, t) for b in (0, q.shape[0] - 1) for t in (0, q.shape[1] - 1)}:
        rows = np.asarray(kv[b, indices[b, t]], np.float32)
        logits = scale * np.asarray(q[b, t], np.float32) @ rows.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        wanted = p / p.sum(1, keepdims=True) @ rows[:, :value_dim]
        assert np.linalg.norm(np.asarray(out[b, t], np.float32) - wanted) < 1e-2 * np.linalg.norm(wanted)
