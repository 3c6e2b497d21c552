"""Selection from a paged cache, and the sparse attention over its latents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks, dispatch, prepare
from hisa_jax.attention import check_options, sparse_mla
from hisa_jax.cache import IndexCache, check_cache
from hisa_jax.check_select import check_paged
from hisa_jax.layout import Keys
from hisa_jax.methods import Method
from hisa_jax.selection import Selection, nothing
from hisa_jax.xla import select as xla


def select_paged(
    q: Array,
    w: Array,
    cache: IndexCache,
    block_tables: Array,
    cu_seqlens_q: Array,
    lengths: Array,
    method: Method,
    *,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses tokens for a batch of requests whose keys are in pages: prefill chunks and decode steps, mixed.

    The queries of request r are the last of its `lengths[r]` tokens, whose keys `append` has written before. A request
    whose table lacks a page of these tokens (an entry outside of [0, n_pages), a page of fewer tokens or of another
    place in a sequence, so also one named twice, or a length beyond the table) selects nothing.

    Args:
        q: [T, H, D] index queries of all requests, one request's behind the other's; any number of each, 0 too.
        w: [T, H] float32, every scale factor in them.
        cache: the pages of all requests.
        block_tables: [R, P] int32, the pages of each request in order. What is behind its tokens is not looked at.
        cu_seqlens_q: [R + 1] int32, where each request's queries begin, from 0, ascending.
        lengths: [R] int32, tokens of each request, the queries among them.
        method: `Hisa` and `BlockSparse` need a block_size that is a multiple of the page size.
        implementation, return_scores, return_blocks, tiles: as for `select`.

    Returns: `Selection` of [T] queries; `indices` are positions in the request, bit for bit those of `select` over the
        same keys in one piece (implementation "xla").
    Raises: as `select`; ValueError: a block that is not whole pages.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2, 0]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((20, 8)), table, jnp.array([0, 20]), jnp.array([0]))
        >>> q, w, one = jnp.ones((1, 4, 8)), jnp.ones((1, 4)), jnp.array([0, 1])
        >>> hj.select_paged(q, w, cache, table, one, jnp.array([20]), hj.Dsa(topk=8)).indices.tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    call = "select_paged"
    arrays = dict(block_tables=block_tables, cu_seqlens_q=cu_seqlens_q, lengths=lengths)
    checks.unsplit(call, q=q, w=w, cache=cache, **arrays)
    check_paged(call, q, w, cache, **arrays, method=method)
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    name = prepare.choose(call, problem_of(q, cache, block_tables, method), implementation, tiles, **options)
    T = q.shape[0]
    if 0 in (T, *block_tables.shape):
        return nothing((T,), method, return_scores, return_blocks)

    has_pages = has_all_pages(cache, block_tables, lengths)
    check_pages(call, has_pages, cache)
    cu_seqlens_q, visible = visible_tokens(cu_seqlens_q, jnp.where(has_pages, lengths, 0), T)
    select = dispatch.IMPLEMENTATIONS[name].select_paged
    assert select is not None
    return select(
        *prepare.constants(q, w, visible, cache, block_tables, cu_seqlens_q),
        method,
        tiles or prepare.default_tiles(),
        **options,
    )


def problem_of(q: Array, cache: IndexCache, block_tables: Array, method: Method) -> dispatch.Problem:
    problem, (R, P) = prepare.problem_of(q, Keys(cache.keys, None), method), block_tables.shape
    return dataclasses.replace(problem, S=P * cache.page_size, page_size=cache.page_size, n_requests=R)


def check_pages(call: str, has_pages: Array, cache: IndexCache) -> None:
    checks.value(
        has_pages,
        f"{call}: block_tables lacks pages of requests {{bad}}, wanted for every token one that was written for its "
        f"place, from 0 to {cache.n_pages - 1}",
        bad=~has_pages,
    )


def visible_tokens(cu_seqlens_q: Array, lengths: Array, T: int) -> tuple[Array, Array]:
    """[R + 1], [R] -> offsets that ascend within T, and [T] int32, how many tokens each query sees."""
    cu_seqlens_q, r, is_real = requests_of(cu_seqlens_q, T)
    row = jnp.arange(T, dtype=jnp.int32)
    positions = jnp.where(is_real, lengths[r] - (cu_seqlens_q[r + 1] - row), -1)
    return cu_seqlens_q, prepare.visible_tokens(positions, lengths[r])


def requests_of(cu_seqlens_q: Array, T: int) -> tuple[Array, Array, Array]:
    """[R + 1] -> offsets that ascend within T, [T] int32, the request of each row, and [T] bool, whether it has one."""
    R = cu_seqlens_q.shape[0] - 1
    cu_seqlens_q = lax.cummax(jnp.clip(cu_seqlens_q, 0, T))
    row = jnp.arange(T, dtype=jnp.int32)
    r = jnp.searchsorted(cu_seqlens_q, row, side="right", method="compare_all").astype(jnp.int32) - 1
    return cu_seqlens_q, jnp.clip(r, 0, R - 1), (r >= 0) & (r < R)


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
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens, whose latents are in the pages of the cache.

    Args:
        q: [T, N, Dk] absorbed queries of all requests, as `select_paged` has them, in the dtype of the latents.
        cache: with `latents`.
        indices: [T, K] int32, of `select_paged`, or any others as for `sparse_mla`: positions in the request. One that
            the request's table has no page for counts as -1.
        block_tables, cu_seqlens_q: as for `select_paged`; of any page size, pages in any order. Rows of q that are no
            request's select nothing.
        scale, value_dim, sink, return_lse, implementation: as for `sparse_mla`.

    Returns: [T, N, value_dim] in q's dtype; with `return_lse` also [T, N] float32. What the pages hold beside the
        selected tokens changes no bit of it.
    Raises: as `sparse_mla`; ValueError: a cache without latents.
    """
    call = "sparse_mla_paged"
    checks.unsplit(call, q=q, cache=cache, indices=indices, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q)
    check_attention(call, q, cache, indices, block_tables, cu_seqlens_q)
    scale, value_dim, name = check_options(call, q, scale, value_dim, sink, return_lse, implementation)
    rows = latent_rows(cache, indices, block_tables, cu_seqlens_q)
    check_rows(call, cache, indices, rows, cu_seqlens_q)
    return attend(q, cache, rows, scale, value_dim, sink, return_lse, name)


def check_attention(
    call: str,
    q: Array,
    cache: IndexCache,
    indices: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
) -> None:
    """Raises unless the arrays of `sparse_mla_paged` fit each other."""
    check_cache(call, cache)
    if cache.latents is None:
        raise ValueError(f"{call}: cache has no latents, wanted one of init_cache(..., latent_dim=Dk)")
    checks.dtype(call, "q", q, ("bfloat16", "float32"))
    checks.shape(
        call, "q", q, ("T", "N", cache.latents.shape[2]), "its last axis must equal that of the cache's latents"
    )
    checks.dtype(call, "cache.latents", cache.latents, (q.dtype.name,))
    checks.int32(call, "indices", indices, (q.shape[0], "K"), f"one list a query (q is {checks.axes_of(q)})")
    checks.int32(call, "block_tables", block_tables, ("R", "P"))
    R, why = block_tables.shape[0], "a start for each request, and the end"
    checks.offsets(call, "cu_seqlens_q", cu_seqlens_q, (R + 1,), q.shape[0], why)


def check_rows(call: str, cache: IndexCache, indices: Array, rows: Array, cu_seqlens_q: Array) -> None:
    """Under `checked` raises unless every chosen position of a request has a row, as `latent_rows` has found them."""
    is_wrong = (indices != -1) & (rows < 0) & requests_of(cu_seqlens_q, indices.shape[0])[2][:, None]
    checks.value(
        ~is_wrong,
        f"{call}: rows {{bad}} of q select what has no page, wanted -1 or positions whose page block_tables names, one "
        f"of 0 to {cache.n_pages - 1}",
        bad=jnp.any(is_wrong, axis=1),
    )


def latent_rows(cache: IndexCache, indices: Array, block_tables: Array, cu_seqlens_q: Array) -> Array:
    """[T, K] positions in requests -> [T, K] int32 rows of the cache's latents in one piece, -1 where there is none."""
    if 0 in block_tables.shape:
        return jnp.full(indices.shape, -1, jnp.int32)
    P, size = block_tables.shape[1], cache.page_size
    _, r, is_real = requests_of(cu_seqlens_q, indices.shape[0])
    nth = indices // size
    page = block_tables[r[:, None], jnp.clip(nth, 0, P - 1)]
    is_there = is_real[:, None] & (indices >= 0) & (nth < P) & (page >= 0) & (page < cache.n_pages)
    return jnp.where(is_there, page * size + indices % size, -1)


def attend(
    q: Array,
    cache: IndexCache,
    rows: Array,
    scale: float,
    value_dim: int,
    sink: Array | None,
    return_lse: bool,
    implementation: str,
) -> Array | tuple[Array, Array]:
    """[T, N, Dk] to the given rows of the cache's latents: `sparse_mla` of one sequence."""
    assert cache.latents is not None
    out = sparse_mla(
        q[None],
        cache.latents.reshape(1, -1, cache.latents.shape[2]),
        rows[None],
        scale=scale,
        value_dim=value_dim,
        sink=sink,
        return_lse=return_lse,
        implementation=implementation,
    )
    return jax.tree.map(lambda x: x[0], out)


def has_all_pages(cache: IndexCache, block_tables: Array, lengths: Array) -> Array:
    """[R] bool: whether every token of a request has a page that was written for this place of a sequence."""
    P = block_tables.shape[1]
    holds = holds_tokens(cache, block_tables, jnp.arange(P, dtype=jnp.int32), lengths)
    return holds & (lengths <= P * cache.page_size)


def holds_tokens(cache: IndexCache, pages: Array, places: Array, lengths: Array) -> Array:
    """[R, P], [P], [R] -> [R] bool: whether pages hold the tokens of requests that belong to some places of theirs."""
    n_needed = jnp.clip(lengths[:, None] - places[None, :] * cache.page_size, 0, cache.page_size)
    is_page = (pages >= 0) & (pages < cache.n_pages)
    page = jnp.where(is_page, pages, 0)
    holds = is_page & (cache.places[page] == places[None, :]) & (cache.counts[page] >= n_needed)
    return jnp.all(holds | (n_needed == 0), axis=1)
