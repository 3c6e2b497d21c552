"""Device code of `kept_scores`."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.pages import TILED_BLOCKS
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.page_means_body import Sums, means_of_blocks
from hisa_jax.kernels_pallas.triton.product import product
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.block_means import joined
from hisa_jax.xla.means import split


class Queries(NamedTuple):
    """What is known of a query."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    limit: Ref  # [1]
    sequence: Ref  # [1]


class Kept(NamedTuple):
    """What pages keep, whole."""

    table: Ref  # [n_blocks * per_block], pages of all requests
    means: Ref  # [n_pages, parts * D]
    scales: Ref | None  # [n_pages]
    marks: Ref | None  # [n_pages]; None where a block is a page
    sums: Sums | None  # likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_s: int
    n_tiles: int  # of a program
    step: int  # a reader of the result takes so many columns at a time
    per_block: int  # pages of a block, a power of two
    n_pages: int
    keep_first: int
    keep_last: int
    per_column: int  # what a limit counts of each block
    n_sequences: int


def kept_scores_body(query: Queries, refs: Kept, o_ref: Ref, *, plan: Plan) -> None:
    # One program, one query:   table -> the page that ends each of `tile_s` blocks -> its mean -> product with heads
    #                                 -> the other pages -> all marks -> do they fit?  no: sums -> mean -> product
    #
    # Tiles follow each other, the next ones on their way meanwhile: their pages, then their means. A mean that does not
    # fit is rare (a page that follows different pages in two tables), so a few blocks at a time will do, and no branch
    # but that one has its registers. out: [width].
    span, width = plan.tile_s * plan.n_tiles, o_ref.shape[0]
    column, n_blocks = pl.program_id(0) * span, refs.table.shape[0] // plan.per_block // plan.n_sequences
    limit = lax.div(query.limit[0] + (plan.per_column - 1), jnp.int32(plan.per_column))
    first_block = jnp.minimum(query.sequence[0], plan.n_sequences - 1) * n_blocks
    D = query.q.shape[1]
    n_scored = lax.div(jnp.maximum(limit - column, 0) + (plan.tile_s - 1), jnp.int32(plan.tile_s))
    n_scored = jnp.minimum(n_scored, plan.n_tiles)  # tiles

    def pages_of(first: Array, n: int) -> tuple[Array, list[Array]]:
        """n candidates and their pages in order."""
        candidate = first + jnp.arange(n, dtype=jnp.int32)
        block = jnp.minimum(first_block + candidate, refs.table.shape[0] // plan.per_block - 1)
        return candidate, [_page(refs.table, block * plan.per_block + i, plan.n_pages) for i in range(plan.per_block)]

    def is_other(candidate: Array, pages: list[Array]) -> Array:
        """Whether the mean that the last page keeps is not that of the block, though it is needed."""
        if refs.marks is None:
            return jnp.zeros(candidate.shape, jnp.bool_)
        *marks, kept = (plt.load(refs.marks.at[page]) for page in pages)
        is_scored = (candidate >= plan.keep_first) & (candidate < limit - plan.keep_last)
        return is_scored & (joined(marks) != kept)

    def store(candidate: Array, scores: Array, mask: Array) -> None:
        sort_key = jnp.where(candidate < plan.keep_first, FORCED, sort_key_of(scores))
        sort_key = jnp.where(candidate >= limit - plan.keep_last, FORCED, sort_key)
        plt.store(o_ref.at[candidate], jnp.where(candidate < limit, sort_key, INVISIBLE), mask=mask)

    def score_from_sums(i: Array, carry: None) -> None:
        assert refs.sums is not None
        candidate, pages = pages_of(column + i * TILED_BLOCKS, TILED_BLOCKS)
        means = means_of_blocks(refs.sums, first_block + candidate, plan.per_block, plan.n_pages)
        parts, scale = split(means, refs.means.shape[1] // D, query.q.dtype)
        scores = _score(parts, query.q[...], query.w[...])
        store(candidate, scores if scale is None else scores * scale, is_other(candidate, pages))

    @pl.when(column < limit)
    def _score_kept():
        # All parts of a mean are one row, multiplied with heads that repeat: one product, not one after another.
        part_columns = jnp.arange(refs.means.shape[1], dtype=jnp.int32)[None, :]
        head = jnp.arange(query.q.shape[0], dtype=jnp.int32)[:, None]
        heads, w = plt.load(query.q.at[head, lax.rem(part_columns, jnp.int32(D))]), query.w[...]
        others = None if refs.marks is None else jnp.max(is_other(*pages_of(column, span)).astype(jnp.int32))

        def scale_of(i: Array) -> Array | None:
            _, pages = pages_of(column + i * plan.tile_s, plan.tile_s)
            return None if refs.scales is None else plt.load(refs.scales.at[pages[-1]])

        def one_tile(i: Array, scale: Array | None) -> Array | None:
            following = scale_of(i + 1)
            candidate, pages = pages_of(column + i * plan.tile_s, plan.tile_s)
            scores = _score([plt.load(refs.means.at[pages[-1][:, None], part_columns])], heads, w)
            store(candidate, scores if scale is None else scores * scale, candidate < width)
            return following

        lax.fori_loop(0, n_scored, one_tile, scale_of(jnp.int32(0)))
        if others is not None:
            # Written again by other threads. Triton puts a barrier between: the product from sums needs it, and a test
            # looks for it (tests/gpu/test_kept_means.py).
            pl.when(others > 0)(
                lambda: lax.fori_loop(0, n_scored * (plan.tile_s // TILED_BLOCKS), score_from_sums, None)
            )

    # The selection reads whole steps of columns: up to the end of the last one they must say that nothing is there.
    end = jnp.minimum(lax.div(limit + (plan.step - 1), jnp.int32(plan.step)) * plan.step, width)
    n_tiles = jnp.clip(lax.div(end - column, jnp.int32(plan.tile_s)), 0, plan.n_tiles)

    def fill(i: Array, _: None) -> None:
        o_ref[pl.ds(column + i * plan.tile_s, plan.tile_s)] = jnp.full((plan.tile_s,), INVISIBLE, jnp.int32)

    lax.fori_loop(n_scored, n_tiles, fill, None)


def _score(parts: Sequence[Array], heads: Array, w: Array) -> Array:
    """Means [s, D] in parts, [H, D], [H] -> [s] float32.

    A product has 64 rows or more: means, whose heads are then summed within a thread, or the heads of few means.
    """
    s, H = parts[0].shape[0], heads.shape[0]
    rows_are_means = s >= 64
    products = jnp.zeros((s, H) if rows_are_means else (H, s), jnp.float32)
    for part in parts:
        products = product(part, heads, products) if rows_are_means else product(heads, part, products)
    # A select, not a maximum, which Triton lowers to one that drops NaN.
    products = jnp.where(products < 0.0, 0.0, products)
    if rows_are_means:
        return jnp.sum(products * w[None, :], axis=1)
    return jnp.sum(products * w[:, None], axis=0)


def _page(table_ref: Ref, i: Array, n_pages: int) -> Array:
    return jnp.clip(plt.load(table_ref.at[i]), 0, n_pages - 1)
