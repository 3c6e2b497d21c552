"""Sparse attention where the latents of each sequence lie in equal runs over a mesh axis, the queries on all.

Each device attends to the selected tokens that it owns. What they exchange is a sum of value_dim floats a query and
head, weighted by the devices' logsumexps, never latents.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from hisa_jax.attention import check_batch, check_options, sparse_mla, with_sink
from hisa_jax.sharded import meshes


def sparse_mla_sharded(
    q: Array,
    kv: Array,
    indices: Array,
    *,
    mesh: Mesh,
    context_axis: str,
    data_axis: str | None = None,
    scale: float,
    value_dim: int = 512,
    sink: Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """`sparse_mla` with the latents sharded over a mesh axis, after `select_sharded`.

    Args:
        q, indices, scale, value_dim, sink, return_lse, implementation: as for `sparse_mla`.
        kv: [B, S, Dk]; S is a multiple of the devices of `context_axis`.
        mesh: where it runs.
        context_axis: the mesh axis that splits S, in order.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.

    Returns: what `sparse_mla` returns, up to rounding, the same on all devices of `context_axis`; each one's part is
        rounded to q's dtype before the merge. 4 * N * (value_dim + 2) bytes a query are reduced over them.
    Raises: as `sparse_mla`; ValueError: a mesh without the axis, shapes that it does not split.
    Example:
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> q, kv, indices = jnp.ones((1, 2, 4, 24)), jnp.ones((1, 8, 24)), jnp.array([[[0, 3], [5, -1]]])
        >>> options = dict(mesh=mesh, context_axis="context", value_dim=16, scale=24**-0.5)
        >>> hj.sparse_mla_sharded(q, kv, indices, **options).shape
        (1, 2, 4, 16)
    """
    call = "sparse_mla_sharded"
    check_batch(call, q, kv, indices)
    scale, value_dim, name = check_options(call, q, scale, value_dim, sink, return_lse, implementation)
    meshes.check_axis(call, "context_axis", mesh, context_axis, kv.shape[1], "kv's S")
    if data_axis is not None:
        meshes.check_axis(call, "data_axis", mesh, data_axis, q.shape[0], "B")
    attend = functools.partial(sparse_mla, scale=scale, value_dim=value_dim, return_lse=True, implementation=name)

    def local(q: Array, kv: Array, indices: Array) -> tuple[Array, Array]:
        S = kv.shape[1]
        first = lax.axis_index(context_axis) * S
        own = jnp.where((indices >= first) & (indices < first + S), indices - first, -1)
        out, lse = attend(q, kv, own)
        return merge(out, lse, context_axis)

    rows, split = PartitionSpec(data_axis), PartitionSpec(data_axis, context_axis)
    run = jax.shard_map(
        local, mesh=meshes.automatic(mesh), in_specs=(rows, split, rows), out_specs=rows, check_vma=False
    )
    out, lse = jax.jit(run)(q, kv, indices)
    out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def merge(out: Array, lse: Array, axis: str) -> tuple[Array, Array]:
    """Attention to all tokens from that to each device's own, [B, T, N, V] and [B, T, N] float32; inside shard_map."""
    # What is taken off every logsumexp changes no result, so no gradient goes through it.
    highest = lax.pmax(lax.stop_gradient(lse), axis)
    # Where nobody has a token every logsumexp is -inf: 0 stands for it, so that the weights are 0 and not NaN.
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(highest), 0, highest))
    # One reduction: the weights ride behind the values.
    parts = jnp.concatenate([out.astype(jnp.float32) * weight[..., None], weight[..., None]], axis=-1)
    total = lax.psum(parts, axis)
    values, weights = total[..., :-1], total[..., -1]
    merged = values / jnp.where(weights > 0, weights, 1)[..., None]
    return merged.astype(out.dtype), highest + jnp.log(weights)
