"""Means of blocks of several pages, kept by the page that ends the block, and how a reader knows that they hold.

A page may be named by several tables, after other pages in each. So a page keeps a mark, a hash of its sum and count;
a page that ends a block keeps in its place those of the block's other pages, joined. Where the marks of the pages that
a table names before it join to this one, the mean that it keeps is theirs; elsewhere it is taken from the sums. Marks
are of 32 bits: pages of other keys are taken for those of the mean once in 4 billion.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.xla.means import mean, tree_sum

_NAN = 0x7FC00000


def _int32(x: int) -> int:
    """The number of 32 bits with a sign that has these bits."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


_STEP, _COUNT, _JOIN = _int32(0x9E3779B1), _int32(0x85EBCA6B), 0x01000193


def mark_of(total: Array, counts: Array) -> Array:
    """[..., D] float32 sums, [...] int32 -> [...] int32 mark, in integers that wrap: the same bits everywhere."""
    bits = lax.bitcast_convert_type(jnp.where(total == total, total, 0.0), jnp.int32)
    bits = jnp.where(total == total, bits, _NAN)
    # Sums of few bits end in zeros, and products keep zeros at the end: the first bits come down before and after.
    bits = (bits ^ (bits >> 15)) * jnp.int32(_STEP)
    bits = bits ^ (bits >> 13)
    odd = 2 * jnp.arange(total.shape[-1], dtype=jnp.int32) + 1
    factors = odd * jnp.int32(_COUNT)
    products = bits * (factors if total.ndim == 1 else factors[(None,) * (total.ndim - 1)])
    return jnp.sum(products, axis=-1, dtype=jnp.int32) + counts * jnp.int32(_STEP)


def joined(marks: Sequence[Array]) -> Array:
    """The marks of a block's pages but the last, in order."""
    total = jnp.zeros_like(marks[0])
    for mark in marks:
        total = join(total, mark)
    return total


def join(total: Array, mark: Array) -> Array:
    """A step of `joined`."""
    return (total ^ mark) * jnp.int32(_JOIN) + 1


class Before(NamedTuple):
    """The pages before some pages of a block's end.

    Attributes: `sums` [n, m, D] float32; `counts`, `marks` [n, m] int32; `is_there` [n, m] bool, whether one is named.
    """

    sums: Array
    counts: Array
    marks: Array
    is_there: Array


def before(pages: Array, sums: Array, counts: Array, marks: Array) -> Before:
    """[n, m] pages, any number where there is none, and what all pages keep."""
    is_there = (pages >= 0) & (pages < len(sums))
    at = jnp.where(is_there, pages, 0)
    return Before(sums[at], counts[at], marks[at], is_there)


def kept(sums: Array, counts: Array, ends_block: Array, earlier: Before, page_size: int) -> tuple[Array, Array]:
    """What pages keep: [n, D] float32 mean, [n] int32 mark.

    Args:
        sums, counts: [n, D] and [n], of the pages themselves.
        ends_block: [n] bool, whether a page is the last one of its block.
    """
    whole = (counts == page_size) & jnp.all(earlier.is_there & (earlier.counts == page_size), axis=1)
    marks = joined(list(jnp.where(earlier.is_there, earlier.marks, 0).T))
    of_block = tree_sum(jnp.concatenate([earlier.sums, sums[:, None]], axis=1))
    means = jnp.where(
        (ends_block & whole)[:, None],
        mean(of_block, jnp.full_like(counts, (earlier.counts.shape[1] + 1) * page_size)),
        mean(sums, counts),
    )
    # The complement of what a reader compares with is never that.
    marks = jnp.where(ends_block, jnp.where(whole, marks, ~marks), mark_of(sums, counts))
    return means, marks
