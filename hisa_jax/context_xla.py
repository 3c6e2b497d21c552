"""One device's part of `select_sharded` in plain JAX: the stages of one device, and what they find merged.

A key scores the same bits wherever it lies, so the selection is that of one device, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import stages, topk, xla
from hisa_jax.keys import Contiguous, Keys
from hisa_jax.methods import BlockSparse, Dsa, Method
from hisa_jax.selection import Selection, nothing
from hisa_jax.stages import Candidates, Queries


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
    first_key = lax.axis_index(axis) * S
    k = min(method.topk, n_devices * S)
    flat_keys = Keys(keys.values.reshape(B * S, D), None if keys.scales is None else keys.scales.reshape(B * S))
    starts = jnp.arange(B + 1, dtype=jnp.int32)

    def everywhere(best: Candidates, first: Array, k: int) -> Candidates:
        """The k best of what all devices have found, at positions from `first` on."""
        positions = jnp.where(best.positions >= 0, best.positions + first, -1)
        image, positions = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (best.image, positions))
        return Candidates(*topk.topk_in_order(image, positions, min(k, image.shape[1])))

    means_of: xla.SequenceOf | None = None
    if xla.has_filter(method, n_devices * S):
        n_blocks, first_block = S // method.block_size, first_key // method.block_size
        block_starts = jnp.arange(n_blocks, dtype=jnp.int32) * method.block_size
        present = jnp.clip(lengths - first_key, 0, S)
        counts = jnp.clip(present[:, None] - block_starts[None, :], 0, method.block_size)
        first_rows = starts[:-1, None] * S + block_starts[None, :]
        tile_n = max(tiles.keys // method.block_size, 1)
        means = stages.pool(flat_keys, first_rows.reshape(-1), counts.reshape(-1), method.block_size, tile_n)
        means_of = lambda r: Contiguous(Keys(means, None), r * n_blocks, n_blocks)  # noqa: E731

    def select_tile(queries: Queries, r: Array) -> Selection:
        sequence = Contiguous(flat_keys, r * S, S)
        own = queries._replace(visible=jnp.clip(queries.visible - first_key, 0, S))
        if means_of is None:
            blocks = None
            if not isinstance(method, Dsa):
                blocks = stages.first_positions(-(-queries.visible // method.block_size), method.block_topk)
            best = everywhere(stages.flat(own, sequence, min(k, S), tiles.keys), first_key, k)
            return xla.selection_of(best, method, blocks, return_scores, return_blocks)
        assert not isinstance(method, Dsa)
        eligible = -(-queries.visible // method.block_size)
        own_eligible = jnp.clip(eligible - first_block, 0, n_blocks)
        is_forced = stages.forced_blocks(eligible, method)
        found = stages.flat(
            queries._replace(visible=own_eligible),
            means_of(r),
            min(method.block_topk, n_blocks),
            tiles.keys,
            lambda block_ids: is_forced(block_ids + first_block),
        )
        blocks = everywhere(found, first_block, method.block_topk).positions
        if isinstance(method, BlockSparse) and not return_scores:
            positions, seen = stages.tokens_of(blocks, queries.visible, method.block_size)
            best = xla.unscored(jnp.where(seen, positions, -1))
        else:
            # The kept blocks of this device in front, ascending.
            ids = jnp.where((blocks >= first_block) & (blocks < first_block + n_blocks), blocks - first_block, n_blocks)
            ids = jnp.sort(ids, axis=1)
            ids = jnp.where(ids < n_blocks, ids, -1)
            refined = stages.refine(own, sequence, ids, method.block_size, min(k, S), tiles.keys)
            best = everywhere(refined, first_key, k)
        return xla.selection_of(best, method, blocks, return_scores, return_blocks)

    selection = xla.over_tiles(
        select_tile,
        Queries(q.reshape(B * T, H, D), w.reshape(B * T, H), visible.reshape(B * T)),
        starts * T,
        min(tiles.queries, T),
        functools.partial(nothing, method=method, return_scores=return_scores, return_blocks=return_blocks),
    )
    return jax.tree.map(lambda leaf: leaf.reshape(B, T, *leaf.shape[1:]), selection)
