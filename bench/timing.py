"""How long calls take: warm, waited for, and side by side, since other work shares the machine."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of repeated calls, in the order of the rounds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @property
    def spread_ms(self) -> float:
        """The interquartile range."""
        return float(np.subtract(*np.percentile(self.samples_ms, [75, 25])))

    def ratio_to(self, base: "Timing") -> float:
        """Median over the rounds of this time over that of `base` in the same round."""
        return float(np.median(np.divide(self.samples_ms, base.samples_ms)))


def once[R](call: Callable[[], R]) -> tuple[R, float]:
    """The result, ready, and the milliseconds it took. Of a first call, that is tracing and compiling too."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, (time.perf_counter() - start) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    least_s: float = 0.0,
    after_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Times several calls in turn, a, b, c, a, b, c, ..., after one untimed round that warms them up.

    Args:
        repeats: timed rounds, at least.
        least_s: seconds the rounds take, at least: short calls need more of them for a steady median.
        after_round: told the number of the round that has ended; 0 is the untimed one.
    """
    rounds: list[list[float]] = []
    while len(rounds) <= repeats or sum(map(sum, rounds[1:])) < least_s * 1e3:
        rounds.append([once(call)[1] for call in calls.values()])
        after_round(len(rounds) - 1)
    columns = zip(*rounds[1:], strict=True)
    return {name: Timing(samples_ms=column) for name, column in zip(calls, columns, strict=True)}
