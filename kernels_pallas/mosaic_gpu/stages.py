"""The stages of `indexer.Stages`, by Mosaic GPU kernels; pooling, narrow selections and lists are Triton's."""

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas import scan
from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import ByScore, Eligible, Means
from hisa_jax.kernels_pallas.mosaic_gpu import flat as flat_stage
from hisa_jax.kernels_pallas.mosaic_gpu import list_best as list_best_stage
from hisa_jax.kernels_pallas.mosaic_gpu import list_tokens as list_stage
from hisa_jax.kernels_pallas.mosaic_gpu import refine as refine_stage
from hisa_jax.kernels_pallas.mosaic_gpu import refine_few as few_stage
from hisa_jax.kernels_pallas.mosaic_gpu import refine_tokens as refine_tokens_stage
from hisa_jax.kernels_pallas.mosaic_gpu import refine_tokens_few as tokens_few_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scan as scan_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scan_sketch as sketch_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scan_slopes as slopes_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk as topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk_few as few_topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.operands import Columns, KeptBlocks, KeyBlocks, Operands, ScanHeads
from hisa_jax.kernels_pallas.pages import PageMeans, PageSums, is_shared_by_few
from hisa_jax.kernels_pallas.scan_samples import Samples
from hisa_jax.kernels_pallas.select_shard import Found
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.triton import kept_means, page_means, pool_scores
from hisa_jax.kernels_pallas.triton import pool as pool_stage
from hisa_jax.kernels_pallas.triton import scan_heads as heads_stage
from hisa_jax.kernels_pallas.triton import stages as triton_stages
from hisa_jax.kernels_pallas.triton import topk as narrow_topk_stage
from hisa_jax.kernels_pallas.triton.pool_scores import pools_where_scored
from hisa_jax.kernels_pallas.triton.stages import kth, within, within_budget
from hisa_jax.kernels_pallas.tuning import tuned
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.methods import BlockSparse, Hisa, Scan, has_ratio

__all__ = [
    "best_columns", "best_in_blocks", "best_listed", "best_samples", "best_tokens", "block_filter", "block_sort_keys",
    "flat", "kth", "list_best", "list_tokens", "pool", "pool_pages", "pools_where_scored", "refine", "refine_tokens",
    "scan_all", "scan_heads", "scan_masks", "scan_sort_keys", "units", "within", "within_budget",
]  # fmt: skip

_NARROW = 2048  # up to this many sort keys a row a program by itself is faster: 0.023 ms against 0.041 for 4096 x 512
_FLAT_REQUESTS = 8  # of 128K on an H200, us: of 8 the flat indexer 55 and the scan of sketches 62, of 32 171 and 153
_QUERIES_OF_ONE, _QUERIES_A_REQUEST = 16, 4  # up to so many the flat indexer's products take less time than its reading
_TILED_ROWS = 8  # tiled copies begin at multiples of this many rows
_DEFAULT_SMS = 132  # of every Hopper GPU sold as H100 SXM, H200 or GH200, where no GPU can be asked


def n_sms() -> int:
    """Multiprocessors of the default GPU."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _DEFAULT_SMS


def why_not(topk: int | None, n_blocks: int, candidates: int) -> str | None:
    """None, or why so many tokens cannot be selected among so many candidates, or blocks from so many."""
    if topk is not None:
        if topk > topk_stage.MAX_WIDTH // 2:
            return f"needs topk at most {topk_stage.MAX_WIDTH // 2}, not {topk}"
        # Few queries, or candidates that outgrow shared memory, are scored apart and then selected by a row a program.
        if reason := narrow_topk_stage.why_not(candidates):
            return reason
    return topk_stage.why_not(n_blocks)


def pool(k: Array, k_scale: Array | None, counts: Rows, *, block_size: int, interpret: Interpret = False) -> Means:
    return pool_stage.pool(k, k_scale, counts, block_size=block_size, interpret=bool(interpret))


def pool_pages(page_sums: PageSums, dtype: DTypeLike, *, interpret: Interpret = False) -> Means:
    return page_means.pool_pages(page_sums, dtype, interpret=bool(interpret))


def block_filter(
    call: FlatCall,
    means: Means | KeyBlocks | PageSums | PageMeans,
    eligible: Eligible,
    method: Hisa | BlockSparse,
    interpret: Interpret = False,
) -> Array:
    limit, m = eligible.scored, method.block_topk
    if _are_kept(means, call):
        # What a query sees is counted in tokens as it came: no kernel before it makes blocks of them.
        sort_keys = _kept_scores(call, means, call.visible, method, method.block_size, interpret)
    else:
        sort_keys = block_sort_keys(call, means, limit, method, interpret)
    if _are_few(sort_keys):
        # It takes all that a query sees, scored or not, where there is room: no kernel after it puts them there.
        options: Any = dict(per_column=method.block_size, is_full=True, interpret=interpret)
        return few_topk_stage.topk(sort_keys, call.visible, m, **options)[0]
    if sort_keys.shape[1] <= _NARROW:
        return eligible.or_all(narrow_topk_stage.topk(sort_keys, limit, m, interpret=bool(interpret))[0])
    return eligible.or_all(topk_stage.topk(sort_keys, limit, m, n_ctas=n_sms(), interpret=interpret)[0])


def block_sort_keys(
    call: FlatCall,
    means: Means | KeyBlocks | PageSums | PageMeans,
    eligible: Array,
    method: Hisa | BlockSparse | ByScore,
    interpret: Interpret = False,
) -> Array:
    q, w, sequences = call.q, call.w, call.sequences.blocks(method.block_size)
    T, n_ctas = q.shape[0], n_sms()
    columns = Columns(limit=eligible, n=sequences.max_keys, keep_first=method.keep_first, keep_last=method.keep_last)
    if isinstance(means, KeyBlocks):
        columns = dataclasses.replace(columns, tiles=sequences.query_tiles(T, pool_scores.TILE_T, eligible))
        return pool_scores.pool_scores(q, w, means, columns, interpret=bool(interpret))
    if isinstance(means, PageSums):
        first_block = sequences.key_start_of_queries(T)
        return page_means.page_scores(q, w, means, first_block, columns, interpret=bool(interpret))
    if _are_kept(means, call):
        return _kept_scores(call, means, eligible, method, 1, interpret)
    pages = means.rows if isinstance(means, PageMeans) else None
    parts, scale = (means.means, means.scales) if isinstance(means, PageMeans) else means
    rows, sequences = (None, sequences) if pages else sequences.aligned(parts.shape[0], _TILED_ROWS)
    if rows is not None:
        parts, scale = parts[rows], None if scale is None else scale[rows]
    operands = Operands(q, w, parts, scale, pages)
    config = scores_stage.heuristic(
        scores_stage.Sizes.of(operands, len(sequences.lengths)), sequences.max_keys, n_ctas, n_keys=2 if pages else 1
    )
    tiles = sequences.query_tiles(T, config.tile_t, eligible, COLUMNS)
    columns = dataclasses.replace(columns, tiles=tiles, n=sequences.max_keys)
    return scores_stage.scores(operands, columns, config=config, n_ctas=n_ctas, interpret=interpret)


def _are_kept(means: Means | KeyBlocks | PageSums | PageMeans, call: FlatCall) -> TypeGuard[PageMeans]:
    """Whether means are fetched from where pages keep them, for each query by itself."""
    return isinstance(means, PageMeans) and is_shared_by_few(len(call.sequences.lengths), call.q.shape[0])


def _kept_scores(
    call: FlatCall,
    means: PageMeans,
    limit: Array,
    method: Hisa | BlockSparse | ByScore,
    per_column: int,
    interpret: Interpret,
) -> Array:
    T, sequences = call.q.shape[0], call.sequences.blocks(method.block_size)
    columns = Columns(limit=limit, n=sequences.max_keys, keep_first=method.keep_first, keep_last=method.keep_last)
    config = kept_means.heuristic(T, sequences.max_keys, n_sms())
    options: Any = {"config": config, "per_column": per_column, "interpret": bool(interpret)}
    return kept_means.kept_scores(call.q, call.w, means, sequences, columns, **options)


def best_columns(x: Array, limit: Array, k: int, interpret: Interpret = False) -> Found:
    if x.shape[1] <= _NARROW:
        columns, _, sort_keys = narrow_topk_stage.topk_with_sort_keys(x, limit, k, interpret=bool(interpret))
    else:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % COLUMNS)), constant_values=INVISIBLE)
        columns, _, sort_keys, _ = topk_stage.topk_with_sort_keys(x, limit, k, n_ctas=n_sms(), interpret=interpret)
    return sort_keys, columns


def refine(call: FlatCall, block_ids: Array, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array]:
    """`refine_few.refine_few` or `refine.refine`; or scores and then `topk`, where queries have more than two parts."""
    (T, H, D), m, itemsize, n_ctas = call.q.shape, block_ids.shape[1], call.k.dtype.itemsize, n_sms()
    block_size, topk, pages = method.block_size, method.topk, call.pages
    kept = _kept(call, block_ids, block_size)
    if not has_ratio(method):
        # A query has as many kept blocks as it sees, as far as the filter keeps so many.
        kept = dataclasses.replace(kept, count=jnp.minimum(-(-call.visible // block_size), m))
    page_size = None if pages is None else pages.size
    few = few_stage.heuristic(T, H, D, m, block_size, itemsize, topk, n_ctas, page_size)
    if few is not None:
        if interpret:
            few = dataclasses.replace(few, n_ctas=1)  # which has no clusters
        return few_stage.refine_few(call.operands, kept, k_top=topk, config=few, interpret=interpret)
    n_parts = refine_stage.split(T, m, block_size, _apart(H), n_ctas)
    fused = refine_stage.heuristic(H, D, m, block_size, itemsize, page_size)
    if fused is not None and n_parts == 1:
        shape = dict(H=H, D=D, m=m, block_size=block_size, itemsize=itemsize)
        # Those found for keys in one piece leave no room for the pages' numbers.
        config = tuned(refine_stage.Config, "mosaic_gpu.refine", **shape) if pages is None else None
        options: Any = {"n_ctas": n_ctas, "interpret": interpret}
        return refine_stage.refine(call.operands, kept, k_top=topk, config=config or fused, **options)
    sort_keys, limit = _refine_scores(call, kept, interpret)
    if _are_few(sort_keys):
        written = limit if n_parts == 1 else None  # parts write every column
        return few_topk_stage.topk(sort_keys, written, topk, kept, has_forced=False, interpret=interpret)
    return narrow_topk_stage.topk(sort_keys, limit, topk, kept, interpret=bool(interpret))


def best_in_blocks(call: FlatCall, block_ids: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    kept = _kept(call, block_ids, block_size)
    x, limit = _refine_scores(call, kept, interpret)
    positions, _, sort_keys = narrow_topk_stage.topk_with_sort_keys(x, limit, k, kept, interpret=bool(interpret))
    return sort_keys, positions


def _are_few(sort_keys: Array) -> bool:
    """Whether each row has a multiprocessor to itself, whose registers hold it."""
    T, width = sort_keys.shape
    return n_sms() >= T and width <= few_topk_stage.MAX_WIDTH


def _kept(call: FlatCall, block_ids: Array, block_size: int) -> KeptBlocks:
    kept = KeptBlocks(ids=block_ids, visible=call.visible, first=call.first_blocks(block_size), size=block_size)
    T, sequences = call.q.shape[0], call.sequences.blocks(block_size)
    R = len(sequences.lengths)
    if not sequences.apart or sequences.key_starts[0] != 0:
        return kept
    return dataclasses.replace(
        kept, sequence=jnp.asarray(sequences.of_queries(T)), n_sequences=R, apart=sequences.apart
    )


def _apart(H: int) -> refine_stage.Config:
    """Where scores are not selected from in the same kernel."""
    return refine_stage.Config(tile_s=128 if H <= 64 else 64, n_score=4 if H <= 64 else 2, ring=4)


def _refine_scores(call: FlatCall, kept: KeptBlocks, interpret: Interpret) -> tuple[Array, Array]:
    """Sort keys of the kept blocks' tokens, and [T] int32, how many columns of a row are written."""
    (T, H, _), m, n_ctas = call.q.shape, kept.ids.shape[1], n_sms()
    n_parts = refine_stage.split(T, m, kept.size, _apart(H), n_ctas)
    options: Any = {"n_parts": n_parts, "n_ctas": n_ctas, "interpret": interpret}
    sort_keys = refine_stage.refine_scores(call.operands, kept, config=_apart(H), **options)
    if n_parts > 1:
        return sort_keys, jnp.full_like(call.visible, m * kept.size)  # parts write every column
    return sort_keys, kept.n_real * kept.size


def flat(call: FlatCall, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    options: Any = dict(topk=topk, n_ctas=n_sms(), interpret=interpret)
    return flat_stage.flat(call.operands, call.visible, call.sequences, **options)


def is_flat_where_all_kept(call: FlatCall) -> bool:
    """4096 queries of 8K take 0.48 ms by the flat indexer, 0.50 by `refine`; few would fill fewer multiprocessors."""
    return call.q.shape[0] > n_sms() and call.sequences.max_keys <= flat_stage.ONE_TILE


def way_of_scan(call: FlatCall, topk: int) -> scan.Way:
    """Few queries of few requests are the flat indexer's: it reads what a scan does, or hardly more, in fewer launches.

    So are few queries of many requests by the keys. Many of one request would wait for its products.
    """
    T, R = call.q.shape[0], len(call.sequences.lengths)
    is_reading = max(_QUERIES_OF_ONE, _QUERIES_A_REQUEST * R) >= T and (call.sketch is None or R <= _FLAT_REQUESTS)
    if is_reading and flat_stage.is_for_few(T, call.sequences.max_keys, topk, n_sms()):
        return "flat"
    # Scans by keys leave rows for whole groups of queries, 8 times as many as those of single ones.
    return "samples" if call.sketch is None else scan.way_of(call, topk)


def best_tokens(call: FlatCall, k: int, interpret: Interpret = False) -> Found:
    options: Any = dict(topk=k, n_ctas=n_sms(), interpret=interpret)
    positions, _, sort_keys = flat_stage.flat_with_sort_keys(call.operands, call.visible, call.sequences, **options)
    return sort_keys, positions


def scan_heads(call: FlatCall, method: Scan, interpret: Interpret = False, samples: Samples | None = None) -> ScanHeads:
    """Triton's, by the slopes of `scan_slopes`."""
    _, H, D = call.q.shape
    if method.slopes == "plain" or slopes_stage.why_not(H, D, call.k.dtype.itemsize):
        return triton_stages.scan_heads(call, method, interpret, samples)
    operands, first = triton_stages.sampled(call, samples)
    options: Any = dict(is_sample=samples is not None, interpret=interpret)
    slopes = slopes_stage.scan_slopes(operands, call.visible, first, **options)
    return heads_stage.scan_heads(operands, call.visible, first, method, slopes, interpret=bool(interpret))


def scan_sort_keys(call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False) -> Array:
    """By the kernel of `scores`; of sketches Triton's: many queries are, where all keys are samples, or few samples."""
    if call.sketch is not None:
        return triton_stages.scan_sort_keys(call, heads, step, bool(interpret))
    return scan_stage.scan_sort_keys(call, heads, step, n_ctas=n_sms(), interpret=interpret)


def best_samples(call: FlatCall, sort_keys: Array, n: Array, k: int, interpret: Interpret = False) -> Array:
    if call.sketch is not None:
        # Triton's do not end with `INVISIBLE`, as rows of `topk` have to.
        there = jnp.arange(sort_keys.shape[1], dtype=jnp.int32)[None, :] < n[:, None]
        sort_keys = jnp.where(there, sort_keys, INVISIBLE)
    return best_columns(sort_keys, n, k, interpret)[0]


def scan_all(call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False) -> tuple[Array, Array | None]:
    """`scan_sketch.scan_sort_keys`, or Triton's of sketches that it declines; of keys `scan.scan_sort_keys`."""
    (T, R, D), pages, sequences = heads.q.shape, call.pages, call.sequences
    if call.sketch is None or pages is None or sketch_stage.why_not(D, heads.q.dtype.itemsize, pages.size, step):
        return scan_sort_keys(call, heads, 1, interpret), None
    config = sketch_stage.heuristic(T, len(sequences.lengths), R, sequences.max_keys, n_sms())
    columns, first = Columns(limit=call.visible, n=sequences.max_keys), None
    if config.tile_t > 1:
        tiles = sequences.query_tiles(T, config.tile_t, call.visible, sketch_stage.STEP)
        columns = dataclasses.replace(columns, tiles=tiles)
    else:
        first = sequences.key_start_of_queries(T)
    sketched: Any = (call.sketch.codes, call.sketch.code_scales, call.k_scale, pages)
    options: Any = dict(sample_step=step, config=config, interpret=interpret)
    return sketch_stage.scan_sort_keys(*sketched, heads, columns, first, **options)


def scan_masks(call: FlatCall, heads: ScanHeads, threshold: Array, method: Scan, interpret: Interpret = False) -> Array:
    if call.sketch is not None:
        return triton_stages.scan_masks(call, heads, threshold, method, bool(interpret))
    options: Any = dict(keep_first=method.keep_first, keep_last=method.keep_last, n_ctas=n_sms(), interpret=interpret)
    return scan_stage.scan_masks(call, heads, threshold, **options)


def list_tokens(
    masks: Array, visible: Array, capacity: int, ties: tuple[Array, Array] | None = None, interpret: Interpret = False
) -> tuple[Array, Array]:
    """`list_tokens.list_tokens`, or Triton's for ties, which are rare, and lists that outgrow shared memory."""
    if ties is not None or capacity > list_stage.MAX_CAPACITY:
        return triton_stages.list_tokens(masks, visible, capacity, ties, bool(interpret))
    return list_stage.list_tokens(masks, visible, capacity, n_ctas=n_sms(), interpret=interpret)


def list_best(
    sort_keys: Array,
    samples: Array | None,
    visible: Array,
    ask: scan.Ask,
    method: Scan,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """`list_best.list_best`, or Triton's for rows that it declines."""
    if list_best_stage.why_not(sort_keys.shape[1], ask):
        return triton_stages.list_best(sort_keys, samples, visible, ask, method, bool(interpret))
    options: Any = dict(keep_first=method.keep_first, keep_last=method.keep_last, interpret=interpret)
    return list_best_stage.list_best(sort_keys, visible, ask, samples, **options)


def refine_tokens(
    call: FlatCall, tokens: Array, count: Array, topk: int, interpret: Interpret = False
) -> tuple[Array, Array]:
    """`refine_tokens.refine_tokens`; where queries are fewer than CTAs, scores and then `topk_few`."""
    (T, H, D), n_ctas, itemsize = call.q.shape, n_sms(), call.k.dtype.itemsize
    config = refine_tokens_stage.heuristic(H, D, tokens.shape[1], itemsize)
    options: Any
    if n_ctas >= T and tokens.shape[1] <= few_topk_stage.MAX_WIDTH:
        sort_keys, tokens = _listed_scores(call, tokens, count, interpret)
        options = dict(limit=count, interpret=interpret)
        return few_topk_stage.topk_of_listed(sort_keys, tokens, topk, **options)[:2]
    if config is None or n_ctas > T:
        return triton_stages.refine_tokens(call, tokens, count, topk, bool(interpret))
    first_row = call.sequences.key_start_of_queries(T)
    options = dict(k_top=topk, config=config, n_ctas=n_ctas, interpret=interpret)
    return refine_tokens_stage.refine_tokens(call.operands, tokens, count, first_row, **options)


def best_listed(call: FlatCall, tokens: Array, count: Array, k: int, interpret: Interpret = False) -> Found:
    """`refine_tokens.refine_tokens_with_sort_keys`; where that declines or queries are few, scores and then a top-k."""
    (T, H, D), n_ctas = call.q.shape, n_sms()
    config = refine_tokens_stage.heuristic(H, D, tokens.shape[1], call.k.dtype.itemsize)
    if config is None or n_ctas > T:
        sort_keys, tokens = _listed_scores(call, tokens, count, interpret)
        listed = KeptBlocks(ids=tokens, visible=call.visible, first=jnp.zeros_like(count), size=1)
        positions, _, best = narrow_topk_stage.topk_with_sort_keys(
            sort_keys, count, k, listed, interpret=bool(interpret)
        )
        return best, positions
    options: Any = dict(k_top=k, config=config, n_ctas=n_ctas, interpret=interpret)
    lists = tokens, count, call.sequences.key_start_of_queries(T)
    positions, _, best = refine_tokens_stage.refine_tokens_with_sort_keys(call.operands, *lists, **options)
    return best, positions


def _listed_scores(call: FlatCall, tokens: Array, count: Array, interpret: Interpret) -> tuple[Array, Array]:
    """`refine_tokens_few.refine_tokens_scores`, or Triton's of what that declines; and tokens in as many columns."""
    T, H, D = call.q.shape
    if tokens_few_stage.why_not(H, D, call.k.dtype.itemsize):
        sort_keys, listed = triton_stages.listed_scores(call, tokens, count, bool(interpret))
        return sort_keys, listed.ids
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % tokens_few_stage.COLUMNS)), constant_values=-1)
    first, steps = call.sequences.key_start_of_queries(T), tokens_few_stage.heuristic(T, tokens.shape[1], n_sms())
    lists = tokens, count, first
    return tokens_few_stage.refine_tokens_scores(call.operands, *lists, steps=steps, interpret=interpret), tokens


def units(call: FlatCall, method: BlockSparse, interpret: Interpret = False) -> Array:
    """By the kernel of `scores`; of queries with one head by Triton's, which sums over no heads."""
    (T, H, _), sequences, n_ctas = call.q.shape, call.sequences, n_sms()
    if H == 1:
        return triton_stages.units(call, method, bool(interpret))
    operands, n = call.operands._replace(k=call.k[:, None]), -(-sequences.max_keys // COLUMNS) * COLUMNS
    config = scores_stage.heuristic(scores_stage.Sizes.of(operands, len(sequences.lengths)), n, n_ctas, n_score=3)
    tiles = sequences.query_tiles(T, config.tile_t, call.visible, COLUMNS)
    columns = Columns(limit=call.visible, tiles=tiles, n=n)
    sort_keys: Array = scores_stage.scores(operands, columns, config=config, n_ctas=n_ctas, interpret=interpret)
    return sort_keys
