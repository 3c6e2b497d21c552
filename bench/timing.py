"""How long calls take: warm, waited for, and side by side, since other work shares the machine."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_INNER = 16


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


def in_turn(
    f: Callable[..., Any], operands: tuple, next_of: Callable[[Any], Any] = lambda result: result
) -> Callable[[], Any]:
    """A call of the compiled f that uses up its first operand: a copy at first, then `next_of` the last result."""
    compiled = jax.jit(f, donate_argnums=0)
    state = [jax.tree.map(jnp.copy, operands[0])]

    def call() -> Any:
        result = compiled(state[0], *operands[1:])
        state[0] = next_of(result)
        return result

    return call


def device_times(
    f: Callable[..., Any], operands: tuple, samples: int, *, carries: bool = False, sample_s: float = 0.02,
    run_length: int = _INNER,
) -> list[float]:  # fmt: skip
    """Milliseconds of f(*operands) on the device, a figure a sample.

    A sample is one program that runs f so often that it takes `sample_s` seconds, so that launching it does not count.
    Each repetition waits for the one before, and nothing of it can be taken out of the loop: its operands are bound to
    the last result. The last operand must be an array of integers.

    Args:
        carries: f returns the first operand anew, and the next repetition begins with that.
        run_length: repetitions between looks of the host at the device; fewer for calls of many milliseconds.
    """

    @jax.jit
    def repeat(n: int, *operands: Any) -> Any:
        def again(_, carry):
            *rest, last = lax.optimization_barrier((*operands[:-1], carry[0]))
            # A number of each result: what only a result that nobody reads needs would not run.
            leaves = jax.tree.leaves(lax.optimization_barrier(f(*rest, last)))
            result = sum((leaf.reshape(-1)[0].astype(jnp.float32) for leaf in leaves), jnp.float32(0))
            # Nothing changes, but the compiler cannot know.
            return jnp.where(result == -7, last + 1, last), result

        def go_on(_, first):
            first, rest = lax.optimization_barrier((first, operands[1:]))
            return f(first, *rest)

        # The inner loop has a static count: the host of a GPU waits for the condition of any other, 15 us each time.
        inner = lambda _, carry: lax.fori_loop(0, run_length, go_on if carries else again, carry)  # noqa: E731
        if carries:
            return lax.fori_loop(0, n, inner, operands[0])
        return lax.fori_loop(0, n, inner, (operands[-1], jnp.float32(0)))[1]

    def sample(n: int) -> float:
        return once(lambda: repeat(n, *operands))[1] / (n * run_length)

    sample(1)
    n = max(round(sample_s * 1e3 / (sample(1) * run_length)), 1)
    return [sample(n) for _ in range(samples)]
