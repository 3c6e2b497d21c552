"""Sparse multi-head latent attention over the selected tokens, on one device or a mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from hisa_jax import checks, dispatch, dispatch_stage
from hisa_jax.index_cache import IndexCache, check_cache
from hisa_jax.latents import QuantizedLatents, check_latents
from hisa_jax.layout import ascending, sequence_of_rows
from hisa_jax.sharded import attention as on_mesh
from hisa_jax.sharded import gathered, meshes, varying
from hisa_jax.xla import attention as xla


def sparse_mla(
    q: Array,
    kv: Array | QuantizedLatents,
    indices: Array,
    *,
    scale: float,
    value_dim: int = 512,
    sink: Array | None = None,
    return_lse: bool = False,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens of a latent cache that all heads share.

    out[t, n] = sum_s p[t, n, s] * kv[s, :value_dim],  p = softmax over the selected s of scale * q[t, n] . kv[s]

    Args:
        q: [B, T, N, Dk] absorbed queries (latent then rope part, 512 + 64 in DeepSeek-V3.2), bfloat16 or float32.
        kv: [B, S, Dk] latents and rope keys, same dtype; or `QuantizedLatents` of `value_dim`, which are what they are
            dequantised to, rounded to q's dtype: exact with scales that are powers of two.
        indices: [B, T, K] int32 positions in the sequence in any order, -1 wherever there is none. What lies outside of
            [0, S) counts as -1. A token listed twice counts twice: it has two shares of the softmax.
        scale: factor of the logits, a finite number.
        value_dim: the first `value_dim` of the Dk features are the values.
        sink: [N] float32, a logit per head that takes part in the softmax and has no value.
        return_lse: also return the logsumexp of the logits, without the sink, for merging partial results.
        mesh: run it on these devices, with the latents of each sequence split over them, after `select` on the same
            mesh; None: on one.
        context_axis: the mesh axis that splits S, in order, which must be a multiple of its devices.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.
        implementation: of the forward pass: "mosaic_gpu", "triton", "mosaic_tpu", "xla", or "auto" as for `select`. The
            backward pass is XLA's.

    Returns: [B, T, N, value_dim] in q's dtype, zeros where nothing is selected; with `return_lse` also [B, T, N]
        float32, -inf there. Differentiable in `q`, `kv` and `sink` by reverse mode, `return_lse` too; the gradient to
        `QuantizedLatents` is 0. What a row holds that a query does not select, NaN too, changes no bit of the query's
        output or of any gradient, and the row's own gradient from it is 0. With a mesh the same up to rounding, on all
        devices of `context_axis`: each device's part is rounded to q's dtype, and a sum of 4 * N * (value_dim + 2)
        bytes a query goes over them; of many queries, parts and results in q's dtype; where kv is fewer bytes than
        the output, kv goes to all, and results of shares of the queries.
    Raises: TypeError: a dtype or a number not listed above. ValueError: shapes that do not fit; a scale that is not
        finite; an implementation that cannot run here; a mesh without the axes, or whose axes do not split the shapes.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (absorbed form); the sink as in FlashMLA.
    Example:
        >>> q, kv, indices = jnp.ones((1, 2, 4, 24)), jnp.ones((1, 8, 24)), jnp.array([[[0, 3], [5, -1]]])
        >>> hj.sparse_mla(q, kv, indices, value_dim=16, scale=24**-0.5).shape
        (1, 2, 4, 16)
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> hj.sparse_mla(q, kv, indices, value_dim=16, scale=24**-0.5, mesh=mesh, context_axis="context").shape
        (1, 2, 4, 16)
    """
    call = "sparse_mla"
    axes = dict(context_axis=context_axis, data_axis=data_axis)
    meshes.check_arrays(call, mesh, axes, q=q, kv=kv, indices=indices, sink=sink)
    check_batch(call, q, kv, indices)
    scale, value_dim = check_numbers(call, scale, value_dim, q.shape[-1])
    n_devices, is_gathered = 1, False
    if mesh is not None:
        split = meshes.batch_axes(call, mesh, context_axis, data_axis, "kv's S", kv.shape[1], q.shape[0])
        out_bytes = math.prod(q.shape[:-1]) * value_dim * q.dtype.itemsize
        is_gathered = gathered.of_latents(gathered.nbytes(kv), out_bytes)
        n_devices = 1 if is_gathered else split.n_devices
    attend = _checked_attention(call, q, kv, scale, value_dim, sink, return_lse, implementation, n_devices=n_devices)
    if mesh is not None:
        attend = functools.partial(on_mesh.attend_batch, attend, split, is_gathered)
    out, lse = attend(q, kv, indices)
    return _result(out, lse, sink, return_lse)


def sparse_mla_paged(
    q: Array,
    cache: IndexCache,
    indices: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    *,
    scale: float,
    value_dim: int = 512,
    sink: Array | None = None,
    return_lse: bool = False,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    head_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens, whose latents are in the pages of the cache.

    Args:
        q: [T, N, Dk] absorbed queries of all requests, as `select_paged` has them, in the dtype of the latents;
            bfloat16 or float32 where those are quantised.
        cache: with `latents`.
        indices: [T, K] int32, of `select_paged`, or any others as for `sparse_mla`: positions in the request. One that
            the request's table has no page for counts as -1.
        block_tables, cu_seqlens_q: as for `select_paged`; of any page size, pages in any order. Rows of q that are no
            request's select nothing.
        mesh, context_axis: run it on a mesh whose axis splits the cache's pages, in order; any page may lie anywhere.
        head_axis: the mesh axis that splits N, q's heads; nothing passes over it.
        data_axis: the mesh axis whose devices are groups of their own, as for `select_paged`. Any of the three will do.
        scale, value_dim, sink, return_lse, implementation: as for `sparse_mla`.

    Returns: [T, N, value_dim] in q's dtype; with `return_lse` also [T, N] float32. What the pages hold besides
        the selected tokens changes no bit of it. With a mesh as `sparse_mla`.
    Raises: as `sparse_mla`; ValueError: a cache without latents.
    Example:
        >>> cache = hj.init_cache(2, 16, D=0, dtype=jnp.float32, latent_dim=24, latent_dtype=jnp.float32)
        >>> q, indices = jnp.ones((2, 4, 24)), jnp.array([[0, 3], [5, -1]])
        >>> table, offsets = jnp.array([[1]], jnp.int32), jnp.array([0, 2])
        >>> hj.sparse_mla_paged(q, cache, indices, table, offsets, value_dim=16, scale=24**-0.5).shape
        (2, 4, 16)
    """
    call = "sparse_mla_paged"
    arrays: Any = dict(q=q, cache=cache, indices=indices, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q)
    over = dict(context_axis=context_axis, head_axis=head_axis, data_axis=data_axis)
    meshes.check_arrays(call, mesh, over, **arrays, sink=sink)
    n_groups = meshes.groups(call, mesh, data_axis, **arrays)
    check_paged(call, **arrays, n_groups=n_groups)
    axes = None if mesh is None else meshes.page_axes(call, mesh, over, cache, n_groups, q.shape[1])
    n_shares, n_devices = (1, 1) if axes is None else (axes.size(axes.heads), axes.n_devices)
    assert cache.latents is not None  # as has been checked
    attend = _checked_attention(
        call, q, cache.latents, scale, value_dim, sink, return_lse, implementation, n_shares, n_devices
    )
    check_rows(call, cache, indices, block_tables, cu_seqlens_q, n_groups)

    def attend_pages(q: Array, cache: IndexCache, table: Array, indices: Array, offsets: Array) -> tuple[Array, Array]:
        assert cache.latents is not None
        rows = latent_rows(cache, indices, table, offsets)
        latents = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[2]), cache.latents)
        out, lse = attend(q[None], latents, rows[None])
        return out[0], lse[0]

    run = attend_pages if axes is None else functools.partial(on_mesh.attend_pages, attend_pages, axes)
    return _result(*run(q, cache, block_tables, indices, cu_seqlens_q), sink, return_lse)


def _result(out: Array, lse: Array, sink: Array | None, return_lse: bool) -> Array | tuple[Array, Array]:
    out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def _checked_attention(
    call: str, q: Array, kv: Array | QuantizedLatents, scale: float, value_dim: int, sink: Array | None,
    return_lse: bool, implementation: str, n_shares: int = 1, n_devices: int = 1,
) -> Any:  # fmt: skip
    """What all forms take besides arrays: raises if it does not fit. Returns (q, kv, indices) -> (out, lse).

    Args:
        n_shares: so many devices have an equal share of the heads each; n_devices: of the tokens, more or less.
    """
    scale, value_dim = check_numbers(call, scale, value_dim, q.shape[-1])
    check_sink(call, sink, q)
    checks.flags(call, return_lse=return_lse)
    is_quantized = isinstance(kv, QuantizedLatents)
    if isinstance(kv, QuantizedLatents) and kv.value_dim != value_dim:
        raise ValueError(f"{call}: value_dim={value_dim}, wanted {kv.value_dim}, as the latents are quantised")
    N = q.shape[-2] // n_shares
    problem = dispatch_stage.AttentionProblem(
        N=N, key_dim=q.shape[-1], value_dim=value_dim, dtype=q.dtype.name, is_quantized=is_quantized
    )
    name = dispatch.choose(call, implementation, dispatch_stage.attention_reasons(dispatch.Device.default(), problem))

    def attend(q: Array, kv: Array | QuantizedLatents, indices: Array) -> tuple[Array, Array]:
        (B, T, N, _), S = q.shape, kv.shape[1]
        if 0 in (B, T, S, N, indices.shape[2]):
            return jnp.zeros((B, T, N, value_dim), q.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
        part = on_mesh.part_of(indices.shape[2], n_devices)
        return _attend(*varying.alike(q, kv, indices), scale, value_dim, name, part)

    return attend


def check_batch(call: str, q: Array, kv: Array | QuantizedLatents, indices: Array) -> None:
    """Raises unless the arrays of `sparse_mla` fit each other."""
    checks.dtype(call, "q", q, ("bfloat16", "float32"))
    if not isinstance(kv, QuantizedLatents):
        checks.dtype(call, "kv", kv, (q.dtype.name,))
    checks.shape(call, "q", q, ("B", "T", "N", "Dk"))
    B, T, _, Dk = q.shape
    why = f"its first and last axes must equal q's B and Dk (q is {list(q.shape)})"
    check_latents(call, "kv", kv, (B, "S"), why)
    checks.shape(call, "kv", kv, (B, "S", Dk), why)
    checks.int32(call, "indices", indices, (B, T, "K"), f"one list a query (q is {list(q.shape)})")
    checks.value(
        (indices >= -1) & (indices < kv.shape[1]),
        f"{call}: indices range from {{least}} to {{most}}, wanted -1 to {kv.shape[1] - 1}",
        least=jnp.min(indices, initial=-1),
        most=jnp.max(indices, initial=-1),
    )


def check_paged(
    call: str,
    q: Array,
    cache: IndexCache,
    indices: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    n_groups: int = 1,
) -> None:
    """Raises unless the arrays of `sparse_mla_paged` fit each other."""
    check_cache(call, cache)
    if cache.latents is None:
        raise ValueError(f"{call}: cache has no latents, wanted one of init_cache(..., latent_dim=Dk)")
    checks.dtype(call, "q", q, ("bfloat16", "float32"))
    checks.shape(
        call, "q", q, ("T", "N", cache.latents.shape[2]), "its last axis must equal that of the cache's latents"
    )
    if not isinstance(cache.latents, QuantizedLatents):
        checks.dtype(call, "cache.latents", cache.latents, (q.dtype.name,))
    checks.int32(call, "indices", indices, (q.shape[0], "K"), f"one list a query (q is {checks.axes_of(q)})")
    checks.int32(call, "block_tables", block_tables, ("R", "P"))
    R = block_tables.shape[0]
    why = "a start for each request, and the end" + (" of each group" if n_groups > 1 else "")
    checks.offsets(call, "cu_seqlens_q", cu_seqlens_q, (R + n_groups,), q.shape[0], why, n_groups)


def check_rows(
    call: str, cache: IndexCache, indices: Array, block_tables: Array, cu_seqlens_q: Array, n_groups: int
) -> None:  # fmt: skip
    """Under `checked` raises unless every chosen position of a request has a row, as `latent_rows` finds them."""
    if not checks.checks_values():
        return
    T, n_pages = indices.shape[0] // n_groups, cache.n_pages // n_groups

    def is_wrong(indices: Array, table: Array, offsets: Array) -> Array:
        rows = rows_of_pages(n_pages, cache.page_size, indices, table, offsets)
        _, is_real = sequence_of_rows(ascending(offsets, T), T)
        return jnp.any((indices != -1) & (rows < 0) & is_real[:, None], axis=1)

    arrays = (jnp.asarray(x) for x in (indices, block_tables, cu_seqlens_q))
    bad = jax.vmap(is_wrong)(*(x.reshape(n_groups, -1, *x.shape[1:]) for x in arrays)).reshape(-1)
    checks.value(
        ~bad,
        f"{call}: rows {{bad}} of q select what has no page, wanted -1 or positions whose page block_tables names, one "
        f"of 0 to {n_pages - 1}",
        bad=bad,
    )


def latent_rows(cache: IndexCache, indices: Array, block_tables: Array, cu_seqlens_q: Array) -> Array:
    """[T, K] positions in requests -> [T, K] int32 rows of the cache's latents in one piece, -1 where there is none."""
    return rows_of_pages(cache.n_pages, cache.page_size, indices, block_tables, cu_seqlens_q)


def rows_of_pages(n_pages: int, size: int, indices: Array, block_tables: Array, cu_seqlens_q: Array) -> Array:
    """[T, K] positions in requests -> [T, K] int32 rows of all pages, of `size` rows each, or -1: there is none."""
    if 0 in block_tables.shape:
        return jnp.full(indices.shape, -1, jnp.int32)
    P, T = block_tables.shape[1], indices.shape[0]
    r, is_real = sequence_of_rows(ascending(cu_seqlens_q, T), T)
    page_index = indices // size
    page = block_tables[r[:, None], jnp.clip(page_index, 0, P - 1)]
    is_there = is_real[:, None] & (indices >= 0) & (page_index < P) & (page >= 0) & (page < n_pages)
    return jnp.where(is_there, page * size + indices % size, -1)


def check_numbers(call: str, scale: float, value_dim: int, Dk: int) -> tuple[float, int]:
    """The static numbers of a call as Python's own, which promote no dtype; raises if they are none or out of range."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number):
        raise TypeError(f"{call}: scale is {type(scale).__name__}, wanted a number known at trace time")
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{call}: scale={scale}, wanted a finite float32 number")
    if isinstance(value_dim, bool) or not isinstance(value_dim, int | np.integer):
        raise TypeError(f"{call}: value_dim is {type(value_dim).__name__}, wanted a whole number")
    if not 1 <= value_dim <= Dk:
        raise ValueError(f"{call}: value_dim={value_dim}, wanted 1 to Dk = {Dk}")
    return float(scale), int(value_dim)


def check_sink(call: str, sink: Array | None, q: Array) -> None:
    """Raises unless a sink is None or has one logit for each head of q [..., N, Dk]."""
    if sink is not None:
        checks.dtype(call, "sink", sink, ("float32",))
        checks.shape(call, "sink", sink, (q.shape[-2],), f"one logit a head (q is {list(q.shape)})")


def with_sink(out: Array, lse: Array, sink: Array | None) -> Array:
    """[..., N, V], [..., N], [N] or None -> [..., N, V]: a logit without a value in addition to those of the tokens."""
    if sink is None:
        return out
    # Where nothing is selected `out` is 0, whatever is kept of it; with a sink of -inf the difference would be NaN.
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    # What the sink takes from every value: 1 - exp(lse) / (exp(lse) + exp(sink)).
    kept = jax.nn.sigmoid(lse - sink.reshape((1,) * (lse.ndim - 1) + sink.shape))
    return (out * kept[..., None]).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attend(
    q: Array, kv: Array | QuantizedLatents, indices: Array, scale: float, value_dim: int, implementation: str,
    part: int | None,
) -> tuple[Array, Array]:  # fmt: skip
    """[B, T, N, Dk], [B, S, Dk], [B, T, K] -> [B, T, N, value_dim], [B, T, N] float32; `part` entries at a time."""
    forward = xla.forward if implementation == "xla" else dispatch_stage.attention(implementation)
    forward = functools.partial(forward, scale=scale, value_dim=value_dim)
    return forward(q, kv, indices) if part is None else on_mesh.attend_in_parts(forward, part, q, kv, indices)


def _attend_forward(
    q: Array, kv: Array | QuantizedLatents, indices: Array, scale: float, value_dim: int, implementation: str,
    part: int | None,
) -> Any:  # fmt: skip
    out, lse = _attend(q, kv, indices, scale, value_dim, implementation, part)
    return (out, lse), (q, kv, indices, out, lse)


def _attend_backward(
    scale: float,
    value_dim: int,
    implementation: str,
    part: int | None,
    saved: tuple,
    gradients: tuple[Array, Array],
) -> tuple[Array, Array | QuantizedLatents, None]:
    return *xla.backward(scale, value_dim, saved, gradients), None


_attend.defvjp(_attend_forward, _attend_backward)
