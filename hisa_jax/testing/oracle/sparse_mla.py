"""Sparse attention over the chosen tokens, in MLA's absorbed form: one latent row is both key and value.

out[t, h] = sum_j p[h, j] * kv[index[j], :value_dim],   p = softmax_j(scale * q[t, h] . kv[index[j]])
"""

import numpy as np

from .scores import float64


def sparse_mla(q, kv, indices, value_dim: int, scale: float, sink=None) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, N, Dk], [B, S, Dk], [B, T, K], [N] -> out [B, T, N, value_dim], lse [B, T, N], both float64.

    Indices outside [0, S) are masked. exp(sink[h]) joins the denominator of `out` only; lse leaves it out. A row with
    nothing chosen gives 0 and lse -inf. An index given twice counts twice.
    """
    q, kv, indices = float64(q), float64(kv), np.asarray(indices)
    (B, T, N, _), S = q.shape, kv.shape[1]
    sink = np.full(N, -np.inf) if sink is None else float64(sink)
    out, lse = np.zeros((B, T, N, value_dim)), np.full((B, T, N), -np.inf)
    for b, t in np.ndindex(B, T):
        chosen = indices[b, t][(indices[b, t] >= 0) & (indices[b, t] < S)]
        if len(chosen) == 0:
            continue
        rows = kv[b, chosen]  # [K', Dk]
        logits = scale * (q[b, t] @ rows.T)  # [N, K']
        top = logits.max(axis=-1)
        lse[b, t] = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        denominator = np.logaddexp(lse[b, t], sink)
        out[b, t] = np.exp(logits - denominator[:, None]) @ rows[:, :value_dim]
    return out, lse
