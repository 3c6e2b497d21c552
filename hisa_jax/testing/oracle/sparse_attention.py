"""Sparse grouped-query attention: queries of a group of heads share keys and values, and attend to what is listed.

out[t, h] = sum_j p[h, j] * v[j, g],   p = softmax_j(scale * q[t, h] . k[j, g]),   g the group of head h
"""

import numpy as np

from .scores import float64


def sparse_attention(
    q, k, v, indices, scale: float, block_size: int = 1, query_positions=None, sink=None
) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, V], ids of blocks -> out [B, T, Hq, V], lse [B, T, Hq], both float64.

    `indices` are [B, T, K] or [B, T, G, K], a list a group; of each listed block count the tokens that exist and lie
    at or before the query's position. Ids that are no block's are none. A block listed twice counts twice. exp(sink[h])
    joins the denominator of `out` only. A head with nothing listed gives 0 and lse -inf.
    """
    q, k, v, indices = float64(q), float64(k), float64(v), np.asarray(indices)
    (B, T, Hq, _), (S, G) = q.shape, k.shape[1:3]
    sink = np.full(Hq, -np.inf) if sink is None else float64(sink)
    if indices.ndim == 3:
        indices = np.repeat(indices[:, :, None], G, axis=2)
    out, lse = np.zeros((B, T, Hq, v.shape[3])), np.full((B, T, Hq), -np.inf)
    ends = np.full((B, T), S) if query_positions is None else np.minimum(np.asarray(query_positions) + 1, S)
    for b, t, h in np.ndindex(B, T, Hq):
        g = h // (Hq // G)
        first = indices[b, t, g].astype(np.int64) * block_size
        tokens = (first[:, None] + np.arange(block_size)).ravel()
        tokens = tokens[(tokens >= 0) & (tokens < ends[b, t])]
        if len(tokens) == 0:
            continue
        logits = scale * (k[b, tokens, g] @ q[b, t, h])
        lse[b, t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        out[b, t, h] = np.exp(logits - np.logaddexp(lse[b, t, h], sink[h])) @ v[b, tokens, g]
    return out, lse
