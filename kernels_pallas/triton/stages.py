"""The stages of `indexer.Stages`, by Triton kernels."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas import scan
from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import ByScore, Eligible, Means
from hisa_jax.kernels_pallas.operands import Columns, KeptBlocks, KeyBlocks, Operands, ScanHeads
from hisa_jax.kernels_pallas.pages import PageMeans, PageSums, is_shared_by_few
from hisa_jax.kernels_pallas.scan_samples import Samples
from hisa_jax.kernels_pallas.select_shard import Found
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.triton import kept_means
from hisa_jax.kernels_pallas.triton import list_best as list_best_stage
from hisa_jax.kernels_pallas.triton import list_tokens as list_stage
from hisa_jax.kernels_pallas.triton import refine as refine_stage
from hisa_jax.kernels_pallas.triton import refine_tokens as refine_tokens_stage
from hisa_jax.kernels_pallas.triton import scan as scan_stage
from hisa_jax.kernels_pallas.triton import scan_heads as scan_heads_stage
from hisa_jax.kernels_pallas.triton import scan_sketch as sketch_stage
from hisa_jax.kernels_pallas.triton import scores as scores_stage
from hisa_jax.kernels_pallas.triton import topk as topk_stage
from hisa_jax.kernels_pallas.triton import units as units_stage
from hisa_jax.kernels_pallas.triton.page_means import page_scores, pool_pages
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.kernels_pallas.triton.pool_scores import TILE_T, pool_scores, pools_where_scored
from hisa_jax.kernels_pallas.tuning import tuned
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.kernels_pallas.units import unit_of
from hisa_jax.methods import BlockSparse, Hisa, Scan

__all__ = [
    "best_columns", "best_in_blocks", "best_listed", "best_samples", "best_tokens", "block_filter", "block_sort_keys",
    "flat", "kth", "list_best", "list_tokens", "pool", "pool_pages", "pools_where_scored", "refine", "refine_tokens",
    "scan_all", "scan_heads", "scan_masks", "scan_sort_keys", "units", "within", "within_budget",
]  # fmt: skip

_FLAT_WIDTH = 8192  # sort keys that a step of the streaming top-k adds to the best so far, less those


def block_filter(
    call: FlatCall,
    means: Means | KeyBlocks | PageSums | PageMeans,
    eligible: Eligible,
    method: Hisa | BlockSparse,
    interpret: Interpret = False,
) -> Array:
    sort_keys = block_sort_keys(call, means, eligible.scored, method, interpret)
    return eligible.or_all(topk_stage.topk(sort_keys, eligible.scored, method.block_topk, interpret=interpret)[0])


def best_columns(x: Array, limit: Array, k: int, interpret: Interpret = False) -> Found:
    columns, _, sort_keys = topk_stage.topk_with_sort_keys(x, limit, k, interpret=bool(interpret))
    return sort_keys, columns


def block_sort_keys(
    call: FlatCall,
    means: Means | KeyBlocks | PageSums | PageMeans,
    eligible: Array,
    method: Hisa | BlockSparse | ByScore,
    interpret: Interpret = False,
) -> Array:
    q, w, sequences = call.q, call.w, call.sequences.blocks(method.block_size)
    config, T = scores_stage.heuristic(q.shape[1]), q.shape[0]
    columns = Columns(limit=eligible, n=sequences.max_keys, keep_first=method.keep_first, keep_last=method.keep_last)
    first_block = sequences.key_start_of_queries(T)
    if isinstance(means, KeyBlocks):
        columns = dataclasses.replace(columns, tiles=sequences.query_tiles(T, TILE_T, eligible))
        return pool_scores(q, w, means, columns, interpret=interpret)
    if isinstance(means, PageSums):
        return page_scores(q, w, means, first_block, columns, interpret=interpret)
    if isinstance(means, PageMeans) and is_shared_by_few(len(sequences.lengths), T):
        kept = kept_means.heuristic(T, sequences.max_keys)
        return kept_means.kept_scores(q, w, means, sequences, columns, config=kept, interpret=interpret)
    parts = (means.means, means.scales, means.rows) if isinstance(means, PageMeans) else means
    columns = dataclasses.replace(columns, tiles=sequences.query_tiles(T, config.tile_t, eligible))
    return scores_stage.scores(Operands(q, w, *parts), columns, config=config, interpret=interpret)


def refine(call: FlatCall, block_ids: Array, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array]:
    sort_keys, limit, kept = _refine_scores(call, block_ids, method.block_size, interpret)
    return topk_stage.topk(sort_keys, limit, method.topk, kept, interpret=interpret)


def best_in_blocks(call: FlatCall, block_ids: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    x, limit, kept = _refine_scores(call, block_ids, block_size, interpret)
    positions, _, sort_keys = topk_stage.topk_with_sort_keys(x, limit, k, kept, interpret=bool(interpret))
    return sort_keys, positions


def _refine_scores(
    call: FlatCall, block_ids: Array, block_size: int, interpret: Interpret
) -> tuple[Array, Array, KeptBlocks]:
    """Sort keys of the kept blocks' tokens; [T] int32, how many columns of a row are written; what they stand for."""
    (_, H, D), itemsize, pages = call.q.shape, call.k.dtype.itemsize, call.pages
    config = tuned(
        refine_stage.Config, "triton.refine", H=H, D=D, block_size=block_size, itemsize=itemsize
    ) or refine_stage.heuristic(H, block_size)
    if pages is not None:
        config = dataclasses.replace(config, tile_s=min(config.tile_s, pages.size))
    kept = KeptBlocks(ids=block_ids, visible=call.visible, first=call.first_blocks(block_size), size=block_size)
    sort_keys = refine_stage.refine_scores(call.operands, kept, config=config, interpret=interpret)
    limit = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32) * block_size
    return sort_keys, limit, kept


def flat(call: FlatCall, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    positions, count, _ = _flat(call, topk, False, interpret)
    return positions, count


def best_tokens(call: FlatCall, k: int, interpret: Interpret = False) -> Found:
    positions, _, sort_keys = _flat(call, k, True, interpret)
    assert sort_keys is not None
    return sort_keys, positions


def _flat(call: FlatCall, topk: int, has_sort_keys: bool, interpret: Interpret) -> tuple[Array, Array, Array | None]:
    """Positions, count and, where they are wanted, sort keys of the best, by a streaming top-k over tiles of tokens."""
    (T, H, _), sequences, visible = call.q.shape, call.sequences, call.visible
    config = scores_stage.heuristic(H)
    tiles = sequences.query_tiles(T, config.tile_t, visible)
    width = next(width for width in (_FLAT_WIDTH, topk_stage.MAX_WIDTH) if width >= 2 * topk)

    operands = call.operands._replace(k=call.k[:, None])

    def sort_keys(first: Array, n: int) -> Array:
        columns = Columns(limit=visible, tiles=tiles, first=first, n=n)
        return scores_stage.scores(operands, columns, config=config, interpret=interpret)

    if sequences.max_keys <= width:
        x = sort_keys(jnp.zeros((1,), jnp.int32), sequences.max_keys)
        if has_sort_keys:
            return topk_stage.topk_with_sort_keys(x, visible, topk, interpret=bool(interpret))
        return *topk_stage.topk(x, visible, topk, interpret=bool(interpret)), None
    step = (width - topk) // config.tile_s * config.tile_s

    def one_tile(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.full((1,), i * step, jnp.int32)
        return tuple(topk_stage.merge_topk(*best, sort_keys(start, step), start, visible, interpret=interpret))

    nothing = jnp.full((T, topk), INVISIBLE, jnp.int32), jnp.full((T, topk), -1, jnp.int32)
    best, positions = lax.fori_loop(0, (jnp.max(visible) + step - 1) // step, one_tile, nothing)
    return positions, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), best


def scan_heads(call: FlatCall, method: Scan, interpret: Interpret = False, samples: Samples | None = None) -> ScanHeads:
    operands, first = sampled(call, samples)
    options = dict(in_one=call.q.shape[0] <= scan.FEW, is_sample=samples is not None, interpret=bool(interpret))
    return scan_heads_stage.scan_heads(operands, call.visible, first, method, **options)


def sampled(call: FlatCall, samples: Samples | None) -> tuple[Operands, Array]:
    """Keys that slopes are sampled from, and [T] int32, the row of each query's first one."""
    if samples is None:
        return call.operands, _first(call)
    return Operands(call.q, call.w, samples.k, samples.k_scale), samples.first


def scan_sort_keys(call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False) -> Array:
    columns, config = _scanned(call, heads, step)
    options = dict(step=step, config=config, interpret=bool(interpret))
    if call.sketch is not None:
        return sketch_stage.scan_sort_keys(_sketched(call), heads, columns, **options)
    return scan_stage.scan_sort_keys(call.operands, heads, columns, **options)


def best_samples(call: FlatCall, sort_keys: Array, n: Array, k: int, interpret: Interpret = False) -> Array:
    del call
    return best_columns(sort_keys, n, k, interpret)[0]


def kth(sort_keys: Array, limit: Array, rank: Array, interpret: Interpret = False) -> Array:
    return topk_stage.kth(sort_keys, limit, rank, interpret=bool(interpret))


def scan_masks(call: FlatCall, heads: ScanHeads, threshold: Array, method: Scan, interpret: Interpret = False) -> Array:
    columns, config = _scanned(call, heads, 1)
    columns = dataclasses.replace(columns, keep_first=method.keep_first, keep_last=method.keep_last)
    options = dict(config=config, interpret=bool(interpret))
    if call.sketch is not None:
        return sketch_stage.scan_masks(_sketched(call), heads, columns, threshold, **options)
    return scan_stage.scan_masks(call.operands, heads, columns, threshold, **options)


def list_tokens(
    masks: Array,
    visible: Array,
    capacity: int,
    ties: tuple[Array, Array] | None = None,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    return list_stage.list_tokens(masks, visible, capacity, ties, interpret=bool(interpret))


def scan_all(call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False) -> tuple[Array, None]:
    del step
    return scan_sort_keys(call, heads, 1, interpret), None


def list_best(
    sort_keys: Array,
    samples: Array | None,
    visible: Array,
    ask: scan.Ask,
    method: Scan,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    del samples
    forced = dict(keep_first=method.keep_first, keep_last=method.keep_last)
    return list_best_stage.list_best(sort_keys, visible, ask, **forced, interpret=bool(interpret))


def refine_tokens(
    call: FlatCall, tokens: Array, count: Array, topk: int, interpret: Interpret = False
) -> tuple[Array, Array]:
    sort_keys, listed = listed_scores(call, tokens, count, interpret)
    return topk_stage.topk(sort_keys, count, topk, listed, interpret=bool(interpret))


def best_listed(call: FlatCall, tokens: Array, count: Array, k: int, interpret: Interpret = False) -> Found:
    sort_keys, listed = listed_scores(call, tokens, count, interpret)
    positions, _, best = topk_stage.topk_with_sort_keys(sort_keys, count, k, listed, interpret=bool(interpret))
    return best, positions


def listed_scores(call: FlatCall, tokens: Array, count: Array, interpret: Interpret) -> tuple[Array, KeptBlocks]:
    """Sort keys of listed tokens, [T, capacity], and what their columns stand for."""
    T, H, _ = call.q.shape
    config = refine_tokens_stage.heuristic(T, H, tokens.shape[1])
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % config.tile_s)), constant_values=-1)
    options = dict(config=config, interpret=bool(interpret))
    sort_keys = refine_tokens_stage.refine_tokens_scores(call.operands, tokens, count, _first(call), **options)
    return sort_keys, KeptBlocks(ids=tokens, visible=call.visible, first=jnp.zeros_like(count), size=1)


def units(call: FlatCall, method: BlockSparse, interpret: Interpret = False) -> Array:
    (T, H, _), sequences = call.q.shape, call.sequences

    def columns(tile_t: int) -> Columns:
        tiles = sequences.query_tiles(T, tile_t, call.visible)
        return Columns(limit=call.visible, n=sequences.max_keys, tiles=tiles)

    if H > 1:
        config, operands = scores_stage.heuristic(H), call.operands._replace(k=call.k[:, None])
        return scores_stage.scores(operands, columns(config.tile_t), config=config, interpret=bool(interpret))
    tiled = units_stage.heuristic(T, len(sequences.lengths), sequences.max_keys)
    return units_stage.units(
        call.operands,
        columns(tiled.tile_t),
        unit=unit_of(method, H),
        has_relu=method.activation is not None,
        is_weighted=not method.per_head,
        config=tiled,
        interpret=bool(interpret),
    )


def within(sort_keys: Array, ids: Array, most: Array, interpret: Interpret = False) -> Array:
    n = jnp.sum(ids >= 0, axis=1, dtype=jnp.int32)
    listed = KeptBlocks(ids=ids, visible=n, first=n, size=1)
    return topk_stage.topk(sort_keys, n, ids.shape[1], listed, most, interpret=bool(interpret))[0]


def within_budget(
    call: FlatCall, tokens: Array, count: Array, most: Array, interpret: Interpret = False
) -> tuple[Array, Array]:
    k = tokens.shape[1]
    sort_keys, listed = listed_scores(call, tokens, count, interpret)
    return topk_stage.topk(sort_keys, count, k, listed, most, interpret=bool(interpret))


def _first(call: FlatCall) -> Array:
    """[T] int32: the row of the first key of each query's sequence."""
    return call.sequences.key_start_of_queries(call.q.shape[0])


def _scanned(call: FlatCall, heads: ScanHeads, step: int) -> tuple[Columns, scan_stage.Config]:
    """Every `step`-th key, and the tiles to scan them in."""
    (T, R, _), sequences, limit = heads.q.shape, call.sequences, -(-call.visible // step)
    n = -(-sequences.max_keys // step)
    n_sequences, n_tiles = len(sequences.lengths), -(-n // scan_stage.TILE_S)
    if call.sketch is None:
        config = scan_stage.heuristic(T, n_sequences, R, n_tiles)
    else:
        config = sketch_stage.heuristic(T, n_sequences, R, call.sketch.code_scales.shape[1], n_tiles)
    return Columns(limit=limit, n=n, tiles=sequences.query_tiles(T, config.tile_t, limit)), config


def _sketched(call: FlatCall) -> scan_stage.Scanned:
    assert call.sketch is not None
    return scan_stage.Scanned(call.sketch.codes, call.sketch.code_scales, call.k_scale, call.pages)
