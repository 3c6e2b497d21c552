"""One device's part of a selection over several, in plain JAX: it searches its own keys, what devices find is merged.

Keys in one piece are equal runs of each sequence, one a device, and pages are dealt out: the same to all that follows,
since a run is a stripe of which there is one a device. Each search runs over all queries before devices exchange
anything, so a step exchanges twice, however many sequences it has. A key scores the same bits wherever it lies, so the
selection is that of one device, bit for bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.cache import IndexCache
from hisa_jax.layout import Contiguous, Keys, Paged, PagedMeans, Sequence
from hisa_jax.methods import BlockSparse, Dsa, Method, Scan
from hisa_jax.selection import Selection
from hisa_jax.sharded import exchange
from hisa_jax.sharded.stripes import Stripes
from hisa_jax.xla import scan, stages, topk
from hisa_jax.xla import select as xla
from hisa_jax.xla.stages import Candidates, Queries


def select(
    q: Array,
    keys: Keys,
    w: Array,
    visible: Array,
    lengths: Array,
    method: Method,
    tiles: xla.Tiles,
    *,
    axis: str,
    n_devices: int,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """One device: [B, T, H, D], its Keys of [B, S / n_devices, D], [B, T, H], [B, T], [B] -> Selection of [B, T]."""
    (B, T, H, D), S = q.shape, keys.values.shape[1]
    tokens = Stripes(S, n_devices, lax.axis_index(axis))
    flat_keys = Keys(keys.values.reshape(B * S, D), None if keys.scales is None else keys.scales.reshape(B * S))
    starts = jnp.arange(B + 1, dtype=jnp.int32)

    means_of: xla.SequenceOf | None = None
    if xla.has_means(method, n_devices * S):
        n_blocks = S // method.block_size
        block_starts = jnp.arange(n_blocks, dtype=jnp.int32) * method.block_size
        counts = jnp.clip(tokens.before(lengths)[:, None] - block_starts[None, :], 0, method.block_size)
        first_rows = starts[:-1, None] * S + block_starts[None, :]
        tile_n = max(tiles.keys // method.block_size, 1)
        means = stages.pool(flat_keys, first_rows.reshape(-1), counts.reshape(-1), method.block_size, tile_n)
        means_of = lambda r: Contiguous(Keys(means, None), r * n_blocks, n_blocks)  # noqa: E731

    selection = _select(
        Queries(q.reshape(B * T, H, D), w.reshape(B * T, H), visible.reshape(B * T)),
        starts * T,
        lambda r: Contiguous(flat_keys, r * S, S),
        means_of,
        tokens,
        S,
        n_devices * S,
        method,
        tiles,
        axis,
        return_scores,
        return_blocks,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(B, T, *leaf.shape[1:]), selection)


def select_paged(
    q: Array,
    w: Array,
    visible: Array,
    cache: IndexCache,
    pages: Array,
    cu_seqlens_q: Array,
    method: Method,
    tiles: xla.Tiles,
    *,
    axis: str,
    n_devices: int,
    stripe: int,
    max_keys: int,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """One device: [T, H, D], [T, H], [T], its cache, [R, P / n_devices] its pages, [R + 1] -> Selection of [T].

    Args:
        pages: of each request, ids within this device's cache; stripes of `stripe` tokens are dealt out.
        max_keys: most tokens of a request, on all devices.
    """
    page_size = cache.page_size
    keys = Keys(
        cache.keys.reshape(-1, cache.keys.shape[-1]), None if cache.scales is None else cache.scales.reshape(-1)
    )

    def means_of(r: Array) -> Sequence:
        assert not isinstance(method, Dsa)
        return PagedMeans(cache.sums, cache.counts, pages[r], method.block_size // page_size)

    return _select(
        Queries(q, w, visible),
        cu_seqlens_q,
        lambda r: Paged(keys, pages[r], page_size),
        means_of if xla.has_means(method, max_keys) else None,
        Stripes(stripe, n_devices, lax.axis_index(axis)),
        pages.shape[1] * page_size,
        max_keys,
        method,
        tiles,
        axis,
        return_scores,
        return_blocks,
    )


def _select(
    queries: Queries,
    query_starts: Array,
    sequence_of: xla.SequenceOf,
    means_of: xla.SequenceOf | None,
    tokens: Stripes,
    own_keys: int,
    max_keys: int,
    method: Method,
    tiles: xla.Tiles,
    axis: str,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """[T, H, D] queries of R sequences, `query_starts` [R + 1] -> Selection of [T].

    `sequence_of` and `means_of` give this device's part of a sequence, at most `own_keys` of `max_keys` tokens, and the
    means of its blocks; None where none are needed.
    """
    visible, k = queries.visible, min(method.topk, max_keys)
    T, t = visible.shape[0], min(tiles.queries, visible.shape[0])

    def search(find: Callable[..., Candidates], k: int, *rows: Array) -> Candidates:
        """The k best of each query that `find` finds on this device, tile by tile; the tile sees its rows of `rows`."""

        def nothing(shape: tuple[int]) -> Candidates:
            return Candidates(jnp.full((*shape, k), topk.INVISIBLE, jnp.int32), jnp.full((*shape, k), -1, jnp.int32))

        return xla.over_tiles(find, queries, query_starts, t, nothing, *rows)

    def merged(found: Candidates, stripes: Stripes, k: int) -> Candidates:
        """The k best of what all devices have found, at places of the sequence."""
        parts = (found.sort_key, topk.INVISIBLE), (stripes.place(found.positions), -1)
        sort_key, places = (exchange.to_owner(x, fill, axis, stripes.n_devices) for x, fill in parts)
        best = topk.topk_of_any_order(sort_key, places, min(k, sort_key.shape[1]))
        return Candidates(*(exchange.from_owners(x, axis, T) for x in best))

    def own(tile: Queries) -> Queries:
        return tile._replace(visible=tokens.before(tile.visible))

    if not xla.has_filter(method, max_keys):
        blocks = None
        if not isinstance(method, Dsa):
            blocks = stages.first_positions(-(-visible // method.block_size), method.block_topk)
        own_k = min(k, own_keys)
        found = search(lambda tile, r: stages.flat(own(tile), sequence_of(r), own_k, tiles.keys), own_k)
        return xla.selection_of(merged(found, tokens, k), method, blocks, return_scores, return_blocks)

    block_size, n_blocks = method.block_size, own_keys // method.block_size
    dealt = tokens._replace(size=tokens.size // block_size)
    m = min(method.block_topk, n_blocks)

    def filter_blocks(tile: Queries, r: Array) -> Candidates:
        assert means_of is not None
        eligible = -(-tile.visible // block_size)
        is_forced = stages.forced_blocks(eligible, method)
        tile = tile._replace(visible=dealt.before(eligible))
        return stages.flat(tile, means_of(r), m, tiles.keys, lambda block_ids: is_forced(dealt.place(block_ids)))

    def scan_units(tile: Queries, r: Array, virtual: Array) -> Candidates:
        assert isinstance(method, Scan)
        heads = scan.scan_heads(tile, virtual, scan.exact_heads(tile, method))
        eligible = -(-tile.visible // block_size)
        seen = tokens.before(tile.visible)
        return scan.best_units(heads, seen, eligible, sequence_of(r), method, m, tiles.keys, dealt.place)

    if isinstance(method, Scan):
        heads = _virtual_heads(queries, query_starts, sequence_of, tokens, method, t, axis)
        found = search(scan_units, m, heads)
    else:
        found = search(filter_blocks, m)
    blocks = stages.kept_of(merged(found, dealt, method.block_topk), -(-visible // block_size), method)
    if isinstance(method, BlockSparse) and not return_scores:
        positions, seen = stages.tokens_of(blocks, visible, block_size)
        best = xla.unscored(jnp.where(seen, positions, -1))
        return xla.selection_of(best, method, blocks, return_scores, return_blocks)
    # The kept blocks of this device in front, ascending.
    own_blocks = jnp.sort(jnp.where((blocks >= 0) & dealt.owns(blocks), dealt.own(blocks), n_blocks), axis=1)[:, :m]
    own_blocks = jnp.where(own_blocks < n_blocks, own_blocks, -1)
    own_k = min(k, m * block_size)

    def refine(tile: Queries, r: Array, block_ids: Array) -> Candidates:
        return stages.refine(own(tile), sequence_of(r), block_ids, block_size, own_k, tiles.keys)

    best = merged(search(refine, own_k, own_blocks), tokens, k)
    return xla.selection_of(best, method, blocks, return_scores, return_blocks)


def _virtual_heads(
    queries: Queries,
    query_starts: Array,
    sequence_of: xla.SequenceOf,
    tokens: Stripes,
    method: Scan,
    t: int,
    axis: str,
) -> Array:
    """[T, D] float32, the same on all devices, each of which scores the samples that it has.

    Devices exchange a score a sample, then a count a head: 1 KB and 4 * H bytes a query.
    """
    exact = scan.exact_heads(queries, method)
    if method.slopes == "plain":
        return scan.virtual_head(queries, jnp.ones_like(queries.w), exact)
    positions = scan.sample_positions(queries.visible)
    positions = jnp.where((positions >= 0) & tokens.owns(positions), tokens.own(positions), -1)

    def sampled(tile: Queries, r: Array, positions: Array) -> Array:
        return scan.sample(tile, sequence_of(r), positions).sort_key

    def counted(tile: Queries, r: Array, positions: Array, is_best: Array) -> Array:
        return scan.open_heads(scan.sample(tile, sequence_of(r), positions).products, is_best & (positions >= 0))

    def each_tile(find: Callable[..., Array], width: int, *rows: Array) -> Array:
        return xla.over_tiles(
            find, queries, query_starts, t, lambda shape: jnp.zeros((*shape, width), jnp.int32), *rows
        )

    sort_key = lax.pmax(each_tile(sampled, scan.N_SAMPLES, positions), axis)
    is_best, n_best = scan.best_samples(sort_key)
    n_open = lax.psum(each_tile(counted, queries.w.shape[1], positions, is_best), axis)
    return scan.virtual_head(queries, scan.slopes_of(n_open, n_best), exact)
