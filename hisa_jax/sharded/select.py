"""Context parallelism: the keys of each sequence in equal runs of whole blocks over a mesh axis, the queries on all.

Each device scores its own blocks and its own tokens. Devices exchange candidates alone, m blocks and topk tokens of
each with their scores, never keys and never a score a token. Merging the exact best of each gives the exact best of
all. `context_xla.py` and `context_kernels.py` have what one device does.
"""

import functools

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from hisa_jax import dispatch, prepare
from hisa_jax.check_select import check_batch
from hisa_jax.methods import Dsa, Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection, nothing
from hisa_jax.sharded import meshes
from hisa_jax.xla import select


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
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: select.Tiles | None = None,
) -> Selection:
    """`select` with the keys sharded over a mesh axis.

    Args:
        q, w, method, query_positions, lengths, return_scores, return_blocks, tiles: as for `select`.
        implementation: "xla", "mosaic_tpu", or "auto", which takes the kernels where they can run.
        k: [B, S, D] or `QuantizedKeys`; S is a multiple of the devices of `context_axis` times the block size.
        mesh: where it runs.
        context_axis: the mesh axis that splits S, in order.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.

    Returns: what `select` returns, by "xla" bit for bit; the same on all devices of `context_axis`.
    Raises: as `select`; ValueError: a mesh without the axis, shapes that it does not split.
    Example:
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> q, k, w = jnp.ones((1, 2, 4, 32)), jnp.ones((1, 256, 32)), jnp.ones((1, 2, 4))
        >>> hj.select_sharded(q, k, w, hj.Dsa(topk=4), mesh=mesh, context_axis="context").indices.shape
        (1, 2, 4)
    """
    call = "select_sharded"
    keys = check_batch(call, q, k, w, query_positions, lengths)
    (B, T, _, _), S = q.shape, keys.values.shape[1]
    options = dict(return_scores=return_scores, return_blocks=return_blocks)
    problem = prepare.problem_of(q, keys, method)
    chosen = prepare.choose(call, problem, implementation, tiles, needs="select_sharded", **options)
    unit = 1 if isinstance(method, Dsa) else method.block_size
    n_devices = meshes.check_axis(call, "context_axis", mesh, context_axis, S, "k's S", unit)
    if data_axis is not None:
        meshes.check_axis(call, "data_axis", mesh, data_axis, B, "B")
    lengths = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    if query_positions is None:
        query_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = prepare.visible_tokens(query_positions, lengths[:, None])
    if 0 in (B, T, S):
        return nothing((B, T), method, return_scores, return_blocks)

    rows, split = PartitionSpec(data_axis), PartitionSpec(data_axis, context_axis)
    one_device = dispatch.IMPLEMENTATIONS[chosen].select_sharded
    assert one_device is not None  # else it would not have been chosen
    local = functools.partial(
        one_device,
        method=method,
        tiles=tiles or prepare.default_tiles(),
        axis=context_axis,
        n_devices=n_devices,
        **options,
    )
    run = meshes.on_devices(local, mesh, (rows, split, rows, rows, rows), rows)
    return run(*prepare.constants(q, keys, w, visible, lengths))
