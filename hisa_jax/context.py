"""Context parallelism: the keys of each sequence in equal runs of whole blocks over a mesh axis, the queries on all.

Each device scores its own blocks and its own tokens. Devices exchange candidates alone, m blocks and topk tokens of
each with their scores, never keys and never a score a token. Merging the exact best of each gives the exact best of
all, and a key scores the same bits wherever it lies, so the selection is that of one device, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from hisa_jax import checks, prepare, stages, topk, xla
from hisa_jax.keys import Contiguous, Keys
from hisa_jax.methods import BlockSparse, Dsa, Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection
from hisa_jax.stages import Candidates, Queries


def select_sharded(
    q: Array,
    k: Array | QuantizedKeys,
    w: Array,
    method: Method,
    *,
    mesh: Mesh,
    context_axis: str,
    data_axis: str | None = None,
    query_positions: Array | None = None,
    lengths: Array | None = None,
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """`select` with the keys sharded over a mesh axis (implementation "xla").

    Args:
        q, w, method, query_positions, lengths, return_scores, return_blocks, tiles: as for `select`.
        k: [B, S, D] or `QuantizedKeys`; S is a multiple of the devices of `context_axis` times the block size.
        mesh: where it runs.
        context_axis: the mesh axis that splits S, in order.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.

    Returns: what `select` returns, bit for bit; the same on all devices of `context_axis`.
    Raises: as `select`; ValueError: a mesh without the axis, shapes that it does not split.
    Example:
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> q, k, w = jnp.ones((1, 2, 4, 32)), jnp.ones((1, 256, 32)), jnp.ones((1, 2, 4))
        >>> hj.select_sharded(q, k, w, hj.Dsa(topk=4), mesh=mesh, context_axis="context").indices.shape
        (1, 2, 4)
    """
    call = "select_sharded"
    keys = prepare.keys_of(k)
    prepare.check_dtypes(call, q, keys, w)
    checks.shape(call, "q", q, ("B", "T", "H", "D"))
    B, T, H, D = q.shape
    checks.shape(
        call, "k", keys.values, (B, "S", D), f"its first and last axes must equal q's (q is {prepare.axes_of(q)})"
    )
    S = keys.values.shape[1]
    if keys.scales is not None:
        checks.shape(call, "k.scales", keys.scales, (B, S), "one scale a key")
    checks.shape(call, "w", w, (B, T, H), f"one weight a query and head (q is {prepare.axes_of(q)})")
    prepare.choose(call, prepare.problem_of(q, keys, method), "xla", return_blocks, tiles)
    for name, axis, size, unit in (
        ("context_axis", context_axis, S, 1 if isinstance(method, Dsa) else method.block_size),
        ("data_axis", data_axis, B, 1),
    ):
        if axis is None:
            continue
        if axis not in mesh.axis_names:
            raise ValueError(f"{call}: {name}={axis!r}, wanted one of the mesh's axes {mesh.axis_names}")
        if size % (mesh.shape[axis] * unit):
            what = f"k's S = {size}" if axis == context_axis else f"B = {size}"
            raise ValueError(f"{call}: {what}, wanted a multiple of {mesh.shape[axis] * unit} for {name}={axis!r}")
    lengths = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    if query_positions is None:
        query_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = prepare.visible_tokens(query_positions, lengths[:, None])
    if 0 in (B, T, S):
        return prepare.nothing((B, T), method, return_scores, return_blocks)

    rows, split = PartitionSpec(data_axis), PartitionSpec(data_axis, context_axis)
    local = functools.partial(
        _select,
        method=method,
        tiles=tiles or prepare.default_tiles(),
        axis=context_axis,
        n_devices=mesh.shape[context_axis],
        return_scores=return_scores,
        return_blocks=return_blocks,
    )
    # Automatic axes: the caller's arrays may lie anywhere, and are moved to where the specs want them.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    # That what was gathered is the same everywhere is known here, not to the checker.
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, split, rows, rows, rows), out_specs=rows, check_vma=False)
    return jax.jit(run)(*prepare.constants(q, keys, w), visible, lengths)


def _select(
    q: Array,
    keys: Keys,
    w: Array,
    visible: Array,
    lengths: Array,
    *,
    method: Method,
    tiles: xla.Tiles,
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
        method,
        min(tiles.queries, T),
        return_scores,
        return_blocks,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(B, T, *leaf.shape[1:]), selection)
