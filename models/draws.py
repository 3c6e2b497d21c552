"""Takes tokens from logits: the likeliest, or drawn. The same token whatever is in the other rows.

A token is drawn by the Gumbel-max rule: the largest of logit + noise, whose noise is a function of the request's seed
and of the token's number. So a token is a function of the logits alone, and a proposal of a draft is right if it is
that token. That is rejection sampling of a draft that proposes one token x: x is kept with probability p(x), and else
the token has the distribution p without x.

Source: Gumbel-max: Maddison, Tarlow and Minka, A* sampling, 2014. Rejection: Leviathan, Kalman and Matias, 2211.17192.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.models.sampling import MOST_LOGPROBS, Logprobs, Sampling

HostOrDevice = Any  # an array of NumPy where it is made, of JAX within a program
LIKELIEST, ALL, SOME = range(3)  # what the rows of a batch draw from: nothing, all tokens, those that are kept


class Draws(NamedTuple):
    """How the rows of a batch are drawn: [B] each, a row nobody asked for takes the likeliest token.

    Attributes:
        seeds: [B, 2] uint32, high and low word.
        numbers: int32, which new token of its request the first to be taken is.
        temperature, top_p, min_p: float32.
        top_k: int32.
        kind: int32 scalar, LIKELIEST, ALL or SOME.
        has_logprobs: bool scalar.
    """

    seeds: HostOrDevice
    numbers: HostOrDevice
    temperature: HostOrDevice
    top_p: HostOrDevice
    min_p: HostOrDevice
    top_k: HostOrDevice
    kind: HostOrDevice
    has_logprobs: HostOrDevice


class LogprobArrays(NamedTuple):
    """Log probabilities [B, T] of the tokens, and of the likeliest ones [B, T, K] with their ids."""

    chosen: Array
    ids: Array
    values: Array


def draws_of(
    samplings: Sequence[Sampling], numbers: Sequence[int], B: int, rows: Sequence[int] | None = None
) -> Draws:  # fmt: skip
    """Arrays for some rows of a batch of B, by default the first ones; the others take the likeliest token."""
    draws = Draws(
        np.zeros((B, 2), np.uint32), np.zeros(B, np.int32), np.zeros(B, np.float32), np.ones(B, np.float32),
        np.zeros(B, np.float32), np.zeros(B, np.int32), np.int32(kind_of(samplings)),
        np.bool_(any(sampling.logprobs is not None for sampling in samplings)),
    )  # fmt: skip
    largest = float(np.finfo(np.float32).max)
    rows = range(len(samplings)) if rows is None else rows
    for row, sampling, number in zip(rows, samplings, numbers, strict=True):
        draws.seeds[row] = (sampling.seed >> 32) & 0xFFFFFFFF, sampling.seed & 0xFFFFFFFF
        draws.numbers[row] = number
        # A tiny one must not become 0, which is another rule.
        smallest = float(np.finfo(np.float32).tiny)
        draws.temperature[row] = sampling.temperature and min(max(sampling.temperature, smallest), largest)
        draws.top_p[row], draws.min_p[row] = sampling.top_p, sampling.min_p
        draws.top_k[row] = min(sampling.top_k, np.iinfo(np.int32).max)
    return draws


def kind_of(samplings: Sequence[Sampling]) -> int:
    """What the rows draw from: the most that one of them needs."""
    drawn = [one for one in samplings if one.temperature > 0]
    is_some = any(one.top_k > 0 or one.top_p < 1 or one.min_p > 0 for one in drawn)
    return SOME if is_some else ALL if drawn else LIKELIEST


def take(logits: Array, draws: Draws, kind: int) -> Array:
    """Takes a token from each logits.

    Args:
        logits: [B, T, V].
        draws: of the B rows; the T tokens are numbered from `draws.numbers`.
        kind: `draws.kind`, of which each is a program of its own.

    Returns: [B, T] int32; -1 where there is no likeliest token.
    """
    return (_likeliest, _of_all, _of_some)[kind](logits, draws)


def likeliest(logits: Array) -> Array:
    """[..., V] -> [...] int32, the likeliest token; -1 where there is none: a NaN, or nothing that is finite."""
    return jnp.where(has_likeliest(logits), jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


def has_likeliest(logits: Array) -> Array:
    """[..., V] -> [...] bool. A maximum is NaN if anything is."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def logprobs_of(logits: Array, tokens: Array) -> LogprobArrays:
    """Of logits [B, T, V] and the tokens [B, T] taken from them."""
    values = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(values, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    top, ids = lax.top_k(values, min(MOST_LOGPROBS, logits.shape[-1]))
    return LogprobArrays(chosen, ids.astype(jnp.int32), top)


def read_logprobs(found: LogprobArrays, row: int, column: int, token: int, n: int) -> Logprobs:
    """Of one token, with the `n` likeliest; from arrays of the host."""
    top = zip(found.ids[row, column, :n].tolist(), found.values[row, column, :n].tolist(), strict=True)
    return Logprobs(token=token, logprob=float(found.chosen[row, column]), top=tuple(top))


def _likeliest(logits: Array, draws: Draws) -> Array:
    return likeliest(logits)


def _of_all(logits: Array, draws: Draws) -> Array:
    return _drawn(logits, _scaled(logits, draws.temperature), draws)


def _of_some(logits: Array, draws: Draws) -> Array:
    scaled = _scaled(logits, draws.temperature)
    is_kept = _is_kept(scaled, *(x[:, None, None] for x in (draws.top_k, draws.top_p, draws.min_p)))
    return _drawn(logits, jnp.where(is_kept, scaled, -jnp.inf), draws)


def _scaled(logits: Array, temperature: Array) -> Array:
    # Differences from the largest, by a number that is neither 0 nor infinite: no quotient is NaN or +inf.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    return below / jnp.where(temperature > 0, temperature, 1.0)[:, None, None]


def _drawn(logits: Array, scaled: Array, draws: Draws) -> Array:
    _, T, V = logits.shape
    numbers = draws.numbers[:, None] + jnp.arange(T, dtype=jnp.int32)

    def noise(seed: Array, number: Array) -> Array:
        # Of one generator, whatever JAX's default is; in 46 bits, so that rare tokens keep their probability.
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number)
        return jax.random.gumbel(key, (V,), jnp.float32, mode="high")

    gumbel = jax.vmap(jax.vmap(noise, (None, 0)))(draws.seeds, numbers)
    drawn = jnp.argmax(scaled + gumbel, axis=-1).astype(jnp.int32)
    drawn = jnp.where(has_likeliest(logits), drawn, -1)
    return jnp.where(draws.temperature[:, None] > 0, drawn, likeliest(logits))


def _is_kept(scaled: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """[B, T, V] bool of logits [B, T, V] divided by the temperature; the rest broadcast to them."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    is_kept = (top_k == 0) | (jnp.arange(scaled.shape[-1], dtype=jnp.int32) < top_k)
    p = jax.nn.softmax(jnp.where(is_kept, ranked, -jnp.inf), axis=-1)
    # Rounding may bring the sum to 1 before the last token, which 1 must keep all the same.
    is_kept &= (top_p >= 1) | (jnp.cumsum(p, axis=-1) - p < top_p)
    is_kept &= ranked >= ranked[..., :1] + jnp.log(min_p)
    return jnp.put_along_axis(jnp.zeros_like(is_kept), order, is_kept, axis=-1, inplace=False)
