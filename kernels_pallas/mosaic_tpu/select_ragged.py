"""The stages put together for ragged sequences: packed batches and requests in pages.

Sequences with several queries get tiles of their own, which share what is brought to VMEM; the queries of the others
stand side by side and copy what they keep. Both can be in one batch, and neither costs anything where it has no query.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu import block_filter as block_filter_stage
from hisa_jax.kernels_pallas.mosaic_tpu import decode, flat, pool, refine
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS, Chip
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, either, few_rows
from hisa_jax.kernels_pallas.mosaic_tpu.select import candidates
from hisa_jax.kernels_pallas.types import Interpret

_WIDE = 16  # queries of a sequence from which tiles of 32 are worth their padding
_CHUNK = 2048  # keys that are moved at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Rows of queries: `q` [T, H, D], `w` [T, H] and `visible` [T] int32, 0 for padding; T at least 8."""

    q: Array
    w: Array
    visible: Array

    @classmethod
    def padded(cls, q: Array, w: Array, visible: Array) -> "Queries":
        missing = max(ROWS - q.shape[0], 0)
        q, w, visible = (jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in (q, w, visible))
        return cls(q=q, w=w, visible=visible)

    def tile_t(self, most: int = 32) -> int:
        return min(most, self.q.shape[0] // ROWS * ROWS)


def packed(k: Array, k_scale: Array | None, cu_seqlens_q: Array, cu_seqlens_k: Array, block_size: int) -> Ragged:
    """[N, D], [N] or None, [R + 1], [R + 1]: keys moved so that every sequence begins with a block: one copy."""
    (N, _D), R = k.shape, cu_seqlens_k.shape[0] - 1
    lengths = jnp.diff(cu_seqlens_k)
    n_blocks = -(-lengths // block_size)
    starts = jnp.cumsum(n_blocks) - n_blocks
    # Each sequence ends in at most one partial block; behind the last there is a group that copies may run into.
    chunk = min(_CHUNK, -(-N // block_size) * block_size)
    rows = (N // block_size + R + GROUP) * block_size + chunk
    n_chunks = -(-lengths // chunk)
    ends = jnp.cumsum(n_chunks)

    def moved(x: Array) -> Array:
        x = jnp.pad(x, ((0, chunk), *((0, 0),) * (x.ndim - 1)))

        def one_chunk(i: Array, out: Array) -> Array:
            r = jnp.searchsorted(ends, i, side="right", method="compare_all")
            at = (i - (ends - n_chunks)[r]) * chunk
            part = lax.dynamic_slice_in_dim(x, cu_seqlens_k[r] + at, chunk)
            # What a sequence writes behind its end, the next one overwrites.
            return lax.dynamic_update_slice_in_dim(out, part, starts[r] * block_size + at, axis=0)

        out = lax.fori_loop(0, ends[-1], one_chunk, jnp.zeros((rows, *x.shape[1:]), x.dtype))
        return out[: rows // block_size * block_size].reshape(1, -1, block_size, *x.shape[1:])

    return Ragged(
        k=moved(k),
        k_scale=None if k_scale is None else moved(k_scale),
        query_starts=cu_seqlens_q,
        lengths=lengths,
        keys=starts,
        table=None,
        block_size=block_size,
        max_keys=N,
    )


def paged(
    k: Array, k_scale: Array | None, visible: Array, block_tables: Array, cu_seqlens_q: Array, block_size: int
) -> Ragged:
    """[N, page_size, D], [N, page_size] or None, [T], [R, P], [R + 1]: nothing is moved."""
    n_pages, page_size, _ = k.shape
    T, (_R, P) = visible.shape[0], block_tables.shape
    per_block = block_size // page_size
    table = jnp.clip(block_tables, 0, n_pages - 1)
    table = jnp.pad(table, ((0, 0), (0, -P % per_block)))
    # The last query of a sequence sees the most.
    last = visible[jnp.clip(cu_seqlens_q[1:] - 1, 0, T - 1)]
    return Ragged(
        k=k,
        k_scale=k_scale,
        query_starts=cu_seqlens_q,
        lengths=jnp.where(jnp.diff(cu_seqlens_q) > 0, last, 0),
        keys=None,
        table=table,
        block_size=block_size,
        max_keys=P * page_size,
    )


def hisa(
    queries: Queries,
    ragged: Ragged,
    page_sums: Array | None,
    *,
    topk: int,
    block_topk: int,
    chip: Chip,
    interpret: Interpret,
    **forced: Any,
) -> tuple[Array, Array, Array]:
    """-> [T, topk] int32, [T] int32 count, [T, block_topk] int32 blocks.

    Args:
        page_sums: [N, D] float32, sums of the keys of pages; None for keys in a row, which are pooled.
    """
    options: dict[str, Any] = {"chip": chip, "interpret": interpret}
    blocks = kept_blocks(queries, ragged, page_sums, block_topk=block_topk, **options, **forced)
    n_visible = candidates(blocks, queries.visible, ragged.block_size)
    kept = blocks[:, : min(block_topk, ragged.max_blocks)]
    return refined(queries, ragged, kept, n_visible, topk=topk, **options), jnp.minimum(n_visible, topk), blocks


def kept_blocks(
    queries: Queries,
    ragged: Ragged,
    page_sums: Array | None,
    *,
    block_topk: int,
    chip: Chip,
    interpret: Interpret,
    **forced: Any,
) -> Array:
    """[T, block_topk] int32, ascending, then -1."""
    T, every = queries.q.shape[0], jnp.arange(block_topk, dtype=jnp.int32)
    eligible = -(-queries.visible // ragged.block_size)
    all_eligible = jnp.where(every < eligible[:, None], every, -1)
    if ragged.max_blocks <= block_topk:
        return all_eligible
    # A query that keeps all its blocks needs no scores of them, nor a sequence of such queries its means.
    keeps_all = eligible <= block_topk
    eligible = jnp.where(keeps_all, 0, eligible)
    is_long = ragged.lengths > block_topk * ragged.block_size
    ragged = dataclasses.replace(ragged, lengths=jnp.where(is_long, ragged.lengths, 0))
    is_wide = ragged.n_queries >= (_WIDE if page_sums is None else ROWS)
    options: dict[str, Any] = {"block_topk": block_topk, "interpret": interpret, **forced}

    def tiled(wanted: Array, least: int, tile_t: int) -> Array:
        config = dataclasses.replace(block_filter_stage.heuristic(chip, T), tile_t=tile_t)
        tiles = ragged.tiles(T, is_long & wanted, least, tile_t, config.n_cores)
        return block_filter_stage.block_filter_ragged(
            queries.q, queries.w, ragged, tiles, page_sums, eligible, config=config, **options
        )

    def side_by_side() -> Array:
        """The queries of sequences that have few, by kept means: as `decode`."""
        mean_parts = block_filter_stage.heuristic(chip, T).mean_parts
        R = ragged.lengths.shape[0]
        means = pool.pool_pages(
            page_sums,
            jnp.where(is_wide, 0, ragged.lengths),
            ragged.table,
            n=-(-ragged.max_blocks // LANES) * LANES,
            block_size=ragged.block_size,
            page_size=ragged.k.shape[1],
            mean_parts=mean_parts,
            interpret=interpret,
        )
        rows, places = few_rows(~keeps_all & ~is_wide[r], R * (ROWS - 1))
        (few,) = decode.block_filter_listed(
            _take(queries.q, rows),
            _take(queries.w, rows),
            means,
            ragged.sequence_of(jnp.minimum(rows, T - 1)),
            _take(eligible, rows),
            chip=chip,
            **options,
        )
        return few[places]

    r = ragged.sequence_of(jnp.arange(T, dtype=jnp.int32))
    wide = lambda: tiled(is_wide, ROWS, queries.tile_t())  # noqa: E731
    narrow = side_by_side if page_sums is not None else lambda: tiled(~is_wide, 1, ROWS)
    return jnp.where(keeps_all[:, None], all_eligible, either(~keeps_all, is_wide[r], wide, narrow))


def refined(
    queries: Queries,
    ragged: Ragged,
    blocks: Array,
    n_visible: Array,
    *,
    topk: int,
    chip: Chip,
    interpret: Interpret,
) -> Array:
    """[T, m], [T] -> [T, topk] int32 positions, ascending, then -1."""
    (T, H, D), m, block_size = queries.q.shape, blocks.shape[1], ragged.block_size
    itemsize = ragged.k.dtype.itemsize
    most = refine.most_resident(block_size, ragged.k.shape[-2], D, itemsize)
    n = min(-(-ragged.max_blocks // GROUP) * GROUP, most)
    n_blocks = -(-ragged.lengths // block_size)
    is_shared = (ragged.n_queries >= ROWS) & (ragged.n_queries * m >= n_blocks) & (n_blocks <= n)
    options: dict[str, Any] = {"topk": topk, "interpret": interpret}
    every = jnp.arange(T, dtype=jnp.int32)
    is_shared_row = is_shared[ragged.sequence_of(every)]

    def shared() -> Array:
        config = refine.resident(chip, queries.tile_t(), H, block_size, itemsize)
        config = dataclasses.replace(config, n_cores=chip.n_cores if config.tile_t < T else 1)
        tiles = ragged.tiles(T, is_shared, ROWS, config.tile_t, config.n_cores)
        # Queries that keep all they see need no scores, nor a sequence of such queries its keys.
        loaded = dataclasses.replace(ragged, lengths=jnp.where(ragged.lengths > topk, ragged.lengths, 0))
        return refine.refine_ragged(
            queries.q, queries.w, loaded, tiles, blocks, n_visible, n=n, config=config, **options
        )

    def side_by_side() -> Array:
        R = ragged.lengths.shape[0]
        fits = ragged.max_blocks <= most
        rows, places = few_rows(
            (n_visible > 0) & ~is_shared_row, R * max(ROWS - 1, -(-ragged.max_blocks // m) - 1) if fits else T
        )
        own = _take(blocks, rows)
        (few,) = refine.refine_listed(
            _take(queries.q, rows),
            _take(queries.w, rows),
            ragged.k.reshape(-1, *ragged.k.shape[-2:]),
            None if ragged.k_scale is None else ragged.k_scale.reshape(-1, ragged.k_scale.shape[-1]),
            own,
            ragged.places(jnp.maximum(own, 0), jnp.minimum(rows, T - 1)),
            _take(n_visible, rows),
            block_size=block_size,
            config=refine.gathered(chip, rows.shape[0], H, m, block_size),
            **options,
        )
        return few[places]

    is_real = n_visible > 0
    return jnp.where(is_real[:, None], either(is_real, is_shared_row, shared, side_by_side), -1)


def select_flat(
    queries: Queries, ragged: Ragged, *, topk: int, chip: Chip, interpret: Interpret
) -> tuple[Array, Array]:
    """-> [T, topk] int32, [T] int32 count; the blocks of `ragged` are what is copied at a time, 128 or 256 keys."""
    T = queries.q.shape[0]
    visible = jnp.clip(queries.visible, 0, ragged.max_keys)
    is_wide = ragged.n_queries >= _WIDE
    tile_t = min(queries.tile_t(), flat.heuristic(T, ragged.max_keys).tile_t)

    def tiled(wanted: Array, least: int, tile_t: int) -> Array:
        n_cores = chip.n_cores if tile_t < T else 1
        tiles = ragged.tiles(T, wanted, least, tile_t, n_cores)
        options: dict[str, Any] = {"unit": ragged.block_size, "n_cores": n_cores, "interpret": interpret}
        return flat.select_ragged(queries.q, queries.w, visible, ragged, tiles, topk=topk, tile_t=tile_t, **options)

    r = ragged.sequence_of(jnp.arange(T, dtype=jnp.int32))
    wide, narrow = (lambda: tiled(is_wide, _WIDE, tile_t)), (lambda: tiled(~is_wide, 1, ROWS))
    indices = either(visible > 0, is_wide[r], wide, narrow)
    return jnp.where(visible[:, None] > 0, indices, -1), jnp.minimum(visible, topk)


def _take(x: Array, rows: Array) -> Array:
    """Rows [n] of [T, ...], zeros where a row is T; x itself if those are all."""
    if rows.shape[0] == x.shape[0]:
        is_row = (rows < x.shape[0]).reshape(-1, *(1 for _ in x.shape[1:]))
        return jnp.where(is_row, x, 0) if x.ndim == 1 else x
    return x.at[rows].get(mode="fill", fill_value=0)
