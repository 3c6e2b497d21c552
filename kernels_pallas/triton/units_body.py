"""Device code of `units`: a tile of queries against tile after tile of keys, and the best of each unit of these."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.triton.greatest import greatest
from hisa_jax.kernels_pallas.triton.product import product
from hisa_jax.kernels_pallas.triton.scan_body import rows_of
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """Arrays in device memory, whole."""

    q: Ref  # [T, D]
    w: Ref | None  # [T]
    limit: Ref  # [T]
    tiles: Ref  # [n_tiles, 4]
    k: Ref  # [S, D]
    table: Ref | None  # [n], for keys in pages
    k_scale: Ref | None  # [S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_t: int  # queries a program
    tile_s: int  # keys of a tile
    n_tiles: int  # tiles of keys a program, whole units
    unit: int  # keys a unit: a power of two
    has_relu: bool
    page_size: int | None


def units_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program:   queries [tile_t, D] stay   x   tile after tile of keys   ->   maxima   ->   sort keys of units
    #
    # The product has queries for rows, so that a maximum over keys is one over a thread's own registers, then over four
    # threads. A tile that is one unit must not be reshaped first: XLA's Triton then takes the product through shared
    # memory and each maximum over a warp, 896 shuffles and 36 barriers a tile. A unit of several tiles is carried from
    # one to the next. Scores are compared as float32 numbers, NaN as -inf, and only the maxima become sort keys. Tiles
    # that all queries see whole come first and need no comparison with limits. out: [T, units].
    tile, unit, tile_s = pl.program_id(0), plan.unit, plan.tile_s
    first_query, n_queries, first_row, most = (refs.tiles[tile, field] for field in range(4))
    i = jnp.arange(plan.tile_t, dtype=jnp.int32)
    there = i < n_queries
    t = jnp.minimum(first_query + jnp.where(there, i, 0), refs.limit.shape[0] - 1)
    # Interpret mode writes a masked row anew with what it held: one beyond the last it drops.
    rows_out = jnp.where(there, t, o_ref.shape[0])[:, None]
    limit = plt.load(refs.limit.at[t])
    features = jnp.arange(refs.k.shape[1], dtype=jnp.int32)
    q = plt.load(refs.q.at[t[:, None], features[None, :]])
    w = None if refs.w is None else plt.load(refs.w.at[t])[:, None]
    inside, of_tile = jnp.arange(tile_s, dtype=jnp.int32), jnp.arange(max(tile_s // unit, 1), dtype=jnp.int32)
    chunk = pl.program_id(1) * (plan.n_tiles * tile_s)

    def one_tile(i: Array, best: Array, is_whole: bool) -> Array:
        first = chunk + i * tile_s
        tokens = first + inside
        rows = rows_of(refs.k, refs.table, first_row + tokens, plan.page_size)
        k = plt.load(refs.k.at[rows[:, None], features[None, :]])
        x = _products(q, k)
        if plan.has_relu:
            x = jnp.where(x < 0.0, 0.0, x)  # a select, not a maximum, which Triton lowers to one that drops NaN
        if w is not None:
            x = x * w
        if refs.k_scale is not None:
            x = x * plt.load(refs.k_scale.at[rows])[None, :]
        if not is_whole:
            x = jnp.where(tokens[None, :] < limit[:, None], x, -jnp.inf)
        x = greatest(x.reshape(plan.tile_t, tile_s // unit, unit)) if unit < tile_s else greatest(x)[:, None]
        best = jnp.where(x > best, x, best)
        is_last = ((first + tile_s) & (unit - 1)) == 0
        columns = (lax.div(first, jnp.int32(unit)) + of_tile)[None, :]
        mask = jnp.broadcast_to(there[:, None] & is_last, best.shape)
        plt.store(o_ref.at[rows_out, columns], sort_key_of(best), mask=mask)
        return jnp.where(is_last, -jnp.inf, best)

    step = max(unit, tile_s)
    n = jnp.clip(lax.div(most - chunk + (step - 1), jnp.int32(step)) * (step // tile_s), 0, plan.n_tiles)
    n_whole = jnp.clip(lax.div(jnp.min(limit) - chunk, jnp.int32(tile_s)), 0, n)
    best = jnp.full((plan.tile_t, max(tile_s // unit, 1)), -jnp.inf, jnp.float32)
    best = lax.fori_loop(0, n_whole, functools.partial(one_tile, is_whole=True), best)
    lax.fori_loop(n_whole, n, functools.partial(one_tile, is_whole=False), best)


def _products(q: Array, k: Array) -> Array:
    if k.dtype == jnp.float8_e4m3fn:
        return product(q, k, jnp.zeros((q.shape[0], k.shape[0]), jnp.float32))
    return lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
