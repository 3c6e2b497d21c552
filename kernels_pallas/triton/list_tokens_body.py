"""Device code of `list_tokens`: one query a program."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.triton.scan_body import WORD
from hisa_jax.kernels_pallas.types import Ref

_FILL = 512  # empty slots written at a time


class Inputs(NamedTuple):
    """A query's rows."""

    masks: Ref  # [words]
    limit: Ref  # [1]
    at_least: Ref | None  # [words]
    room: Ref | None  # [1]


def list_tokens_body(refs: Inputs, o_ref: Ref, count_ref: Ref, *, tile: int) -> None:
    # One program, one query:   tile of words -> set bits of each -> running sum, a word's first slot
    #                           -> every word writes its lowest bit, then its next one, until the fullest is empty
    #
    # A word a lane, so a step writes as many tokens as words have bits left. out: [capacity], [1].
    n_words = refs.masks.shape[0]
    limit = refs.limit[0]
    n_used = jnp.minimum(lax.shift_right_logical(limit + (WORD - 1), jnp.int32(5)), n_words)
    lanes = jnp.arange(tile, dtype=jnp.int32)

    def some(i: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        n_listed, n_tied = done
        word = i * tile + lanes
        there = word < n_used
        word = jnp.where(there, word, 0)
        marked = plt.load(refs.masks.at[word], mask=there, other=0)
        if refs.at_least is not None and refs.room is not None:
            tied = plt.load(refs.at_least.at[word], mask=there, other=0) & ~marked
            n_own = lax.population_count(tied)
            before = n_tied + jnp.cumsum(n_own) - n_own
            marked = marked | lowest_bits(tied, jnp.clip(refs.room[0] - before, 0, n_own))
            n_tied = n_tied + jnp.sum(n_own)
        return n_listed + write_bits(o_ref, n_listed, word, marked), n_tied

    n_tiles = lax.div(n_used + (tile - 1), jnp.int32(tile))
    count, _ = lax.fori_loop(0, n_tiles, some, (jnp.int32(0), jnp.int32(0)))
    count_ref[0] = count
    fill(o_ref, count)


def write_bits(o_ref: Ref, first: Array, word: Array, marked: Array) -> Array:
    """Writes the numbers of set bits, of each word one after the other, from slot `first` on; returns how many."""
    n_own = lax.population_count(marked)
    slot = first + jnp.cumsum(n_own) - n_own

    def one_bit(j: Array, rest: Array) -> Array:
        # The slot of a word that is empty is its last one or the next word's first: interpret mode writes there.
        at = slot + jnp.minimum(j, jnp.maximum(n_own - 1, 0))
        token = word * WORD + lax.population_count((rest & -rest) - 1)
        plt.store(o_ref.at[at], token, mask=(j < n_own) & (at < o_ref.shape[0]))
        return rest & (rest - 1)

    lax.fori_loop(0, jnp.max(n_own), one_bit, marked)
    return jnp.sum(n_own)


def fill(o_ref: Ref, count: Array) -> None:
    """-1 after a list of `count`."""
    capacity = o_ref.shape[0]

    def some(i: Array, _: None) -> None:
        at = i * _FILL + jnp.arange(_FILL, dtype=jnp.int32)
        plt.store(o_ref.at[at], jnp.full((_FILL,), -1, jnp.int32), mask=(at >= count) & (at < capacity))

    first = lax.div(jnp.minimum(count, capacity), jnp.int32(_FILL))
    lax.fori_loop(first, -(-capacity // _FILL), some, None)


def lowest_bits(words: Array, n: Array) -> Array:
    """The n lowest set bits of each word."""

    def one_bit(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, rest = state
        lowest = rest & -rest
        return jnp.where(j < n, kept | lowest, kept), rest & (rest - 1)

    return lax.fori_loop(0, jnp.max(n), one_bit, (jnp.zeros_like(words), words))[0]
