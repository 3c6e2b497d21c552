"""Selection for batches, on one device or on a mesh, and for packed batches; what can run it."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hisa_jax import checks, dispatch, entries
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.check_select import (
    check_batch,
    check_limits,
    check_method,
    check_packed,
    check_question,
    unit_of,
    weights,
)
from hisa_jax.entries import most_tokens
from hisa_jax.layout import Call, Limits, ascending, last_visible, visible_tokens
from hisa_jax.lighthouse import attention as lighthouse
from hisa_jax.lighthouse.method import Lighthouse
from hisa_jax.methods import Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection
from hisa_jax.sharded import gathered, meshes, varying
from hisa_jax.sharded.select import select_batch
from hisa_jax.xla import select as xla


def select(
    q: Array,
    k: Array | QuantizedKeys,
    w: Array | None,
    method: Method,
    *,
    query_positions: Array | None = None,
    lengths: Array | None = None,
    candidates: CandidateBlocks | None = None,
    budget: Array | None = None,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses the tokens that each query may attend to.

    Args:
        q: [B, T, H, D] index queries, bfloat16, float32, float8_e4m3fn or int8.
        k: [B, S, D] index keys, of any of these dtypes, or `QuantizedKeys` of that shape; with an `entry_size` a key
            an entry.
        w: [B, T, H] float32 head weights of any sign, every scale factor already in them. None: ones, and where each
            head chooses by itself there are none.
        method: `Dsa`, `Scan`, `Hisa` or `BlockSparse`; static under jit, in `static_argnames` or not.
        query_positions: [B, T] int32, position of each query in its sequence; -1 marks padding, which selects nothing.
            Default: the queries are the last T of the `lengths` tokens.
        lengths: [B] int32, tokens present in each sequence; the keys after them are never read into a result.
            Default: S. With an `entry_size` the tokens of S whole entries, given `query_positions` an open tail, too.
        candidates: blocks [B, T, m] that alone are scored, for `Dsa`; where each head chooses by itself they may be
            [B, T, H, m]. None: all that is visible.
        budget: [B, T] int32, or [B, 1] for all queries of a sequence: how many keys a query chooses at most, up to the
            `topk` that shapes go by; what is always kept stays. None: topk.
        mesh: run it on these devices, with the keys of each sequence split over them; None: on one. Then S is a
            multiple of the devices of `context_axis` times the block size.
        context_axis: the mesh axis that splits S, in order.
        data_axis: the mesh axis that splits B; None: the whole batch on every device.
        implementation: one that `implementations` lists, or "auto": the first of them that can run here.
        return_scores: also return each chosen token's score.
        return_blocks: also return the blocks that were kept, for analysis. Not for `Dsa`.
        tiles: sizes that trade memory for speed; for implementation "xla" only.

    Returns: `Selection`: `indices` [B, T, topk] int32, ascending, then -1; `count` [B, T] int32, how many are real.
        With a `tail` they are [B, T, topk * entry_size + entry_size - 1]; with `per_head` T becomes T, H. It carries
        no gradient. With a mesh it is that of one device, by "xla" bit for bit, the same on all devices of
        `context_axis`. For many queries each of these devices gets all keys and a share of the queries, where that
        is fewer bytes than to exchange and merge candidates.
    Raises:
        TypeError: a dtype not listed above; a method that is none.
        ValueError: shapes that do not fit; an implementation that cannot run here; a mesh without the axes, or
            whose axes do not split the shapes.
    Source: HISA, arXiv 2603.28458; the score is that of DeepSeek-V3.2's indexer.
    Example:
        >>> q, k, w = jnp.ones((1, 16, 4, 32)), jnp.ones((1, 1024, 32)), jnp.ones((1, 16, 4))
        >>> hj.select(q, k, w, hj.Hisa(topk=128, block_size=64, block_topk=4)).indices.shape
        (1, 16, 128)
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> hj.select(q, k, w, hj.Dsa(topk=128), mesh=mesh, context_axis="context").indices.shape
        (1, 16, 128)
    """
    call = "select"
    arrays = dict(q=q, k=k, w=w, query_positions=query_positions, lengths=lengths, candidates=candidates, budget=budget)
    meshes.check_arrays(call, mesh, dict(context_axis=context_axis, data_axis=data_axis), **arrays)
    check_method(call, method)
    keys = check_batch(call, q, k, w, method, query_positions, lengths)
    listed, budget = check_limits(call, q, method, candidates, budget, (q.shape[0], 1))
    (B, T, _, _), S = q.shape, keys.values.shape[1]
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    axes, is_gathered = None, False
    if mesh is not None:
        axes = meshes.batch_axes(call, mesh, context_axis, data_axis, "k's S", S, B, unit_of(method, listed))
        is_gathered = gathered.of_keys(gathered.nbytes(keys), q, method)
    is_split = axes is not None and not is_gathered
    problem = dispatch.Problem.of(q, keys, method, is_split=is_split, limits=Limits(listed, budget))
    name = dispatch.choose_select(call, problem, implementation, tiles, **options)
    run = dispatch.IMPLEMENTATIONS[name].select
    if axes is not None:
        run = functools.partial(gathered.select_batch if is_gathered else select_batch, name, axes)

    most = most_tokens(S, method)
    if lengths is None:
        lengths = jnp.full((B,), S * method.entry_size if query_positions is None else most, jnp.int32)
    lengths = jnp.clip(lengths, 0, most)
    if query_positions is None:
        query_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    seen = visible_tokens(query_positions, lengths[:, None])
    batch = varying.constants(
        Call(
            q=q, w=weights(q, w), visible=seen, k=keys, lengths=lengths // method.entry_size, candidates=listed,
            budget=budget,
        )
    )  # fmt: skip
    return entries.choose(run, batch, method, tiles or dispatch.default_tiles(), **options)


def select_packed(
    q: Array,
    k: Array | QuantizedKeys,
    w: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    method: Method,
    *,
    lengths: Array | None = None,
    candidates: CandidateBlocks | None = None,
    budget: Array | None = None,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses tokens for a packed batch of R sequences of any lengths.

    Sequence r has the queries cu_seqlens_q[r] .. cu_seqlens_q[r + 1] - 1 and the keys cu_seqlens_k[r] ..
    cu_seqlens_k[r + 1] - 1; its queries are the last of its tokens. Blocks start with the sequence, and `indices` count
    from its start. Rows of q after the last sequence are padding and select nothing.

    Args:
        q: [T, H, D] index queries of all sequences.
        k: [N, D] index keys of all sequences, or `QuantizedKeys` of that shape.
        w: [T, H] float32, or None.
        cu_seqlens_q: [R + 1] int32, from 0, ascending.
        cu_seqlens_k: [R + 1] int32, from 0, ascending.
        lengths: [R] int32, tokens of each sequence; default: those of its keys, which with an `entry_size` are entries.
        candidates: [T, m], or with `per_head` [T, H, m]; budget: [T] int32, or [1]; both as for `select`.
        method, implementation, return_scores, return_blocks, tiles: as for `select`.

    Returns: `Selection` of [T] queries.
    Raises: as `select`.
    Source: as `select`.
    Example:
        >>> q, k, w = jnp.ones((24, 4, 32)), jnp.ones((1024, 32)), jnp.ones((24, 4))
        >>> cu_q, cu_k = jnp.array([0, 8, 24]), jnp.array([0, 100, 1024])
        >>> hj.select_packed(q, k, w, cu_q, cu_k, hj.Dsa(topk=128)).count[:2].tolist()
        [93, 94]
    """
    call = "select_packed"
    checks.unsplit(
        call, q=q, k=k, w=w, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, lengths=lengths,
        candidates=candidates, budget=budget,
    )  # fmt: skip
    check_method(call, method)
    keys = check_packed(call, q, k, w, cu_seqlens_q, cu_seqlens_k, method, lengths)
    listed, budget = check_limits(call, q, method, candidates, budget, (1,))
    T, N = q.shape[0], keys.values.shape[0]
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    problem = dispatch.Problem.of(q, keys, method, limits=Limits(listed, budget))
    name = dispatch.choose_select(call, problem, implementation, tiles, **options)

    query_offsets, key_offsets = ascending(cu_seqlens_q, T), ascending(cu_seqlens_k, N)
    n_keys = jnp.diff(key_offsets)
    lengths = n_keys * method.entry_size if lengths is None else jnp.clip(lengths, 0, most_tokens(n_keys, method))
    seen = last_visible(query_offsets, lengths, T) if cu_seqlens_q.shape[0] > 1 else jnp.zeros((T,), jnp.int32)
    packed = varying.constants(
        Call(
            q=q, w=weights(q, w), visible=seen, k=keys, lengths=lengths // method.entry_size,
            query_offsets=query_offsets, key_offsets=key_offsets, candidates=listed, budget=budget,
        )
    )  # fmt: skip
    run = dispatch.IMPLEMENTATIONS[name].select
    return entries.choose(run, packed, method, tiles or dispatch.default_tiles(), **options)


def implementations(
    q: Array | None = None, k: Array | QuantizedKeys | None = None, method: Method | Lighthouse | None = None
) -> dict[str, str | None]:
    """Lists the implementations, the fastest first: "auto" takes the first that can run here.

    Args:
        q, k, method: those of a call to `select` or `select_packed`, to ask about that call; none of them, to ask about
            the device alone. Arrays may be `jax.ShapeDtypeStruct`. With a `Lighthouse` those of `lighthouse_attention`,
            whose values are as wide as its keys.

    Returns: name -> None if it can run on JAX's default device, else the reason why it cannot.
    Raises: ValueError: only some of `q`, `k` and `method` given; as `select`.
    Example:
        >>> hj.implementations()["xla"] is None
        True
    """
    device = dispatch.Device.default()
    given = (q, k, method)
    if q is None or k is None or method is None:
        if any(argument is not None for argument in given):
            missing = next(name for name, x in zip(("q", "k", "method"), given, strict=True) if x is None)
            raise ValueError(f"implementations: {missing} is None, wanted all of q, k and method, or none of them")
        return dispatch.reasons(device, None)
    if isinstance(method, Lighthouse):
        return lighthouse.implementations(q, k)
    keys = check_question("implementations", q, k, method)
    return dispatch.reasons(device, dispatch.Problem.of(q, keys, method))
