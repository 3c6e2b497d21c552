"""The scan of every key by a few heads of each query: sort keys of a sample, or a bit a key, by the kernel of `scores`.
    x[t, s] = k_scale[s] * sum_r w[t, r] * f_r(q[t, r] . k[s]),   f_r = relu, but the identity for the virtual head

Several queries share a product of 64 columns: with 8 rows each 8 queries, so a scan takes an eighth of the flat
indexer's time. Bits are all that is written: 1/32 of the sort keys, 64 MB for 4096 queries of 128K.

Floor, 4096 queries of dsv32 by 8 rows on an H200: 128K 1.1 PFLOP / 1979 TFLOP/s = 0.55 ms. As in the flat indexer the
sum beside the products takes what is more (a multiply-add and a maximum a product): 0.9 ms with 6 rows that count.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_groups_text import columns_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.mosaic_gpu.scores_body import Outputs
from hisa_jax.kernels_pallas.operands import Columns, Operands, ScanHeads
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, score_of, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret

_SLOT = 64  # heads of a slot of the ring: those of several queries
_TILED_ROWS = 8  # tiled copies begin at multiples of this many rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What is static of a launch."""

    filters: bool
    keep_first: int
    keep_last: int
    n_ctas: int
    interpret: Interpret


def scan_sort_keys(call: FlatCall, heads: ScanHeads, step: int, *, n_ctas: int, interpret: Interpret) -> Array:
    """As `ScanStages.scan_sort_keys`: the keys of the sample are copied side by side before."""
    S = call.k.shape[0] if call.pages is None else call.pages.table.shape[0] * call.pages.size
    rows, sequences = call.sequences.aligned(S, _TILED_ROWS, step)
    k, k_scale, pages = call.k, call.k_scale, call.pages
    if rows is not None:
        if pages is not None:
            rows = pages.rows(jnp.asarray(rows))
        k, k_scale, pages = k[rows], None if k_scale is None else k_scale[rows], None
    options = _Options(filters=False, keep_first=0, keep_last=0, n_ctas=n_ctas, interpret=interpret)
    sample = dataclasses.replace(
        call, k=k, k_scale=k_scale, pages=pages, sequences=sequences, visible=-(-call.visible // step)
    )
    return _launch(sample, heads, jnp.full_like(call.visible, INVISIBLE), options)


def scan_masks(
    call: FlatCall,
    heads: ScanHeads,
    threshold: Array,
    *,
    keep_first: int,
    keep_last: int,
    n_ctas: int,
    interpret: Interpret,
) -> Array:
    """As `ScanStages.scan_masks`."""
    options = _Options(filters=True, keep_first=keep_first, keep_last=keep_last, n_ctas=n_ctas, interpret=interpret)
    return _launch(call, heads, threshold, options)


def _launch(call: FlatCall, heads: ScanHeads, threshold: Array, options: _Options) -> Array:
    (T, rows, D), sequences, visible = heads.q.shape, call.sequences, call.visible
    group, n = _SLOT // rows, sequences.max_keys
    k = call.k[:, None]
    # Spans of two warp-groups are a power of two, as samples and what selects from them are.
    sizes = scores_stage.Sizes(-(-T // group), _SLOT, D, 1, k.dtype.itemsize, len(sequences.lengths))
    config = scores_stage.heuristic(sizes, n, options.n_ctas, n_score=3 if options.filters else 2)
    # No more than a sequence has on average: a tile is of one sequence.
    config = dataclasses.replace(config, tile_t=min(config.tile_t, -(-T // (group * len(sequences.lengths)))))
    tile = config.tile_t * group
    first, n_queries, key_row, most = sequences.query_tiles(T, tile, visible, COLUMNS).T
    first = jnp.arange(first.shape[0], dtype=jnp.int32) * config.tile_t
    columns = Columns(
        limit=visible,
        n=n,
        tiles=jnp.stack([first, -(-n_queries // group), key_row, most], axis=1),
        keep_first=options.keep_first,
        keep_last=options.keep_last,
    )
    queries, places = sequences.rows_of_tiles(T, tile)
    slots = _slots(heads.q, queries), _words(heads.w, queries, threshold, visible)
    operands = Operands(*slots, k, call.k_scale, call.pages)
    _, width = config.columns(n)
    shape = Shape(
        H=_SLOT,
        row_bytes=D * call.k.dtype.itemsize,
        n_parts=1,
        is_e4m3=call.k.dtype == jnp.float8_e4m3fn,
        ring=config.ring,
        has_scale=call.k_scale is not None,
        keep_first=options.keep_first,
        keep_last=options.keep_last,
        out_columns=width,
        filters=options.filters,
        rows=rows,
        n_linear=heads.n_linear,
        n_rows=heads.n,
    )
    out_type = jax.ShapeDtypeStruct((len(queries), width // 32 if options.filters else width), jnp.int32)
    outputs = Outputs(None, out_type) if options.filters else Outputs(out_type, None)
    out = scores_stage.launch(shape, operands, columns, outputs, config, options.n_ctas, options.interpret)
    result: Any = out.masks if options.filters else out.sort_keys
    is_in_place = isinstance(places, np.ndarray) and np.array_equal(places, np.arange(T))
    return result[:T] if is_in_place else result[places]


def _slots(q: Array, queries: Array | np.ndarray) -> Array:
    """[T, rows, D] -> [slots, 64, D]: the heads of the queries of each slot, in the order of its columns."""
    _, rows, D = q.shape
    slots = queries.reshape(-1, _SLOT // rows)
    row = (slots[:, :, None] * rows + np.arange(rows, dtype=np.int32)).reshape(len(slots), _SLOT)
    return q.reshape(-1, D).at[row[:, columns_of(_SLOT, rows)]].get(mode="fill", fill_value=0)


def _words(w: Array, queries: Array | np.ndarray, threshold: Array, visible: Array) -> Array:
    """[T, rows], [T], [T] -> [slots, 128] float32: weights, thresholds as scores, limits: `score_groups_text.py`."""
    rows = w.shape[1]

    def per_slot(x: Array, fill: float) -> Array:
        x = x.at[queries].get(mode="fill", fill_value=fill).reshape(-1, _SLOT // rows)
        return jnp.pad(x, ((0, 0), (0, _SLOT // 2 - x.shape[1])))

    weights = w.at[queries].get(mode="fill", fill_value=0).reshape(-1, _SLOT)[:, columns_of(_SLOT, rows)]
    # All that is visible reaches a threshold below every sort key; no score lies above that of infinity.
    least = sort_key_of(jnp.float32(-jnp.inf))
    scores = jnp.where(threshold <= least, -jnp.inf, score_of(threshold))
    limits = jax.lax.bitcast_convert_type(visible, jnp.float32)
    return jnp.concatenate([weights, per_slot(scores, jnp.inf), per_slot(limits, 0.0)], axis=1)
