"""Device code of `list_best`: one query a program."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, KTH_SLACK, halfway
from hisa_jax.kernels_pallas.triton.list_tokens_body import fill, lowest_bits, write_bits
from hisa_jax.kernels_pallas.triton.scan_body import WORD
from hisa_jax.kernels_pallas.triton.topk_body import threshold_of
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """A query's rows."""

    x: Ref  # [W] sort keys
    limit: Ref  # [1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    least: int  # tokens that are to be listed, at least
    most: int  # and at most
    rank: int  # of the first threshold among the samples
    step: int  # every so many sort keys are one
    n_samples: int  # a power of two
    words: int  # of 32 sort keys at a time, a power of two
    keep_first: int
    keep_last: int


def list_best_body(refs: Inputs, o_ref: Ref, count_ref: Ref, *, plan: Plan) -> None:
    # One program, one query:   every 16th sort key -> threshold -> 512 words of bits -> running sum -> the list, tile
    #                           after tile; too few or too many: another threshold, and again
    #
    # The next tile is on its way while one is listed. out: [most], [1].
    W = refs.x.shape[0]
    limit = jnp.minimum(refs.limit[0], W)
    rows, bits = jnp.arange(plan.words, dtype=jnp.int32), jnp.arange(WORD, dtype=jnp.int32)
    tile = plan.words * WORD
    n_tiles = lax.div(limit + (tile - 1), jnp.int32(tile))

    def load(i: Array | int) -> Array:
        # No mask but the row's end, which is known: so a lane loads 16 bytes at a time.
        column = i * tile + rows[:, None] * WORD + bits[None, :]
        return plt.load(refs.x.at[column], mask=column < W, other=INVISIBLE)

    def marked(passes: Array, word: Array) -> Array:
        """[words] int32: a bit for each candidate that passes or is kept in any case."""
        taken = jnp.sum(jnp.where(passes, jnp.int32(1) << bits[None, :], 0), axis=1)
        kept = _below(plan.keep_first, word) | ~_below(limit - plan.keep_last, word)
        return (taken | kept) & _below(limit, word)

    def list_all(threshold: Array) -> Array:
        """Lists what reaches the threshold; returns how many do."""

        def one_tile(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x, n_listed = state
            later, word = load(i + 1), i * plan.words + rows
            return later, n_listed + write_bits(o_ref, n_listed, word, marked(x >= threshold, word))

        return lax.fori_loop(0, n_tiles, one_tile, (load(0), jnp.int32(0)))[1]

    def samples() -> Array:
        column = jnp.arange(plan.n_samples, dtype=jnp.int32) * plan.step
        there = column < limit
        return plt.load(refs.x.at[jnp.where(there, column, 0)], mask=there, other=INVISIBLE)

    def by_samples(rank: Array) -> Array:
        return threshold_of((samples(),), rank, rank // KTH_SLACK)[0]

    least, low, high = jnp.minimum(limit, plan.least), jnp.int32(INVISIBLE + 1), jnp.int32(FORCED)
    takes_all = (limit <= plan.most) | (lax.div(limit + (plan.step - 1), jnp.int32(plan.step)) < plan.rank)
    threshold = jnp.where(takes_all, low, by_samples(jnp.int32(plan.rank)))
    count = list_all(threshold)

    def is_open(state: tuple) -> Array:
        low, high, _, count, _ = state
        return ((count < least) | (count > plan.most)) & (low < high)

    def narrow(state: tuple) -> tuple:
        """Too many reach `low`, too few `high` + 1: in turn the samples and the middle say what is tried between."""
        low, high, threshold, count, i = state
        reached = jnp.sum((samples() >= threshold).astype(jnp.int32)).astype(jnp.float32)
        aim = reached * ((plan.least + plan.most) / 2) / jnp.maximum(count, 1).astype(jnp.float32)
        guess = jnp.clip(by_samples(jnp.maximum(aim.astype(jnp.int32), 1)), low + 1, high)
        threshold = jnp.where(i % 2 == 0, guess, halfway(low, high))
        count = list_all(threshold)
        is_too_many, is_too_few = count > plan.most, count < least
        return (
            jnp.where(is_too_many, threshold, low),
            jnp.where(is_too_few, threshold - 1, high),
            threshold,
            count,
            i + 1,
        )

    is_too_many = count > plan.most
    start = jnp.where(is_too_many, threshold, low), jnp.where(is_too_many, high, threshold - 1)
    low, _, _, count, _ = lax.while_loop(is_open, narrow, (*start, threshold, count, jnp.int32(0)))

    def list_with_ties() -> Array:
        """What lies above `low`, and of what is at it the first ones that there is room for."""
        n_above = list_all(low + 1)

        def one_tile(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            n_listed, n_tied = state
            x, word = load(i), i * plan.words + rows
            above = marked(x > low, word)
            tied = marked(x == low, word) & ~above
            n_own = lax.population_count(tied)
            before = n_tied + jnp.cumsum(n_own) - n_own
            words = above | lowest_bits(tied, jnp.clip(plan.least - n_above - before, 0, n_own))
            n_listed = n_listed + write_bits(o_ref, n_listed, word, words)
            return n_listed, n_tied + jnp.sum(n_own)

        return lax.fori_loop(0, n_tiles, one_tile, (jnp.int32(0), jnp.int32(0)))[0]

    is_tied = (count < least) | (count > plan.most)
    count_ref[0] = count

    @pl.when(is_tied)
    def _mend():
        count_ref[0] = list_with_ties()

    fill(o_ref, jnp.where(is_tied, plan.least, count))


def _below(n: Array | int, word: Array) -> Array:
    """[words] int32: the bits of columns below n."""
    own = jnp.clip(n - word * WORD, 0, WORD)
    return jnp.where(own == WORD, -1, (jnp.int32(1) << jnp.minimum(own, WORD - 1)) - 1)
