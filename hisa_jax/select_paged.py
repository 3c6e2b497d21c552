"""Selection from a paged cache, on one device or on a mesh."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hisa_jax import checks, dispatch, entries
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.check_select import check_limits, check_paged, check_stripe, weights
from hisa_jax.index_cache import IndexCache, has_all_pages
from hisa_jax.layout import Call, Limits, ascending, last_visible
from hisa_jax.methods import Method
from hisa_jax.selection import Selection
from hisa_jax.sharded import gathered, meshes, varying
from hisa_jax.sharded import select_paged as on_mesh
from hisa_jax.sharded.stripes import Shard
from hisa_jax.xla import select as xla


def select_paged(
    q: Array,
    w: Array | None,
    cache: IndexCache,
    block_tables: Array,
    cu_seqlens_q: Array,
    lengths: Array,
    method: Method,
    *,
    candidates: CandidateBlocks | None = None,
    budget: Array | None = None,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    query_axis: str | None = None,
    data_axis: str | None = None,
    stripe: int | None = None,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses tokens for a batch of requests whose keys are in pages: prefill chunks and decode steps, mixed.

    The queries of request r are the last of its `lengths[r]` tokens, whose keys `append` has written before. A request
    whose table lacks a page of these tokens (an entry outside of [0, n_pages), a page of fewer tokens or of another
    page index, so also one named twice, or a length beyond the table) selects nothing.

    Args:
        q: [T, H, D] index queries of all requests, one request's after the other's; any number of each, 0 too.
        w: [T, H] float32, every scale factor in them, or None.
        cache: the pages of all requests.
        block_tables: [R, P] int32, the pages of each request in order. Entries past its last token are ignored.
        cu_seqlens_q: [R + 1] int32, where each request's queries begin, from 0, ascending.
        lengths: [R] int32, tokens of each request, the queries among them.
        method: of the cache's `entry_size`; where block means choose, blocks are whole pages.
        candidates: [T, m], or with `per_head` [T, H, m]; budget: [T] int32, or [1]; both as for `select`.
        mesh: run it on these devices; None: on one. Over `context_axis` each device scores the blocks and tokens whose
            pages it has, and devices exchange candidates. For many queries pages are gathered and queries shared out
            instead, where that is fewer bytes. Over `query_axis` each device indexes an equal share of the queries,
            from all pages, and selections are gathered, 4 bytes a chosen token: for ranks of tensor parallelism, which
            would all do the same. Both axes may be used together.
        context_axis: the mesh axis that splits the cache's pages, page p on device p // (n_pages / devices). None:
            every device has all.
        query_axis: the mesh axis that splits the queries, any number of them; None: every device has all.
        data_axis: the mesh axis whose devices are groups of their own, alone or beside the others, as for `append`:
            every array is those of the groups, one after the other in equal parts, and so is the selection.
        stripe: tokens in a row that one device of `context_axis` has, whole blocks: page i of a request must lie on
            device i * page_size // stripe % devices, else the request selects nothing. Default: the method's block
            size, or a page where that is larger; a page for `Dsa`.
        implementation, return_scores, return_blocks, tiles: as for `select`.

    Returns: `Selection` of [T] queries; `indices` are positions in the request, bit for bit those of `select` over the
        same keys in one piece (implementation "xla"), the same on all devices of a mesh.
    Raises: as `select`; ValueError: a block that is not whole pages, a stripe that is not whole blocks.
    Source: as `select`; pages as in PagedAttention, arXiv 2309.06180.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2, 0]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((20, 8)), table, jnp.array([0, 20]), jnp.array([0]))
        >>> q, w, one = jnp.ones((1, 4, 8)), jnp.ones((1, 4)), jnp.array([0, 1])
        >>> hj.select_paged(q, w, cache, table, one, jnp.array([20]), hj.Dsa(topk=8)).indices.tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
        >>> mesh, arrays = jax.make_mesh((1,), ("context",)), (cache, table, one, jnp.array([20]))
        >>> hj.select_paged(q, w, *arrays, hj.Dsa(topk=4), mesh=mesh, context_axis="context").indices.tolist()
        [[0, 1, 2, 3]]
    """
    call = "select_paged"
    arrays: Any = dict(block_tables=block_tables, cu_seqlens_q=cu_seqlens_q, lengths=lengths)
    over = dict(context_axis=context_axis, query_axis=query_axis, data_axis=data_axis)
    meshes.check_arrays(call, mesh, over, q=q, w=w, cache=cache, **arrays, candidates=candidates, budget=budget)
    n_groups = meshes.groups(call, mesh, data_axis, q=q, w=w, cache=cache, **arrays)
    check_paged(call, q, w, cache, **arrays, method=method, n_groups=n_groups)
    candidates, budget = check_limits(call, q, method, candidates, budget, (1,))
    stripe = check_stripe(call, method, cache, stripe, context_axis, candidates)
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    axes = None if mesh is None else meshes.page_axes(call, mesh, over, cache, n_groups)
    n_pages, shard = cache.n_pages // n_groups, None
    if axes is not None and axes.context is not None:
        S = block_tables.shape[1] * cache.page_size
        shard = Shard(axes.context, axes.n_devices, stripe // method.entry_size, S)
        index = dataclasses.replace(cache, latents=None)
        n_bytes = gathered.nbytes(index) // cache.n_pages * block_tables.size
        if axes.queries is None and gathered.of_keys(n_bytes, q, method):
            cache, block_tables = gathered.pages_of_all(index, block_tables, axes, shard)
            axes, shard = axes._replace(context=None, queries=axes.context), None
    is_split, limits = shard is not None, Limits(candidates, budget)
    problem = dispatch.Problem.of_pages(
        q, cache, block_tables, method, is_split=is_split, n_groups=n_groups, limits=limits
    )
    name = dispatch.choose_select(call, problem, implementation, tiles, **options)
    T, tiles = q.shape[0], tiles or dispatch.default_tiles()

    run, seen = dispatch.IMPLEMENTATIONS[name].select, jnp.zeros((T,), jnp.int32)
    offsets = jnp.clip(cu_seqlens_q, 0, T)
    if axes is not None:
        run = functools.partial(on_mesh.select_pages, name, axes, shard)
    if 0 not in (T, *block_tables.shape):
        if axes is None:
            offsets = ascending(offsets, T)
            has_pages = has_all_pages(cache, block_tables, lengths // method.entry_size)
            seen = last_visible(offsets, jnp.where(has_pages, lengths, 0), T)
        else:
            has_pages, seen = on_mesh.seen_tokens(axes, shard, cache, block_tables, offsets, lengths, T)
        check_pages(call, has_pages, n_pages)
    paged = varying.constants(
        Call(
            q=q, w=weights(q, w), visible=seen, query_offsets=offsets, table=block_tables, cache=cache,
            candidates=candidates, budget=budget,
        )
    )  # fmt: skip
    return entries.choose(run, paged, method, tiles, **options)


def check_pages(call: str, has_pages: Array, n_pages: int) -> None:
    checks.value(
        has_pages,
        f"{call}: block_tables lacks pages of requests {{bad}}, wanted for every token one that was written for its "
        f"place, from 0 to {n_pages - 1}",
        bad=~has_pages,
    )
