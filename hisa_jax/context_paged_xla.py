"""One device's part of `select_paged_sharded` in plain JAX: it searches its own pages, what devices find is merged.

Each search runs over the queries of all requests before devices exchange anything, so a step exchanges twice, however
many requests it has. A key scores the same bits wherever it lies, so the selection is that of one device, bit for bit.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import exchange, stages, topk, xla
from hisa_jax.cache import IndexCache
from hisa_jax.keys import Keys, Paged, PagedMeans
from hisa_jax.methods import BlockSparse, Dsa, Method
from hisa_jax.selection import Selection
from hisa_jax.stages import Candidates, Queries
from hisa_jax.stripes import Stripes


def select(
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
    T, page_size = visible.shape[0], cache.page_size
    tokens = Stripes(stripe, n_devices, lax.axis_index(axis))
    keys = Keys(
        cache.keys.reshape(-1, cache.keys.shape[-1]), None if cache.scales is None else cache.scales.reshape(-1)
    )
    own_tokens, k = pages.shape[1] * page_size, min(method.topk, max_keys)

    def search(find: Callable[..., Candidates], k: int, *rows: Array) -> Candidates:
        """The k best of each query that `find` finds on this device, tile by tile; the tile sees its rows of `rows`."""
        nothing = functools.partial(_nothing, k=k)
        return xla.over_tiles(find, Queries(q, w, visible), cu_seqlens_q, min(tiles.queries, T), nothing, *rows)

    def merged(found: Candidates, stripes: Stripes, k: int) -> Candidates:
        """The k best of what all devices have found, at places of the request."""
        parts = (found.image, topk.INVISIBLE), (stripes.place(found.positions), -1)
        image, places = (exchange.to_owner(x, fill, axis, n_devices) for x, fill in parts)
        best = topk.topk_of_any_order(image, places, min(k, image.shape[1]))
        return Candidates(*(exchange.from_owners(x, axis, T) for x in best))

    def own(queries: Queries) -> Queries:
        return queries._replace(visible=tokens.before(queries.visible))

    if isinstance(method, Dsa) or not xla.has_filter(method, max_keys):
        blocks = None
        if not isinstance(method, Dsa):
            blocks = stages.first_positions(-(-visible // method.block_size), method.block_topk)
        own_k = min(k, own_tokens)
        found = search(
            lambda queries, r: stages.flat(own(queries), Paged(keys, pages[r], page_size), own_k, tiles.keys), own_k
        )
        return xla.selection_of(merged(found, tokens, k), method, blocks, return_scores, return_blocks)

    block_size, n_blocks = method.block_size, own_tokens // method.block_size
    dealt = Stripes(stripe // block_size, n_devices, tokens.device)
    m = min(method.block_topk, n_blocks)

    def filter_blocks(queries: Queries, r: Array) -> Candidates:
        eligible = -(-queries.visible // block_size)
        is_forced = stages.forced_blocks(eligible, method)
        return stages.flat(
            queries._replace(visible=dealt.before(eligible)),
            PagedMeans(cache.sums, cache.counts, pages[r], block_size // page_size),
            m,
            tiles.keys,
            lambda block_ids: is_forced(dealt.place(block_ids)),
        )

    blocks = merged(search(filter_blocks, m), dealt, method.block_topk).positions
    if isinstance(method, BlockSparse) and not return_scores:
        positions, seen = stages.tokens_of(blocks, visible, block_size)
        best = xla.unscored(jnp.where(seen, positions, -1))
        return xla.selection_of(best, method, blocks, return_scores, return_blocks)
    # The kept blocks of this device in front, ascending.
    own_blocks = jnp.sort(jnp.where((blocks >= 0) & dealt.owns(blocks), dealt.own(blocks), n_blocks), axis=1)[:, :m]
    own_blocks = jnp.where(own_blocks < n_blocks, own_blocks, -1)
    own_k = min(k, m * block_size)

    def refine(queries: Queries, r: Array, block_ids: Array) -> Candidates:
        sequence = Paged(keys, pages[r], page_size)
        return stages.refine(own(queries), sequence, block_ids, block_size, own_k, tiles.keys)

    best = merged(search(refine, own_k, own_blocks), tokens, k)
    return xla.selection_of(best, method, blocks, return_scores, return_blocks)


def _nothing(rows: tuple[int], k: int) -> Candidates:
    return Candidates(jnp.full((*rows, k), topk.INVISIBLE, jnp.int32), jnp.full((*rows, k), -1, jnp.int32))
