"""The scan: which units of tokens a query keeps by the score of a few heads in place of all, and how sure that is.

    scan score of token s = k_scale[s] * (v[t] . k[s] + sum_{h in E} w[t, h] * relu(q[t, h] . k[s]))
    v[t] = sum_{h not in E} w[t, h] * a[t, h] * q[t, h];   E: the heads of greatest |w[t, h]| * |q[t, h]|

`a`, the slopes, are counts of open heads at a few sampled tokens, and v is rounded to bfloat16 unless the keys are
float32. An implementation that sums in float32 may see a head open, a token among the best or a head in E where the
oracle does not, and round v the other way; `slack` is by how much that may move a scan score.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from .scores import dots, float64

N_SAMPLES, N_BEST = 256, 32


class Scanned(NamedTuple):
    """One query's scan, and what its slopes were counted from.

    Attributes:
        token_scan: [visible], the scan score of each token.
        bounds: [visible], sizes that these cannot exceed.
        products, product_bounds: [H, samples] of heads and sampled tokens, and sizes that they cannot exceed.
        scores: [samples], their exact scores.
        weights: [H, visible], |w * q . k| of each head, which is all that it can contribute to a token's scan score.
        n_best: of how many samples slopes are shares.
        head, head_bounds: [D], v before it is rounded, and sizes that it cannot exceed.
        sizes: [visible, D], of the dequantised keys.
        is_rounded: whether v is.
        head_sizes: [H], |w| * |q|; is_exact: [H], whether in E.
    """

    token_scan: np.ndarray
    bounds: np.ndarray
    products: np.ndarray
    product_bounds: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    n_best: int
    head: np.ndarray
    head_bounds: np.ndarray
    sizes: np.ndarray
    is_rounded: bool
    head_sizes: np.ndarray
    is_exact: np.ndarray


def scan_query(q, k, k_scale, w, visible: int, token_scores, method) -> Scanned:
    """[H, D], [S, D], [S], [H] and the exact scores [visible] of its visible tokens -> one query's scan."""
    is_rounded, slopes = np.asarray(k).dtype.itemsize < 4, method.slopes
    q, k, w = float64(q), float64(k)[:visible], float64(w)
    k_scale = float64(k_scale)[:visible]
    seen = int4(k) if method.sketch == "int4" else k
    with np.errstate(invalid="ignore", over="ignore"):
        sampled = np.arange(0, visible, step_of(visible))
        products, sizes = dots(q, k[sampled]), np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(k, axis=1)[None]
        scores = token_scores[sampled]
        a = np.ones(len(q)) if slopes == "plain" else slopes_of(products, scores)
        head_sizes = np.abs(w) * np.linalg.norm(q, axis=1)
        is_exact = np.zeros(len(q), bool)
        by_size = np.argsort(np.where(np.isnan(head_sizes), np.inf, -head_sizes), kind="stable")
        is_exact[by_size[: method.exact_heads]] = True
        linear, exact = np.where(is_exact, 0, w * a), np.where(is_exact, w, 0)
        v = np.where(is_exact[:, None], 0, linear[:, None] * q).sum(axis=0)
        total = dots((rounded(v) if is_rounded else v)[None], seen)[0]  # equal keys tie
        for h in np.flatnonzero(is_exact):
            total = total + exact[h] * np.maximum(dots(q[h : h + 1], seen)[0], 0)
        each = w[:, None] * (q @ seen.T) * k_scale
        empty = slopes == "plain" or not visible
        return Scanned(
            token_scan=total * k_scale,
            bounds=(np.abs(linear + exact)[:, None] * sizes).sum(axis=0) * np.abs(k_scale),
            products=products[:, :0] if empty else products,
            product_bounds=sizes[:, sampled],
            scores=scores,
            weights=np.abs(each),
            n_best=max(min(N_BEST, len(sampled)), 1),
            head=v,
            head_bounds=np.abs(linear) @ np.abs(q),
            sizes=np.abs(seen * k_scale[:, None]),
            is_rounded=is_rounded,
            head_sizes=head_sizes,
            is_exact=is_exact,
        )


def rounded(x) -> np.ndarray:
    """The nearest bfloat16."""
    return float64(np.asarray(x).astype(np.float32).astype(ml_dtypes.bfloat16))


def int4(k) -> np.ndarray:
    """[S, D] -> [S, D]: each number as the nearest of -7 to 7 times a scale, a tie to the smaller.

    The scale of 32 neighbours is the least number of 5 significant bits that is at least a 7th of their largest, 0 if
    that is below 2**-120.
    """
    approximate = np.full_like(k, np.nan)
    for first in range(0, k.shape[1], 32):
        group = k[:, first : first + 32]
        largest = np.abs(group).max(axis=1)
        fraction, exponent = np.frexp(largest / 7)  # of 24 bits: rounded to 53, it moves past no number of 5
        scale = np.where(largest < 2.0**-120, 0, np.ldexp(np.ceil(fraction * 32) / 32, exponent))[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(scale > 0, np.sign(group) * np.ceil(np.abs(group) / scale - 0.5), 0)
            approximate[:, first : first + 32] = np.where(np.isfinite(scale), codes * scale, np.nan)
    return approximate


def step_of(visible: int) -> int:
    """The least power of two that leaves at most 256 of the positions 0, step, 2 step, ... below `visible`."""
    step = 1
    while -(-visible // step) > N_SAMPLES:
        step *= 2
    return step


def slopes_of(products, scores) -> np.ndarray:
    """[H, n], [n] -> [H]: each head's share of open products among the 32 best, a tie to the lower position."""
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
    # A head that may be exact or not, else by how much its slope may be another.
    unsure = np.where(scanned.is_exact, 0, _unsure_samples(scanned, tolerance, score_scale) / scanned.n_best)
    unsure = np.where(_unsure_heads(scanned, tolerance), 1, unsure)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = (unsure[:, None] * scanned.weights).sum(axis=0)
        if scanned.is_rounded:
            # With other slopes every component may round the other way: by an 128th of it at most.
            less = tolerance * scanned.head_bounds + (np.abs(scanned.head) / 128 if unsure.any() else 0)
            moved = moved + scanned.sizes @ (rounded(scanned.head + less) - rounded(scanned.head - less))
    return float(moved[np.isfinite(moved)].max(initial=0.0)) * 2


def _unsure_heads(scanned: Scanned, tolerance: float) -> np.ndarray:
    """[H] bool: which heads lie so near to the last exact one in size that they may change places."""
    sizes, is_exact = scanned.head_sizes, scanned.is_exact
    if is_exact.all() or not is_exact.any():
        return np.zeros(len(sizes), bool)
    with np.errstate(invalid="ignore"):
        cut = np.nanmin(sizes[is_exact], initial=np.inf)
        near = (np.abs(sizes - cut) <= tolerance * cut) & (sizes != 0)
        return near & (near & is_exact).any() & (near & ~is_exact).any()


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
