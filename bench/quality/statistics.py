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
