"""The scan: which units of tokens a query keeps by the score of one virtual head, and how sure that is.

    v[t] = sum_h w[t, h] * a[t, h] * q[t, h];   scan score of token s = k_scale[s] * v[t] . k[s]

`a`, the slopes, are counts of open heads at a few sampled tokens, and v is rounded to bfloat16 unless the keys are
float32. An implementation that sums in float32 may see a head open, or a token among the best, where the oracle does
not, and round v the other way; `slack` is by how much that may move a scan score.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from .scores import float64

N_SAMPLES, N_BEST = 256, 16


class Scanned(NamedTuple):
    """One query's scan, and what its slopes were counted from.

    Attributes:
        token_scan: [visible], the scan score of each token.
        bounds: [visible], sizes that these cannot exceed.
        products, product_bounds: [H, samples] of heads and sampled tokens, and sizes that they cannot exceed.
        scores: [samples], their exact scores.
        weights: [H, visible], how far one more open sample moves each token's scan score.
        head, head_bounds: [D], v before it is rounded, and sizes that it cannot exceed.
        sizes: [visible, D], of the dequantised keys.
        is_rounded: whether v is.
    """

    token_scan: np.ndarray
    bounds: np.ndarray
    products: np.ndarray
    product_bounds: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    head: np.ndarray
    head_bounds: np.ndarray
    sizes: np.ndarray
    is_rounded: bool


def scan_query(q, k, k_scale, w, visible: int, token_scores, method) -> Scanned:
    """[H, D], [S, D], [S], [H] and the exact scores [visible] of its visible tokens -> one query's scan."""
    is_rounded, slopes = np.asarray(k).dtype.itemsize < 4, method.slopes
    q, k, w = float64(q), float64(k)[:visible], float64(w)
    k_scale = float64(k_scale)[:visible]
    seen = int4(k) if method.sketch == "int4" else k
    with np.errstate(invalid="ignore", over="ignore"):
        sampled = np.arange(0, visible, step_of(visible))
        products, sizes = q @ k[sampled].T, np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(k, axis=1)[None]
        scores = token_scores[sampled]
        a = np.ones(len(q)) if slopes == "plain" else slopes_of(products, scores)
        v = (w * a) @ q
        each = w[:, None] * (q @ seen.T) * k_scale
        empty = slopes == "plain" or not visible
        return Scanned(
            token_scan=(seen @ (rounded(v) if is_rounded else v)) * k_scale,
            bounds=(np.abs(w * a)[:, None] * sizes).sum(axis=0) * np.abs(k_scale),
            products=products[:, :0] if empty else products,
            product_bounds=sizes[:, sampled],
            scores=scores,
            weights=np.abs(each) / max(min(N_BEST, len(sampled)), 1),
            head=v,
            head_bounds=np.abs(w * a) @ np.abs(q),
            sizes=np.abs(seen * k_scale[:, None]),
            is_rounded=is_rounded,
        )


def rounded(x) -> np.ndarray:
    """The nearest bfloat16."""
    return float64(np.asarray(x).astype(np.float32).astype(ml_dtypes.bfloat16))


def int4(k) -> np.ndarray:
    """[S, D] -> [S, D]: each number as the nearest of -7 to 7 times a scale, a tie to the smaller.

    The scale of 32 neighbours is the least number of 5 significant bits that is at least a 7th of their largest. What
    lies within a millionth of a tie, or of such a number, counts as it.
    """
    approximate = np.full_like(k, np.nan)
    for first in range(0, k.shape[1], 32):
        group = k[:, first : first + 32]
        seventh = np.abs(group).max(axis=1) / 7
        fraction, exponent = np.frexp(seventh)
        scale = np.ldexp(np.ceil(fraction * 32 - 2**-15) / 32, exponent)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(scale > 0, np.round(group / scale * (1 - 2**-20)), 0)
            approximate[:, first : first + 32] = np.where(np.isfinite(scale), codes * scale, np.nan)
    return approximate


def step_of(visible: int) -> int:
    """The least power of two that leaves at most 256 of the positions 0, step, 2 step, ... below `visible`."""
    step = 1
    while -(-visible // step) > N_SAMPLES:
        step *= 2
    return step


def slopes_of(products, scores) -> np.ndarray:
    """[H, n], [n] -> [H]: each head's share of open products among the 16 best, a tie to the lower position."""
    best = np.argsort(-scores, kind="stable")[:N_BEST]
    return (products[:, best] > 0).sum(axis=1) / max(len(best), 1)


def unit_scores(scanned: Scanned, unit: int) -> np.ndarray:
    """[visible] -> [units]: each unit's best visible token; NaN counts as -inf."""
    tokens = np.where(np.isnan(scanned.token_scan), -np.inf, scanned.token_scan)
    return np.array([tokens[i : i + unit].max() for i in range(0, len(tokens), unit)])


def slack(scanned: Scanned, tolerance: float, score_scale: float) -> float:
    """How far unsure slopes and roundings may move two tokens' scan scores: 0 unless one is within the tolerance."""
    if tolerance == 0:
        return 0.0
    unsure = _unsure_samples(scanned, tolerance, score_scale)
    moved = (unsure[:, None] * scanned.weights).sum(axis=0)
    if scanned.is_rounded:
        with np.errstate(invalid="ignore", over="ignore"):
            # With other slopes every component may round the other way: by an 128th of it at most.
            less = tolerance * scanned.head_bounds + (np.abs(scanned.head) / 128 if unsure.any() else 0)
            moved = moved + scanned.sizes @ (rounded(scanned.head + less) - rounded(scanned.head - less))
    return float(moved[np.isfinite(moved)].max(initial=0.0)) * 2


def _unsure_samples(scanned: Scanned, tolerance: float, score_scale: float) -> np.ndarray:
    """[H]: at how many of the best samples each head may be open or not."""
    products, scores = scanned.products, scanned.scores
    if not products.size:
        return np.zeros(len(products))
    order = np.argsort(-scores, kind="stable")
    best = np.zeros(len(scores), bool)
    best[order[:N_BEST]] = True
    with np.errstate(invalid="ignore"):
        near_zero = np.abs(products) <= tolerance * scanned.product_bounds
        unsure = (near_zero & best).sum(axis=1).astype(float)
        if len(scores) > N_BEST:
            cut = scores[order[N_BEST - 1]]
            near = np.abs(scores - cut) <= tolerance * score_scale
            n = min((near & best).sum(), (near & ~best).sum())
            unsure += n  # so many may be others, with any heads open
    return unsure
