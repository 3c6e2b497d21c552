"""Device code of `kept_scores`."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.pages import TILED_BLOCKS
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.page_means_body import Queries, Sums, means_of_blocks
from hisa_jax.kernels_pallas.triton.scores_body import load_keys, score
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.block_means import joined
from hisa_jax.xla.means import split


class Kept(NamedTuple):
    """What pages keep, whole."""

    table: Ref  # [n_blocks * per_block], pages of all requests
    means: Ref  # [n_pages, parts, D]
    scales: Ref | None  # [n_pages]
    marks: Ref | None  # [n_pages]; None where a block is a page
    sums: Sums | None  # likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_s: int
    step: int  # a reader of the result takes so many columns at a time
    per_block: int  # pages of a block, a power of two
    n_pages: int
    keep_first: int
    keep_last: int


def kept_scores_body(query: Queries, refs: Kept, o_ref: Ref, *, plan: Plan) -> None:
    # One program, one query:   table -> the page that ends each of `tile_s` blocks -> its mean -> product with heads
    #                                 -> the other pages -> all marks -> do they fit?  no: sums -> mean -> product
    #
    # Means and marks are on their way together. A mean that does not fit is rare (a page that follows different pages
    # in two tables), so a few blocks at a time will do, and no branch but that one has its registers. out: [width].
    column, limit = pl.program_id(0) * plan.tile_s, query.limit[0]

    def blocks_from(first: Array, n: int) -> tuple[Array, Array, Array]:
        """n candidates, the page that ends each, and whether its mean is not that of the block though it is needed."""
        candidate = first + jnp.arange(n, dtype=jnp.int32)
        block = jnp.minimum(query.first_block[0] + candidate, refs.table.shape[0] // plan.per_block - 1)
        *others, last = (_page(refs.table, block * plan.per_block + i, plan.n_pages) for i in range(plan.per_block))
        is_scored = (candidate >= plan.keep_first) & (candidate < limit - plan.keep_last)
        if refs.marks is None:
            return candidate, last, jnp.zeros_like(is_scored)
        marks = joined([plt.load(refs.marks.at[page]) for page in others])
        return candidate, last, is_scored & (marks != plt.load(refs.marks.at[last]))

    def store(candidate: Array, scores: Array, mask: Array) -> None:
        sort_key = jnp.where(candidate < plan.keep_first, FORCED, sort_key_of(scores))
        sort_key = jnp.where(candidate >= limit - plan.keep_last, FORCED, sort_key)
        plt.store(o_ref.at[candidate], jnp.where(candidate < limit, sort_key, INVISIBLE), mask=mask)

    def score_from_sums(i: Array, carry: None) -> None:
        assert refs.sums is not None
        candidate, _, is_bad = blocks_from(column + i * TILED_BLOCKS, TILED_BLOCKS)
        means = means_of_blocks(refs.sums, query.first_block[0] + candidate, plan.per_block, plan.n_pages)
        of_sums, scale = split(means, refs.means.shape[1], query.q.dtype)
        store(candidate, _score(of_sums, query, scale), is_bad)

    @pl.when(column < limit)
    def _score_kept():
        candidate, page, is_bad = blocks_from(column, plan.tile_s)
        there = candidate < limit
        parts = [load_keys(refs.means, part, page, there) for part in range(refs.means.shape[1])]
        scale = None if refs.scales is None else plt.load(refs.scales.at[page])
        store(candidate, _score(parts, query, scale), ~is_bad)
        if refs.sums is None:
            return

        @pl.when(jnp.max(is_bad.astype(jnp.int32)) > 0)
        def _from_sums():
            lax.fori_loop(0, plan.tile_s // TILED_BLOCKS, score_from_sums, None)

    # The selection reads whole steps of columns: up to the end of the last one they must say that nothing is there.
    @pl.when((column >= limit) & (column < lax.div(limit + (plan.step - 1), jnp.int32(plan.step)) * plan.step))
    def _fill():
        o_ref[pl.ds(column, plan.tile_s)] = jnp.full((plan.tile_s,), INVISIBLE, jnp.int32)


def _score(parts: list[Array], query: Queries, scale: Array | None) -> Array:
    """[s, D] parts and a query -> [s] float32."""
    if len(parts) == 1:
        return score(parts, query.q[...], query.w[...], scale)
    # Two e4m3 numbers are added in float16, whose 11 bits are more than the 8 or 9 that a mean has in them: one product
    # for two, and by the tensor core's newer instructions, which Triton does not use for e4m3.
    means = parts[0].astype(jnp.float16) + parts[1].astype(jnp.float16)
    return score([means], query.q[...].astype(jnp.float16), query.w[...], scale)


def _page(table_ref: Ref, i: Array, n_pages: int) -> Array:
    return jnp.clip(plt.load(table_ref.at[i]), 0, n_pages - 1)
