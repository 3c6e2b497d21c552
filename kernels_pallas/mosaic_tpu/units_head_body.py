"""Device code of `units` for a head by itself: keys are the rows of a product, queries its columns.

            128 queries along lanes
    keys    x x x ...    registers of a block: their maximum, eight rows of which are left --> best_vmem
            x x x ...
    of 128 blocks, eight strided loads: rows are blocks --> turned: rows are queries, as a selection wants them

So a maximum takes a comparison and a select for a register of 1024 scores. Along lanes it would be a tree of shuffles,
and what those made would still have to be put together. The queries stay in the matrix unit while keys pass.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import column, row_of
from hisa_jax.kernels_pallas.mosaic_tpu.units_plan import Plan, Refs
from hisa_jax.kernels_pallas.sort_key import sort_key_of

ROWS = 2048  # keys of a product
COLUMNS = 256  # queries of a product: a side of the larger matrix unit


def score_step(plan: Plan, seen: list[Array], i: Array, slot: Array, refs: Refs) -> None:
    """The maxima of the blocks of a step, but for eight rows of each, for all queries of the tile.

    Args:
        seen: the most keys that a query of each part of the tile may keep.
    """
    lanes, tile_s = refs.q.shape[0], GROUP * refs.keys_vmem.shape[2]
    width = min(COLUMNS, lanes)

    def some_keys(j: Array, _: None) -> None:
        # Not under a condition, so that scales are spread beside the first products: the first queries see some of it.
        if refs.scale is not None:
            spread_scales(slot, j, refs)
        score_keys(plan, i, slot, j, pl.ds(0, width), refs)
        for first in range(width, lanes, width):
            most = functools.reduce(jnp.maximum, seen[first // plan.part : (first + width) // plan.part])
            score = functools.partial(score_keys, plan, i, slot, j, pl.ds(first, width), refs)
            pl.when(most > i * tile_s + j * ROWS)(score)

    lax.fori_loop(0, tile_s // ROWS, some_keys, None)


def score_keys(plan: Plan, i: Array, slot: Array, j: Array, queries: pl.Slice, refs: Refs) -> None:
    """The same of `ROWS` keys, number j of the step, for some queries."""
    _, _, unit, D = refs.keys_vmem.shape
    size, width, n = plan.block_size, queries.size, ROWS // plan.block_size
    keys = refs.keys_vmem[slot, pl.ds(j * (ROWS // unit), ROWS // unit)].reshape(ROWS, D)
    exact = jnp.int32 if keys.dtype == jnp.int8 else jnp.float32
    x = lax.dot_general(keys, refs.q[queries], (((1,), (1,)), ((), ())), preferred_element_type=exact)
    # Registers of a block one after the other.
    x = x.astype(jnp.float32).reshape(n, size // SUBLANES, SUBLANES, width)
    at = pl.multiple_of(j * ROWS, ROWS)
    if refs.scale is not None:
        scale = refs.columns_vmem[pl.ds(at, ROWS)].reshape(n, size // SUBLANES, SUBLANES, LANES)
    if plan.is_masked:
        block, row = (lax.broadcasted_iota(jnp.int32, (n, SUBLANES, width), axis) for axis in (0, 1))
        position = i * (GROUP * unit) + at + block * size + row
    best = jnp.full((n, SUBLANES, width), -jnp.inf, jnp.float32)
    for r in range(size // SUBLANES):
        y = x[:, r]
        if plan.has_relu:
            y = jnp.maximum(y, 0.0)
        if refs.w is not None:
            y = y * refs.w[:, queries][None]
        if refs.scale is not None:
            y = y * jnp.concatenate([scale[:, r]] * (width // LANES), axis=2)
        is_better = y > best  # never of NaN, which would hide the other tokens of its block
        if plan.is_masked:
            is_better &= position + r * SUBLANES < refs.visible[:, queries][None]
        best = jnp.where(is_better, y, best)
    # Where a step has more blocks than are turned together, all of them are there; else its place among 128.
    per_step = GROUP * unit // size
    first = lax.rem(i, max(LANES // per_step, 1)) * per_step + j * n
    for c in range(0, width, LANES):
        rows = pl.ds(pl.multiple_of(first * SUBLANES, SUBLANES), n * SUBLANES)
        refs.best_vmem[queries.start // LANES + c // LANES, rows] = best[:, :, c : c + LANES].reshape(-1, LANES)


def spread_scales(slot: Array, j: Array, refs: Refs) -> None:
    """The scales of `ROWS` keys, number j of the step: of each one a row."""
    unit = refs.keys_vmem.shape[2]
    per_block, n = refs.scale_vmem.shape[1] // GROUP, ROWS // unit
    for g in range(n):
        scale = row_of(refs.scale_vmem.at[slot], (j * n + g) * per_block, per_block)
        at = pl.multiple_of(j * ROWS + g * unit, unit)
        refs.columns_vmem[pl.ds(at, unit)] = column(scale, LANES)


def flush(plan: Plan, i: Array, n_steps: Array, refs: Refs) -> None:
    """After step i, if it completes 128 blocks or is the last: their sort keys."""
    per_step = GROUP * refs.keys_vmem.shape[2] // plan.block_size
    steps, groups = max(LANES // per_step, 1), max(per_step // LANES, 1)
    n_chunks = refs.q.shape[0] // LANES

    def one(turn: Array, _: None) -> None:
        chunk, group = lax.div(turn, groups), lax.rem(turn, groups)
        rows = []
        for block in range(0, LANES, SUBLANES):
            first = (group * LANES + block) * SUBLANES
            of_eight = [refs.best_vmem[chunk, pl.ds(first + row, SUBLANES, stride=SUBLANES)] for row in range(SUBLANES)]
            best = of_eight[0]
            for x in of_eight[1:]:
                best = jnp.maximum(best, x)
            rows.append(best)
        sort_keys = sort_key_of(jnp.concatenate(rows, axis=0).T).reshape(LANES // SUBLANES, SUBLANES, LANES)
        tiles = pl.ds(chunk * (LANES // SUBLANES), LANES // SUBLANES)
        at = pl.multiple_of((lax.div(i, steps) * groups + group) * SUBLANES, SUBLANES)
        refs.sort_keys_vmem[tiles, pl.ds(at, SUBLANES)] = sort_keys

    is_due = (lax.rem(i + 1, steps) == 0) | (i + 1 == n_steps)
    lax.fori_loop(0, jnp.where(is_due, n_chunks * groups, 0), one, None)
