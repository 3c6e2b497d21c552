"""One device's part of a selection over several, in plain JAX: it searches its own keys, what devices find is merged.

Keys in one piece are equal runs of each sequence, one a device, and stripes of pages go round the devices: the same to
all that follows, since a run is a stripe of which there is one a device. Each search runs over all queries before
devices exchange anything, so a step exchanges twice, however many sequences it has. A key scores the same bits wherever
it lies, so the selection is that of one device, bit for bit.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.candidates import CandidateBlocks
from hisa_jax.layout import Call, Contiguous, Keys, Queries
from hisa_jax.methods import BlockSparse, Dsa, Method, Scan
from hisa_jax.selection import Selection
from hisa_jax.sharded import exchange
from hisa_jax.sharded.stripes import Shard, Stripes
from hisa_jax.xla import own, scan, stages, topk, units
from hisa_jax.xla import select as xla
from hisa_jax.xla.stages import Candidates


def select_shard(
    call: Call, method: Method, tiles: xla.Tiles, shard: Shard, *, return_scores: bool, return_blocks: bool
) -> Selection:
    """The selection of all queries, the same on all devices; inside `jax.shard_map`.

    Args:
        call: all queries, and of each sequence the keys, or the pages in its table, that this device has.
        shard: which those are.
    """
    search = _Search(call, tiles, shard, shard.stripes())
    listed, (budget, block_budget) = call.limits.candidates, xla.budgets(call.limits, method)
    if listed is not None:
        chosen, blocks = search.listed(listed, method), None
    elif xla.has_filter(method, shard.max_keys, block_budget is not None):
        chosen, blocks = search.filtered(method, block_budget, return_scores)
    else:
        chosen, blocks = search.flat(method)
    chosen = xla.within_budget(chosen, budget)
    return call.unflatten(xla.selection_of(chosen, method, blocks, return_scores, return_blocks))


@dataclasses.dataclass(frozen=True)
class _Search:
    """What one device looks for among its keys, and what all have found.

    Attributes: `tokens`, which tokens of each sequence are this device's.
    """

    call: Call
    tiles: xla.Tiles
    shard: Shard
    tokens: Stripes

    def each_tile[Found](
        self, find: Callable[..., Found], nothing: Callable[[tuple[int]], Found], *rows: Array
    ) -> Found:
        """What each query finds on this device, tile by tile; `find` gets a tile, its sequence, its rows of `rows`."""
        return xla.over_tiles(find, self.call, min(self.tiles.queries, self.call.queries.q.shape[0]), nothing, *rows)

    def best(self, find: Callable[..., Candidates], k: int, *rows: Array) -> Candidates:
        """The k best of each query that `find` finds on this device."""

        def nothing(shape: tuple[int]) -> Candidates:
            return Candidates(jnp.full((*shape, k), topk.INVISIBLE, jnp.int32), jnp.full((*shape, k), -1, jnp.int32))

        return self.each_tile(find, nothing, *rows)

    def merged(self, found: Candidates, stripes: Stripes, k: int) -> Candidates:
        """The k best of what all devices have found, at positions in the sequence, in units of `stripes`."""
        parts = (found.sort_key, topk.INVISIBLE), (stripes.place(found.positions), -1)
        sort_key, places = (exchange.to_owner(x, fill, self.shard.axis, self.shard.n_devices) for x, fill in parts)
        best = topk.topk_of_any_order(sort_key, places, min(k, sort_key.shape[1]))
        T = self.call.queries.q.shape[0]
        return Candidates(*(exchange.from_owners(x, self.shard.axis, T) for x in best))

    def own(self, tile: Queries) -> Queries:
        """The same queries, which see only tokens of this device."""
        return tile._replace(visible=self.tokens.before(tile.visible))

    def flat(self, method: Method) -> tuple[Candidates, Array | None]:
        """The best of all tokens, and all blocks, of which no query can see more than it keeps."""
        blocks = None
        if not isinstance(method, Dsa):
            eligible = -(-self.call.queries.visible // method.block_size)
            blocks = stages.first_positions(eligible, method.block_topk)
        k, score = min(method.topk, self.shard.max_keys), own.score_of(method, "token_score", stages.scores)
        own_k = min(k, self.call.max_keys)

        def find(tile: Queries, r: Array) -> Candidates:
            return stages.flat(self.own(tile), self.call.sequence(r), own_k, self.tiles.keys, score=score)

        return self.merged(self.best(find, own_k), self.tokens, k), blocks

    def filtered(self, method: Method, budget: Array | None, return_scores: bool) -> tuple[Candidates, Array]:
        """The best tokens of the kept blocks or units, and those; `budget`: of blocks."""
        assert not isinstance(method, Dsa)
        block_size, visible = method.block_size, self.call.queries.visible
        m, block_stripes = min(method.block_topk, self.call.max_keys // block_size), self.stripes_of(block_size)
        if isinstance(method, Scan):
            found = self._scanned(method, m, block_stripes)
        elif isinstance(method, BlockSparse) and method.scored_by == "max":
            found = self._best_blocks(method, m, block_stripes)
        else:
            found = self._best_means(method, m, block_stripes)
        found = self.merged(found, block_stripes, method.block_topk)
        blocks = stages.kept_of(found, -(-visible // block_size), method, budget)
        if isinstance(method, BlockSparse) and not return_scores:
            positions, seen = stages.tokens_of(blocks, visible, block_size)
            return xla.unscored(jnp.where(seen, positions, -1)), blocks
        return self.refined(blocks, block_size, method), blocks

    def listed(self, listed: CandidateBlocks, method: Method) -> Candidates:
        """The best tokens of the listed blocks."""
        return self.refined(listed.ids, listed.block_size, method)

    def stripes_of(self, block_size: int) -> Stripes:
        """Which blocks are this device's."""
        return self.tokens._replace(size=self.tokens.size // block_size)

    def refined(self, blocks: Array, block_size: int, method: Method) -> Candidates:
        """The best tokens of some blocks, [T, m] ascending, then -1."""
        n_blocks, block_stripes = self.call.max_keys // block_size, self.stripes_of(block_size)
        m, k = min(blocks.shape[1], n_blocks), min(method.topk, self.shard.max_keys)
        # The blocks of this device first, ascending.
        is_own = (blocks >= 0) & block_stripes.owns(blocks)
        own_blocks = jnp.sort(jnp.where(is_own, block_stripes.own(blocks), n_blocks), axis=1)[:, :m]
        own_blocks = jnp.where(own_blocks < n_blocks, own_blocks, -1)
        own_k, score = min(k, m * block_size), own.score_of(method, "token_score", stages.scores)

        def refine(tile: Queries, r: Array, block_ids: Array) -> Candidates:
            sequence, tile_s = self.call.sequence(r), self.tiles.keys
            return stages.refine(self.own(tile), sequence, block_ids, block_size, own_k, tile_s, score)

        return self.merged(self.best(refine, own_k, own_blocks), self.tokens, k)

    def _best_blocks(self, method: BlockSparse, m: int, block_stripes: Stripes) -> Candidates:
        def find(tile: Queries, r: Array) -> Candidates:
            eligible, where = -(-tile.visible // method.block_size), (self.call.sequence(r), method, m)
            return units.best_blocks(self.own(tile), eligible, *where, self.tiles.keys, block_stripes.place)

        return self.best(find, m)

    def _best_means(self, method: xla.WithMeans, m: int, block_stripes: Stripes) -> Candidates:
        means_of, score = self._means_of(method), own.score_of(method, "block_score", stages.scores)

        def find(tile: Queries, r: Array) -> Candidates:
            eligible = -(-tile.visible // method.block_size)
            is_forced = stages.forced_blocks(eligible, method)
            tile = tile._replace(visible=block_stripes.before(eligible))

            def forced(block_ids: Array) -> Array:
                return is_forced(block_stripes.place(block_ids))

            return stages.flat(tile, means_of(r), m, self.tiles.keys, forced, score)

        return self.best(find, m)

    def _means_of(self, method: xla.WithMeans) -> xla.SequenceOf:
        """What gives sequence r the means of this device's blocks: pooled here, or from what its pages keep."""
        call, block_size = self.call, method.block_size
        n_blocks, R = call.max_keys // block_size, call.n_sequences
        if method.pool is not None:
            return lambda r: own.Pooled(call.sequence(r), method, n_blocks)
        if call.cache is not None:
            return xla.paged_means(call, block_size)
        assert call.lengths is not None
        starts = jnp.arange(n_blocks, dtype=jnp.int32) * block_size
        counts = jnp.clip(self.tokens.before(call.lengths)[:, None] - starts[None, :], 0, block_size)
        first_rows = jnp.arange(R, dtype=jnp.int32)[:, None] * call.max_keys + starts[None, :]
        tile_n = max(self.tiles.keys // block_size, 1)
        means = stages.pool(call.keys, first_rows.reshape(-1), counts.reshape(-1), block_size, tile_n)
        return lambda r: Contiguous(Keys(means, None), r * n_blocks, n_blocks)

    def _scanned(self, method: Scan, m: int, unit_stripes: Stripes) -> Candidates:
        def find(tile: Queries, r: Array, virtual: Array) -> Candidates:
            heads = scan.scan_heads(tile, virtual, scan.exact_heads(tile, method))
            eligible, seen = -(-tile.visible // method.unit), self.tokens.before(tile.visible)
            where = self.call.sequence(r), method, m, self.tiles.keys, unit_stripes.place
            return scan.best_units(heads, seen, eligible, *where)

        return self.best(find, m, self._virtual_heads(method))

    def _virtual_heads(self, method: Scan) -> Array:
        """[T, D] float32, the same on all devices, each of which scores the samples that it has.

        Devices exchange a score a sample, then a count a head: 1 KB and 4 * H bytes a query.
        """
        queries, tokens, axis = self.call.queries, self.tokens, self.shard.axis
        exact = scan.exact_heads(queries, method)
        if method.slopes == "plain":
            return scan.virtual_head(queries, jnp.ones_like(queries.w), exact)
        positions = scan.sample_positions(queries.visible)
        positions = jnp.where((positions >= 0) & tokens.owns(positions), tokens.own(positions), -1)

        def sampled(tile: Queries, r: Array, positions: Array) -> Array:
            return scan.sample(tile, self.call.sequence(r), positions).sort_key

        def counted(tile: Queries, r: Array, positions: Array, is_best: Array) -> Array:
            products = scan.sample(tile, self.call.sequence(r), positions).products
            return scan.open_heads(products, is_best & (positions >= 0))

        def zeros(width: int) -> Callable[[tuple[int]], Array]:
            return lambda shape: jnp.zeros((*shape, width), jnp.int32)

        sort_key = lax.pmax(self.each_tile(sampled, zeros(scan.N_SAMPLES), positions), axis)
        is_best, n_best = scan.best_samples(sort_key)
        n_open = lax.psum(self.each_tile(counted, zeros(queries.w.shape[1]), positions, is_best), axis)
        return scan.virtual_head(queries, scan.slopes_of(n_open, n_best), exact)
