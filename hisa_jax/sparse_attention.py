"""Sparse grouped-query attention over the selected tokens or blocks, contiguous and in pages."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax import checks, dispatch, dispatch_stage
from hisa_jax.attention import check_sink, rows_of_pages, with_sink
from hisa_jax.layout import BlockLists, ascending, sequence_of_rows
from hisa_jax.sharded import varying
from hisa_jax.xla import sparse_attention as xla


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    *,
    scale: float,
    block_size: int = 1,
    query_positions: Array | None = None,
    sink: Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens, or blocks of tokens, with keys and values that groups of heads share.

    out[t, h] = sum_s p[t, h, s] * v[s, g],  p = softmax over the selected s of scale * q[t, h] . k[s, g],
    g = h // (Hq // G) the group of head h

    Args:
        q: [B, T, Hq, D] queries, bfloat16 or float32; Hq is a multiple of G.
        k: [B, S, G, D] keys, v: [B, S, G, V] values, same dtype; G is the KV heads, one a group.
        indices: [B, T, K] int32, one list for all heads, or [B, T, G, K], one a group: ids of blocks of `block_size`
            tokens in any order, -1 wherever there is none. What is no block of the sequence counts as -1. A block
            listed twice counts twice: its tokens have two shares of the softmax.
        scale: factor of the logits, a finite number.
        block_size: tokens of a block; block i holds tokens i * block_size to (i + 1) * block_size - 1, the last one
            perhaps fewer. 1: the ids are positions of tokens.
        query_positions: [B, T] int32, a query attends to no token after its own, with -1 to none. None: to all that
            are listed; with blocks it must be given, since a block may hold tokens after a query.
        sink: [Hq] float32, a logit per head that takes part in the softmax and has no value.
        return_lse: also return the logsumexp of the logits, without the sink, for merging partial results.
        implementation: of the forward pass: "triton", "mosaic_tpu", "xla", or "auto" as for `select`. The backward
            pass is XLA's.

    Returns: [B, T, Hq, V] in q's dtype, zeros where nothing is selected; with `return_lse` also [B, T, Hq] float32,
        -inf there. Differentiable in `q`, `k`, `v` and `sink` by reverse mode, `return_lse` too, with float32 sums.
        What a token holds that a query does not attend to, NaN too, changes no bit of the query's output or of any
        gradient.
    Raises: TypeError: a dtype or a number not listed above. ValueError: shapes that do not fit; blocks without
        `query_positions`; a scale that is not finite; an implementation that cannot run here.
    Source: grouped queries, arXiv 2305.13245; blocks a group as in NSA, arXiv 2502.11089, and MiniMax-M3; the sink as
        in gpt-oss.
    Example:
        >>> q, kv = jnp.ones((1, 2, 8, 16)), jnp.ones((1, 64, 2, 16))
        >>> indices = jnp.array([[[0, 3], [5, -1]]])
        >>> hj.sparse_attention(q, kv, kv, indices, scale=0.25).shape
        (1, 2, 8, 16)
        >>> a_group = jnp.array([[[[0, 3], [1, 3]], [[3, -1], [2, 0]]]])  # blocks of 16 tokens
        >>> at = jnp.array([[62, 63]])
        >>> hj.sparse_attention(q, kv, kv, a_group, scale=0.25, block_size=16, query_positions=at).shape
        (1, 2, 8, 16)
    """
    call = "sparse_attention"
    checks.unsplit(call, q=q, k=k, v=v, indices=indices, query_positions=query_positions, sink=sink)
    _check_q(call, q, ("B", "T", "Hq", "D"))
    _check_kv(call, q, ("k", k), ("v", v), (q.shape[0], "S"), "its first and last axes must equal q's B and D")
    S = k.shape[1]
    block_size = _check_lists(call, q, k.shape[2], indices, query_positions, block_size)
    attend = _checked_attention(call, q, k, v, indices, scale, block_size, sink, return_lse, implementation)
    n_blocks = -(-S // block_size)
    checks.value(
        (indices >= -1) & (indices < n_blocks),
        f"{call}: indices range from {{least}} to {{most}}, wanted -1 to {n_blocks - 1}",
        least=jnp.min(indices, initial=-1),
        most=jnp.max(indices, initial=-1),
    )
    out, lse = attend(q, k, v, block_lists(jnp.asarray(indices), query_positions, block_size, S))
    out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def sparse_attention_paged(
    q: Array,
    k: Array,
    v: Array,
    indices: Array,
    block_tables: Array,
    cu_seqlens_q: Array,
    *,
    scale: float,
    block_size: int = 1,
    query_positions: Array | None = None,
    sink: Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens or blocks, whose keys and values are in pages.

    Args:
        q: [T, Hq, D] queries of all requests, as `select_paged` has them.
        k, v: [n_pages, page_size, G, D] and [n_pages, page_size, G, V] in q's dtype.
        indices: [T, K] or [T, G, K] int32, as for `sparse_attention`: blocks of the request. One that the request's
            table has no page for counts as -1.
        block_tables, cu_seqlens_q: as for `select_paged`, pages in any order. Rows of q that are no request's attend
            to nothing.
        block_size: as for `sparse_attention`; it divides page_size.
        query_positions: [T] int32, positions in the requests.
        scale, sink, return_lse, implementation: as for `sparse_attention`.

    Returns: [T, Hq, V] in q's dtype; with `return_lse` also [T, Hq] float32. As `sparse_attention`, gradients too.
    Raises: as `sparse_attention`; ValueError: blocks that do not divide pages.
    Example:
        >>> q, pages = jnp.ones((2, 8, 16)), jnp.ones((3, 32, 2, 16))
        >>> indices, table, offsets = jnp.array([[0, 3], [5, -1]]), jnp.array([[1]], jnp.int32), jnp.array([0, 2])
        >>> hj.sparse_attention_paged(q, pages, pages, indices, table, offsets, scale=0.25).shape
        (2, 8, 16)
    """
    call = "sparse_attention_paged"
    tables = dict(block_tables=block_tables, cu_seqlens_q=cu_seqlens_q)
    checks.unsplit(call, q=q, k=k, v=v, indices=indices, query_positions=query_positions, sink=sink, **tables)
    _check_q(call, q, ("T", "Hq", "D"))
    _check_kv(call, q, ("k", k), ("v", v), ("n_pages", "page_size"), "its last axis must equal q's D")
    n_pages, page_size = k.shape[:2]
    block_size = _check_lists(call, q, k.shape[2], indices, query_positions, block_size)
    if page_size % block_size:
        raise ValueError(f"{call}: block_size={block_size}, wanted a divisor of page_size = {page_size}")
    attend = _checked_attention(call, q, k, v, indices, scale, block_size, sink, return_lse, implementation)
    checks.int32(call, "block_tables", block_tables, ("R", "P"))
    R, P = block_tables.shape
    checks.offsets(call, "cu_seqlens_q", cu_seqlens_q, (R + 1,), q.shape[0], "a start for each request, and the end")
    lists = block_lists(jnp.asarray(indices)[None], _batched(query_positions), block_size, P * page_size)
    in_pages = functools.partial(
        rows_of_pages, n_pages, page_size // block_size, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q
    )
    if checks.checks_values():
        _check_pages(call, jnp.asarray(indices), in_pages, cu_seqlens_q)
    T, L, K = lists.ids.shape[1:]
    ids = in_pages(lists.ids.reshape(T, L * K)).reshape(1, T, L, K)
    open_block, count = lists.last[0, :, :1], lists.last[..., 1:]
    lists = BlockLists(ids, jnp.concatenate([in_pages(open_block)[None], count], axis=2))
    in_one_piece = (x.reshape(1, -1, *x.shape[2:]) for x in (k, v))
    out, lse = (x[0] for x in attend(q[None], *in_one_piece, lists))
    out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def _check_pages(call: str, indices: Array, in_pages: Callable[[Array], Array], cu_seqlens_q: Array) -> None:
    """Raises where a request lists what its table has no page for."""
    T = indices.shape[0]
    listed = indices.reshape(T, -1)
    _, is_real = sequence_of_rows(ascending(jnp.asarray(cu_seqlens_q), T), T)
    bad = jnp.any((listed != -1) & (in_pages(listed) < 0), axis=1) & is_real
    checks.value(
        ~bad,
        f"{call}: rows {{bad}} of q have indices of no page, wanted -1 or blocks whose page block_tables names",
        bad=bad,
    )


def _batched(x: Array | None) -> Array | None:
    return None if x is None else x[None]


def _check_q(call: str, q: Array, axes: tuple[str, ...]) -> None:
    checks.dtype(call, "q", q, ("bfloat16", "float32"))
    checks.shape(call, "q", q, axes)


def _check_kv(
    call: str, q: Array, k: tuple[str, Array], v: tuple[str, Array], first: tuple[int | str, str], why: str
) -> None:
    """Raises unless keys and values fit the queries and each other."""
    Hq, D = q.shape[-2:]
    for name, x in (k, v):
        checks.dtype(call, name, x, (q.dtype.name,))
    checks.shape(call, *k, (*first, "G", D), f"{why} (q is {checks.axes_of(q)})")
    checks.shape(call, *v, (*k[1].shape[:3], "V"), f"a value a key (k is {checks.axes_of(k[1])})")
    G = k[1].shape[2]
    if G == 0 or Hq % G:
        raise ValueError(f"{call}: q has {Hq} heads, wanted a multiple of the {G} heads of k")


def _check_lists(call: str, q: Array, G: int, indices: Array, query_positions: Array | None, block_size: int) -> int:
    """The size of blocks as Python's own; raises unless lists, blocks and positions fit the queries [..., Hq, D]."""
    checks.integer(call, "block_size", block_size, least=1)
    queries: tuple[int, ...] = q.shape[:-2]
    is_grouped = getattr(indices, "ndim", 0) == len(queries) + 2
    wanted: tuple[int | str, ...]
    wanted, whose = ((*queries, G, "K"), "query and group") if is_grouped else ((*queries, "K"), "query")
    checks.int32(call, "indices", indices, wanted, f"one list a {whose} (q is {checks.axes_of(q)})")
    if query_positions is not None:
        checks.int32(call, "query_positions", query_positions, queries, f"one a query (q is {checks.axes_of(q)})")
    elif block_size > 1:
        raise ValueError(
            f"{call}: query_positions is None with block_size={block_size}, wanted {list(queries)} int32: a block may "
            "hold tokens after a query"
        )
    return int(block_size)


def _checked_attention(
    call: str, q: Array, k: Array, v: Array, indices: Array, scale: float, block_size: int, sink: Array | None,
    return_lse: bool, implementation: str,
) -> Any:  # fmt: skip
    """What both forms take besides lists: raises if it does not fit. Returns (q, k, v, lists) -> (out, lse)."""
    checks.finite(call, "scale", scale)
    check_sink(call, sink, q)
    checks.flags(call, return_lse=return_lse)
    problem = dispatch_stage.GroupedProblem(
        Hq=q.shape[-2],
        G=k.shape[-2],
        D=q.shape[-1],
        V=v.shape[-1],
        dtype=q.dtype.name,
        block_size=block_size,
        n_listed=math.prod(indices.shape[q.ndim - 2 :]),
    )
    name = dispatch.choose(call, implementation, dispatch_stage.grouped_reasons(dispatch.Device.default(), problem))

    def attend(q: Array, k: Array, v: Array, lists: BlockLists) -> tuple[Array, Array]:
        if 0 in (*q.shape, *k.shape, *v.shape, *lists.ids.shape):
            return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return _attend(*varying.alike(q, k, v, lists), float(scale), block_size, name)

    return attend


def block_lists(indices: Array, query_positions: Array | None, block_size: int, S: int) -> BlockLists:
    """[B, T, K] or [B, T, G, K], [B, T] -> the blocks of which something is visible, and the query's last one."""
    ids = indices if indices.ndim == 4 else indices[:, :, None]
    if query_positions is None:
        visible = jnp.full(ids.shape[:2], S, jnp.int32)
    else:
        visible = jnp.clip(jnp.asarray(query_positions), -1, S - 1) + 1
    n_visible = -(-visible // block_size)[:, :, None, None]
    ids = jnp.where((ids >= 0) & (ids < n_visible), ids, -1)
    return BlockLists(ids, jnp.stack([visible // block_size, visible % block_size], axis=2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    q: Array, k: Array, v: Array, lists: BlockLists, scale: float, block_size: int, implementation: str
) -> tuple[Array, Array]:
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, V] -> [B, T, Hq, V], [B, T, Hq] float32."""
    forward = xla.forward if implementation == "xla" else dispatch_stage.grouped_attention(implementation)
    return forward(q, k, v, lists, scale=scale, block_size=block_size)


def _attend_forward(
    q: Array, k: Array, v: Array, lists: BlockLists, scale: float, block_size: int, implementation: str
) -> Any:
    out, lse = _attend(q, k, v, lists, scale, block_size, implementation)
    return (out, lse), (q, k, v, lists, out, lse)


def _attend_backward(
    scale: float, block_size: int, implementation: str, saved: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    return *xla.backward(scale, block_size, saved, gradients), None


_attend.defvjp(_attend_forward, _attend_backward)
