"""Token scores and block means.

    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])        or without the relu

Every score is the same sequence of float64 operations wherever its key stands and whatever stands beside it. So equal
keys tie exactly, and a score does not change when the queries are cut into chunks: a BLAS product promises neither.
"""

import numpy as np

TILE = 1 << 15  # partial sums held at once; changes the speed, never a bit of the result


def float64(x) -> np.ndarray:
    """Any array (NumPy, ml_dtypes, JAX) as float64."""
    return np.asarray(x).astype(np.float64)


def token_scores(q, k, w, k_scale=None, activation: str | None = "relu") -> np.ndarray:
    """[T, H, D], [S, D], [T, H], [S] -> [T, S] float64. NaN stays NaN here: it becomes -inf where tokens are chosen."""
    q, k, w = float64(q), float64(k), float64(w)
    (T, H, _), S = q.shape, k.shape[0]
    step = max(1, TILE // max(1, H * S))
    parts = [_scores(q[t : t + step], k, w[t : t + step], activation) for t in range(0, T, step)]
    scores = np.concatenate(parts) if parts else np.zeros((0, S))
    with np.errstate(invalid="ignore", over="ignore"):
        return scores if k_scale is None else scores * float64(k_scale)


def block_means(k, k_scale, block_size: int, length: int) -> np.ndarray:
    """[S, D], [S] or None -> [ceil(S / block_size), D]: the mean of each block's tokens before `length`, dequantised.

    A block without such a token is 0.
    """
    k = float64(k)
    S, D = k.shape
    with np.errstate(invalid="ignore", over="ignore"):
        k = k if k_scale is None else k * float64(k_scale)[:, None]
        means = np.zeros((-(-S // block_size), D))
        for block in range(len(means)):
            present = k[block * block_size : min((block + 1) * block_size, length)]
            if len(present):
                means[block] = present.sum(axis=0) / len(present)
    return means


def _scores(q, k, w, activation) -> np.ndarray:
    T, H, D = q.shape
    with np.errstate(invalid="ignore", over="ignore"):
        products = dots(q.reshape(T * H, D), k)
        products = np.maximum(products, 0) if activation == "relu" else products  # NaN goes through
        products, total = products.reshape(T, H, -1), np.zeros((T, k.shape[0]))
        for h in range(H):
            total += w[:, h, None] * products[:, h]
    return total


def dots(rows, k) -> np.ndarray:
    """[R, D], [S, D] -> [R, S]. Multiply, then add, from d = 0 on: two roundings a term, no FMA, no pairwise sum."""
    (R, D), S = rows.shape, k.shape[0]
    dots, columns = np.zeros((R, S)), np.ascontiguousarray(k.T)
    step = max(1, TILE // max(1, R))
    for s in range(0, S, step):
        tile = columns[:, s : s + step]
        total, term = np.zeros((R, tile.shape[1])), np.empty((R, tile.shape[1]))
        for d in range(D):
            np.multiply(rows[:, d, None], tile[d], out=term)
            total += term
        dots[:, s : s + step] = total
    return dots
