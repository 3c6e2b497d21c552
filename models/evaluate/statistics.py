"""Means and shares with 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # of a normal distribution, 95 % between -z and z


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, right of n; (0, 1) where nothing was tried."""
    if not 0 <= right <= n:
        raise ValueError(f"wilson: {right} of {n}, wanted 0 to n")
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z * _Z
    centre = share + z2 / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def share(right: int, n: int) -> dict[str, float | int | None]:
    """Fields of a row: the accuracy with its interval, right, n."""
    low, high = wilson(right, n)
    return {"accuracy": right / n if n else None, "low": low, "high": high, "right": right, "n": n}


def mean(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean and its normal 95 % interval; not finite where one value, or none, tells nothing of the spread."""
    x = np.asarray(values, np.float64)
    if not x.size:
        return math.nan, math.nan, math.nan
    half = _Z * x.std(ddof=1) / math.sqrt(x.size) if x.size > 1 else math.nan
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def paired(values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean difference of others - values on the same questions, and its 95 % interval.

    Of values that are all 0 or 1 it is the adjusted Wald interval, which adds half a question to each cell of the 2 x 2
    table, so that no differences among few questions are not taken for certainty. Of others it is the normal one.
    Source: Agresti and Min, Statistics in Medicine 24 (2005): matched pairs.
    """
    x, y = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired: {x.size} values and {y.size} others, wanted as many")
    if not np.isin([*x, *y], (0.0, 1.0)).all() or not x.size:
        return mean(y - x)
    gained, lost, n = float(np.sum(y > x)) + 0.5, float(np.sum(y < x)) + 0.5, x.size + 2
    centre, half = (gained - lost) / n, _Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return float(np.mean(y - x)), max(-1.0, centre - half), min(1.0, centre + half)
