"""Selection from pages on several devices: the pages of each request dealt out, its queries dealt out, or both.

Arrays are those of `select_paged`, the cache with its pages split over a mesh axis: page p lies on device
p // (n_pages / devices). The blocks of a request go round the devices, so that requests of any length are balanced.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from hisa_jax import checks, dispatch, prepare
from hisa_jax.attention import check_options, with_sink
from hisa_jax.cache import IndexCache
from hisa_jax.check_select import check_paged
from hisa_jax.methods import Dsa, Method
from hisa_jax.select_paged import (
    attend,
    check_attention,
    check_pages,
    check_rows,
    has_all_pages,
    holds_tokens,
    latent_rows,
    problem_of,
    visible_tokens,
)
from hisa_jax.selection import Selection, nothing
from hisa_jax.sharded import attention
from hisa_jax.sharded.cache import PAGES, own_ids
from hisa_jax.sharded.meshes import check_axis, on_devices
from hisa_jax.sharded.stripes import Stripes
from hisa_jax.xla import select as xla


def select_paged_sharded(
    q: Array,
    w: Array,
    cache: IndexCache,
    block_tables: Array,
    cu_seqlens_q: Array,
    lengths: Array,
    method: Method,
    *,
    mesh: Mesh,
    context_axis: str | None = None,
    query_axis: str | None = None,
    stripe: int | None = None,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """`select_paged` on several devices.

    Over `context_axis` each device scores the blocks and tokens whose pages it has, and devices exchange candidates.
    Over `query_axis` each device indexes an equal share of the queries, from all pages, and selections are gathered, 4
    bytes a chosen token: for ranks of tensor parallelism, which would all do the same. Both axes may be used together.

    Args:
        q, w, cache, block_tables, cu_seqlens_q, lengths, method: as for `select_paged`; T need not divide.
        mesh: where it runs.
        context_axis: the mesh axis that splits the cache's pages; None: every device has all.
        query_axis: the mesh axis that splits the queries; None: every device has all.
        stripe: tokens in a row that one device of `context_axis` has, whole blocks: page i of a request lies on device
            i * page_size // stripe % devices. Default: the method's block size; a page for `Dsa`.
        implementation: as for `select_paged`; "xla" alone takes a `context_axis`.
        return_scores, return_blocks, tiles: as for `select_paged`.

    Returns: what `select_paged` returns, by "xla" bit for bit; the same on all devices. A request of which a page lies
        on another device than its place wants selects nothing.
    Raises: as `select_paged`; ValueError: a mesh without the axes, pages that the axis does not split, a stripe that is
        not whole blocks.
    Example:
        >>> mesh, table = jax.make_mesh((1,), ("context",)), jnp.array([[2, 0]], jnp.int32)
        >>> cache = hj.init_cache(4, 16, D=8, dtype=jnp.float32)
        >>> cache = hj.append(cache, jnp.ones((20, 8)), table, jnp.array([0, 20]), jnp.array([0]))
        >>> arrays = jnp.ones((1, 4, 8)), jnp.ones((1, 4)), cache, table, jnp.array([0, 1]), jnp.array([20])
        >>> hj.select_paged_sharded(*arrays, hj.Dsa(topk=4), mesh=mesh, context_axis="context").indices.tolist()
        [[0, 1, 2, 3]]
    """
    call = "select_paged_sharded"
    check_paged(call, q, w, cache, block_tables, cu_seqlens_q, lengths, method)
    problem = problem_of(q, cache, block_tables, method)
    options = dict(return_scores=return_scores, return_blocks=return_blocks)
    needs = "select_paged" if context_axis is None else "select_paged_sharded"
    name = prepare.choose(call, problem, implementation, tiles, needs=needs, **options)
    if context_axis is None and query_axis is None:
        raise ValueError(f"{call}: context_axis=None and query_axis=None, wanted one of the mesh's axes for either")
    n_devices = n_shares = 1
    if context_axis is not None:
        n_devices = check_axis(call, "context_axis", mesh, context_axis, cache.n_pages, PAGES)
    if query_axis is not None:
        n_shares = check_axis(call, "query_axis", mesh, query_axis, 0, "")  # any number of queries
    unit = cache.page_size if isinstance(method, Dsa) else max(method.block_size, cache.page_size)
    stripe = unit if stripe is None else stripe
    checks.integer(call, "stripe", stripe, 1)
    if stripe % unit:
        raise ValueError(f"{call}: stripe={stripe}, wanted a multiple of {unit}, of whole blocks or pages of {method}")
    T = q.shape[0]
    if 0 in (T, *block_tables.shape):
        return nothing((T,), method, return_scores, return_blocks)

    select: Any = getattr(dispatch.IMPLEMENTATIONS[name], needs)
    if context_axis is not None:
        select = functools.partial(
            select,
            axis=context_axis,
            n_devices=n_devices,
            stripe=stripe,
            max_keys=problem.S,
        )

    def one_device(
        q: Array, w: Array, cache: IndexCache, block_tables: Array, cu_seqlens_q: Array, lengths: Array
    ) -> tuple[Selection, Array]:
        if context_axis is None:
            pages, has_pages = block_tables, has_all_pages(cache, block_tables, lengths)
        else:
            pages, has_pages = _own_pages(cache, block_tables, lengths, stripe, n_devices, context_axis)
        lengths = jnp.where(has_pages, lengths, 0)
        if query_axis is not None:
            cu_seqlens_q = lax.cummax(jnp.clip(cu_seqlens_q, 0, T))
            cu_seqlens_q, lengths = _own_queries(cu_seqlens_q, lengths, q.shape[0], query_axis)
        cu_seqlens_q, visible = visible_tokens(cu_seqlens_q, lengths, q.shape[0])
        selection = select(
            q, w, visible, cache, pages, cu_seqlens_q, method, tiles or prepare.default_tiles(), **options
        )
        if query_axis is not None:
            selection = jax.tree.map(lambda x: lax.all_gather(x, query_axis, axis=0, tiled=True), selection)
        return selection, has_pages

    missing = -T % n_shares
    rows = (jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for x in (jnp.asarray(q), jnp.asarray(w)))
    queries, split, all_of_it = PartitionSpec(query_axis), PartitionSpec(context_axis), PartitionSpec()
    run = on_devices(one_device, mesh, (queries, queries, split, all_of_it, all_of_it, all_of_it), all_of_it)
    arrays = jax.tree.map(lax.stop_gradient, (*rows, cache))
    selection, has_pages = run(*arrays, block_tables, cu_seqlens_q, lengths)
    check_pages(call, has_pages, cache)
    return jax.tree.map(lambda x: x[:T], selection)


def _own_pages(
    cache: IndexCache, block_tables: Array, lengths: Array, stripe: int, n_devices: int, axis: str
) -> tuple[Array, Array]:
    """This device's pages of each request, [R, P / n_devices], and [R] bool, whether no device lacks one."""
    dealt = Stripes(stripe // cache.page_size, n_devices, lax.axis_index(axis))
    pages = own_ids(cache, dealt.columns(block_tables), axis)
    holds = holds_tokens(cache, pages, dealt.place(jnp.arange(pages.shape[1], dtype=jnp.int32)), lengths)
    is_lacking = lax.psum(~holds, axis) > 0
    return pages, ~is_lacking & (lengths <= block_tables.shape[1] * cache.page_size)


def _own_queries(cu_seqlens_q: Array, lengths: Array, t: int, axis: str) -> tuple[Array, Array]:
    """Offsets in this device's t rows, [R + 1], and [R] lengths of which its queries are the last tokens."""
    first = lax.axis_index(axis) * t
    behind = jnp.diff(jnp.maximum(cu_seqlens_q, first + t))  # queries of each request that are others'
    return jnp.clip(cu_seqlens_q - first, 0, t), lengths - behind


def sparse_mla_paged_sharded(
    q: Array,
    cache: IndexCache,
    indices: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    *,
    mesh: Mesh,
    context_axis: str,
    scale: float,
    value_dim: int = 512,
    sink: Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """`sparse_mla_paged` with the cache's pages split over a mesh axis, after `select_paged_sharded`.

    Args:
        q, cache, indices, block_tables, cu_seqlens_q: as for `sparse_mla_paged`; any page may lie anywhere.
        mesh: where it runs.
        context_axis: the mesh axis that splits the cache's pages, in order.
        scale, value_dim, sink, return_lse, implementation: as for `sparse_mla`.

    Returns: what `sparse_mla_paged` returns, up to rounding, the same on all devices. Each one attends to the selected
        tokens that it has; 4 * N * (value_dim + 2) bytes a query are reduced over them, as by `sparse_mla_sharded`.
    Raises: as `sparse_mla_paged`; ValueError: a mesh without the axis, pages that it does not split.
    Example:
        >>> mesh, table = jax.make_mesh((1,), ("context",)), jnp.array([[1]], jnp.int32)
        >>> cache = hj.init_cache(2, 16, D=0, dtype=jnp.float32, latent_dim=24, latent_dtype=jnp.float32)
        >>> arrays = jnp.ones((2, 4, 24)), cache, jnp.array([[0, 3], [5, -1]]), table, jnp.array([0, 2])
        >>> options = dict(mesh=mesh, context_axis="context", value_dim=16, scale=24**-0.5)
        >>> hj.sparse_mla_paged_sharded(*arrays, **options).shape
        (2, 4, 16)
    """
    call = "sparse_mla_paged_sharded"
    check_attention(call, q, cache, indices, block_tables, cu_seqlens_q)
    scale, value_dim, name = check_options(call, q, scale, value_dim, sink, return_lse, implementation)
    check_axis(call, "context_axis", mesh, context_axis, cache.n_pages, PAGES)
    rows = latent_rows(cache, indices, block_tables, cu_seqlens_q)  # for the check alone
    check_rows(call, cache, indices, rows, cu_seqlens_q)

    def one_device(
        q: Array, cache: IndexCache, indices: Array, block_tables: Array, cu_seqlens_q: Array
    ) -> tuple[Array, Array]:
        rows = latent_rows(cache, indices, own_ids(cache, block_tables, context_axis), cu_seqlens_q)
        out, lse = attend(q, cache, rows, scale, value_dim, None, True, name)
        return attention.merge(out, lse, context_axis)

    split, all_of_it = PartitionSpec(context_axis), PartitionSpec()
    run = on_devices(one_device, mesh, (all_of_it, split, all_of_it, all_of_it, all_of_it), all_of_it)
    out, lse = run(q, cache, indices, block_tables, cu_seqlens_q)
    out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out
