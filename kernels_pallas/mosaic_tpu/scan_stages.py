"""The scan put together: heads, units that eight queries keep, exact top-k in them.

The scan reads every key once, as the flat indexer does, and does not pay where few queries share that. So batches of
few queries, and of ragged sequences those that have few, are the flat indexer's. So are sequences of more keys than
`refine_shared` has room for in VMEM.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_tpu import flat, launch, query_tiles, refine_shared, scan
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES, Choice, chip
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import tokens_a_row
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import RaggedTiles, nothing_like
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, of_call
from hisa_jax.kernels_pallas.mosaic_tpu.scan_heads import heads_of_rows, scan_heads
from hisa_jax.kernels_pallas.mosaic_tpu.select import best_of_all, copied_keys
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Queries
from hisa_jax.methods import Scan

MOST_UNIT = 16  # tokens: a unit is copied as eight rows of 32 bits
_LEAST_QUERIES = 16  # of a sequence, that share its keys: at 128K half of flat's time on v6e, by the schedule
_TILE = 64  # queries of a ragged sequence that do, or less: powers of two, which `refine_shared` takes in whole tiles
_MOST_KEYS = 131072  # of a sequence: those that VMEM has room for


def why_not(method: Scan, D: int, is_paged: bool) -> str | None:
    """None, or why these kernels take no such scan, of those that `limits.why_not` lets pass."""
    if is_paged and D != LANES:
        return f"needs heads of size {LANES} for a Scan of keys in pages, not {D}"
    if method.sketch is not None:
        return f"has a Scan of the keys alone, not of a sketch={method.sketch!r}"
    if method.unit > MOST_UNIT:
        return f"needs units of up to {MOST_UNIT} tokens, not {method.unit}"
    return None


@functools.partial(jax.jit, static_argnames=("method", "interpret"))
def select_scan(call: Call, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
    """The scan: [T, topk] int32 positions, ascending, then -1; [T] int32 count; a row for each of `call.queries`.

    Eight queries side by side choose from what all of them want. Units of less than 32 bits are
    kept together: two bfloat16 tokens, four of 8 bits.
    """
    with jax.enable_x64(False):  # see bits.py
        if call.query_offsets is None:
            chosen = _of_batch(call, method, interpret)
        else:
            chosen = _of_ragged(call, method, interpret)
        n = jnp.clip(call.queries.visible, 0, call.max_keys)
        chosen = chosen.reshape(-1, method.topk)[: len(n)]
        return jnp.where(n[:, None] > 0, chosen, -1), jnp.minimum(n, method.topk)


def unit_of(method: Scan, dtype: DTypeLike) -> int:
    """Tokens of the units that are kept: at least those that a row of 32 bits holds, two or, of 8 bits, four."""
    return max(method.unit, tokens_a_row(dtype))


def _of_units(method: Scan, unit: int, interpret: Interpret) -> Choice:
    times = unit // method.unit
    return Choice(
        k=method.block_topk,  # as many units of another size hold those, whatever they have in common
        keep_first=-(-method.keep_first // times),
        keep_last=method.keep_last if times == 1 else method.keep_last // times + 1,
        interpret=interpret,
    )


def _of_batch(call: Call, method: Scan, interpret: Interpret) -> Array:
    """[B, T, topk] int32, anything for a query that sees nothing."""
    assert call.k is not None
    visible, best = jnp.clip(call.visible, 0, call.max_keys), Choice(k=method.topk, interpret=interpret)
    if call.shape[1] < _LEAST_QUERIES or call.max_keys > _MOST_KEYS:
        return flat.flat(Queries(call.q, call.w, visible), call.k, choice=best)[0]
    call = _in_whole_rows(call)
    assert call.k is not None
    queries, keys, unit = Queries(call.q, call.w, visible), call.k, unit_of(method, call.k.values.dtype)
    heads = scan_heads(call, method, interpret)
    choice = _of_units(method, unit, interpret)
    lists = scan.scan(heads, -(-visible // unit), keys, unit, choice=choice)

    def of_all() -> Array:
        # Half of all units in one list: to score the others, too, takes less than to leave them out.
        return flat.flat(queries, keys, choice=best)[0]

    def of_lists() -> Array:
        config = refine_shared.heuristic(chip(), call.shape[1])
        return refine_shared.refine_shared(queries, keys, lists, unit, choice=best, config=config)

    return lax.cond(jnp.any(lists.counts > lists.units.shape[2]), of_all, of_lists)


def _of_ragged(call: Call, method: Scan, interpret: Interpret) -> Array:
    """[rows of queries, topk] int32, anything for a query that sees nothing.

    The flat indexer has sequences of few queries, those whose keys are all candidates or have no room, and those of
    which some list overflows.
    """
    if math.prod(call.shape) >= _LEAST_QUERIES and call.cache is None:
        call = _in_whole_rows(call)
    queries, ragged = of_call(call, copied_keys(call))
    queries = queries._replace(visible=jnp.clip(queries.visible, 0, ragged.max_keys))
    best, T = Choice(k=method.topk, interpret=interpret), len(queries.visible)
    if T < _LEAST_QUERIES:
        return best_of_all(queries, ragged, best)[0]
    is_long = (ragged.lengths > method.block_topk * method.unit) & (ragged.lengths <= _MOST_KEYS)
    is_scanned = jnp.asarray(ragged.n_queries >= _LEAST_QUERIES) & is_long
    scanned = functools.partial(_scanned, call, queries, ragged, is_scanned, method, interpret)
    is_any = jnp.any((queries.visible > 0) & ragged.of_rows(is_scanned, T))
    chosen, is_done = lax.cond(is_any, scanned, nothing_like(scanned))
    (rest,) = best_of_all(queries, ragged, best, ~is_done)
    return jnp.where(ragged.of_rows(is_done, T)[:, None], chosen, rest)


def _in_whole_rows(call: Call) -> Call:
    """With zeros after heads of 64: a unit is copied from any row on, which is of 128 numbers."""
    assert call.k is not None
    return dataclasses.replace(call, q=_wide(call.q), k=call.k._replace(values=_wide(call.k.values)))


def _wide(x: Array) -> Array:
    return launch.pad_axis(x, x.ndim - 1, LANES)


def _scanned(
    call: Call, queries: Queries, ragged: Ragged, wanted: Array, method: Scan, interpret: Interpret
) -> tuple[Array, Array]:
    """Of the sequences that are `wanted` [R]: [T, topk] int32, and [R] bool, whether all lists of one have room."""
    T, S = len(queries.visible), min(ragged.max_keys, _MOST_KEYS)
    unit = unit_of(method, ragged.keys.values.dtype)
    tile_t = 1 << (min(T, _TILE).bit_length() - 1)
    n_cores = chip().n_cores if tile_t < T else 1
    tiles = query_tiles.split(ragged, T, wanted, _LEAST_QUERIES, tile_t, n_cores)
    assert isinstance(tiles, RaggedTiles)
    own = Queries(*map(tiles.gather, queries))
    eligible = -(-own.visible // unit)
    rows = Queries(*(x.reshape(-1, tile_t, *x.shape[2:]) for x in own))
    heads = heads_of_rows(rows, tiles.sequence, call, S, method, interpret)
    heads = jax.tree.map(lambda x: x.reshape(1, x.shape[0] * tile_t, *x.shape[2:]), heads)
    choice = _of_units(method, unit, interpret)
    lists = scan.scan_ragged(heads, eligible, ragged, tiles, S, unit, choice=choice, n_cores=n_cores)
    of_eights = jnp.repeat(tiles.sequence, tile_t // SUBLANES)
    every = jnp.arange(ragged.R, dtype=jnp.int32)
    is_full = jnp.any((lists.counts > lists.units.shape[1])[:, None] & (of_eights[:, None] == every), axis=0)
    # The flat indexer's: nothing is left of them to refine.
    lists = lists._replace(counts=jnp.where(is_full[jnp.maximum(of_eights, 0)], 0, lists.counts))
    queries = queries._replace(visible=jnp.where(ragged.of_rows(is_full, T), 0, queries.visible))
    config = refine_shared.Config(tile_t=min(refine_shared.Config.tile_t, tile_t), n_cores=n_cores)
    best, small = Choice(k=method.topk, interpret=interpret), tiles.cut(config.tile_t)
    chosen = refine_shared.refine_shared_ragged(queries, ragged, small, lists, S, unit, choice=best, config=config)
    return chosen, wanted & ~is_full
