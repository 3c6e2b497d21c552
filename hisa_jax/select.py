"""The public functions: check, prepare, choose, call."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks, dispatch, xla
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection
from hisa_jax.stages import Keys


def select(
    q: Array,
    k: Array | QuantizedKeys,
    w: Array,
    method: Method,
    *,
    query_positions: Array | None = None,
    lengths: Array | None = None,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses the tokens that each query may attend to.

    Args:
        q: [B, T, H, D] index queries, bfloat16, float32, float8_e4m3fn or int8.
        k: [B, S, D] index keys, of the same dtypes, or `QuantizedKeys` of that shape.
        w: [B, T, H] float32 head weights of any sign, every scale factor already in them.
        method: `Hisa`, `Dsa` or `BlockSparse`; static under jit.
        query_positions: [B, T] int32, position of each query in its sequence; -1 marks padding, which selects nothing.
            Default: the queries are the last T of the `lengths` tokens.
        lengths: [B] int32, tokens present in each sequence; the keys behind them are never read into a result.
            Default: S.
        implementation: "auto", or one that `implementations` lists.
        return_scores: also return each chosen token's score.
        return_blocks: also return the blocks that were kept, for analysis. Not for `Dsa`.
        tiles: sizes that trade memory for speed; for implementation "xla" only.

    Returns: `Selection`: `indices` [B, T, topk] int32, ascending, then -1; `count` [B, T] int32, how many are real.
        It carries no gradient.
    Raises:
        TypeError: a dtype not listed above; a method that is none.
        ValueError: shapes that do not fit; an implementation that cannot run here.
    Source: HISA, arXiv 2603.28458; the score is that of DeepSeek-V3.2's indexer.
    Example:
        >>> q, k, w = jnp.ones((1, 16, 4, 32)), jnp.ones((1, 1024, 32)), jnp.ones((1, 16, 4))
        >>> hj.select(q, k, w, hj.Hisa(topk=128, block_size=64, block_topk=4)).indices.shape
        (1, 16, 128)
    """
    call = "select"
    keys = _keys_of(k)
    _check_dtypes(call, q, keys, w)
    checks.shape(call, "q", q, ("B", "T", "H", "D"))
    B, T, H, D = q.shape
    checks.shape(call, "k", keys.values, (B, "S", D), f"its first and last axes must equal q's B and D (q is {_of(q)})")
    S = keys.values.shape[1]
    if keys.scales is not None:
        checks.shape(call, "k.scales", keys.scales, (B, S), "one scale a key")
    checks.shape(call, "w", w, (B, T, H), f"one weight a query and head (q is {_of(q)})")
    if lengths is not None:
        checks.dtype(call, "lengths", lengths, ("int32",))
        checks.shape(call, "lengths", lengths, (B,), "one length a sequence")
        checks.value(
            (lengths >= 0) & (lengths <= S),
            f"select: lengths is {{lengths}}, wanted 0 to {S}, the keys there are",
            lengths=lengths,
        )
    if query_positions is not None:
        checks.dtype(call, "query_positions", query_positions, ("int32",))
        checks.shape(call, "query_positions", query_positions, (B, T), "one position a query")
        checks.value(
            query_positions >= -1,
            "select: query_positions holds {least}, wanted -1 (padding) or more",
            least=jnp.min(query_positions, initial=0),
        )
    elif T > S:
        raise ValueError(
            f"{call}: q has T = {T} queries but k has only S = {S} keys: by default the queries are the last T of the "
            "S tokens; give query_positions"
        )
    name = _prepare(call, q, keys, method, implementation, return_blocks, tiles)

    lengths = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    if query_positions is None:
        query_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = _visible(query_positions, lengths[:, None])
    if 0 in (B, T, S):
        return _nothing((B, T), method, return_scores, return_blocks)
    return dispatch.IMPLEMENTATIONS[name].select(
        *_constants(q, keys, w),
        visible,
        lengths,
        method,
        tiles or _default_tiles(),
        return_scores=return_scores,
        return_blocks=return_blocks,
    )


def select_packed(
    q: Array,
    k: Array | QuantizedKeys,
    w: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    method: Method,
    *,
    implementation: str = "auto",
    return_scores: bool = False,
    return_blocks: bool = False,
    tiles: xla.Tiles | None = None,
) -> Selection:
    """Chooses tokens for a packed batch of R sequences of any lengths.

    Sequence r has the queries cu_seqlens_q[r] .. cu_seqlens_q[r + 1] - 1 and the keys cu_seqlens_k[r] ..
    cu_seqlens_k[r + 1] - 1; its queries are the last of its tokens. Blocks start with the sequence, and `indices` count
    from its start. Rows of q behind the last sequence are padding and select nothing.

    Args:
        q: [T, H, D] index queries of all sequences.
        k: [N, D] index keys of all sequences, or `QuantizedKeys` of that shape.
        w: [T, H] float32.
        cu_seqlens_q: [R + 1] int32, from 0, ascending.
        cu_seqlens_k: [R + 1] int32, from 0, ascending.
        method, implementation, return_scores, return_blocks, tiles: as for `select`.

    Returns: `Selection` of [T] queries.
    Raises: as `select`.
    Example:
        >>> q, k, w = jnp.ones((24, 4, 32)), jnp.ones((1024, 32)), jnp.ones((24, 4))
        >>> cu_q, cu_k = jnp.array([0, 8, 24]), jnp.array([0, 100, 1024])
        >>> hj.select_packed(q, k, w, cu_q, cu_k, hj.Dsa(topk=128)).count[:2].tolist()
        [93, 94]
    """
    call = "select_packed"
    keys = _keys_of(k)
    _check_dtypes(call, q, keys, w)
    checks.shape(call, "q", q, ("T", "H", "D"))
    T, H, D = q.shape
    checks.shape(call, "k", keys.values, ("N", D), f"its last axis must equal q's D (q is {_of(q)})")
    N = keys.values.shape[0]
    if keys.scales is not None:
        checks.shape(call, "k.scales", keys.scales, (N,), "one scale a key")
    checks.shape(call, "w", w, (T, H), f"one weight a query and head (q is {_of(q)})")
    for name, offsets, end in (("cu_seqlens_q", cu_seqlens_q, T), ("cu_seqlens_k", cu_seqlens_k, N)):
        checks.dtype(call, name, offsets, ("int32",))
        checks.shape(call, name, offsets, ("R + 1",))
        checks.value(
            (jnp.diff(offsets, prepend=0) >= 0) & (offsets <= end),
            f"select_packed: {name} is {{offsets}}, wanted ascending offsets from 0 to at most {end}",
            offsets=offsets,
        )
    checks.shape(call, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "as many sequences as cu_seqlens_q has")
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"{call}: cu_seqlens_q is [0], wanted [R + 1]: it starts with a 0")
    name = _prepare(call, q, keys, method, implementation, return_blocks, tiles)
    if cu_seqlens_q.shape[0] == 1 or 0 in (T, N):
        return _nothing((T,), method, return_scores, return_blocks)

    # Bad offsets can make sequences empty, never reach outside: nothing below checks again.
    cu_seqlens_q = lax.cummax(jnp.clip(cu_seqlens_q, 0, T))
    cu_seqlens_k = lax.cummax(jnp.clip(cu_seqlens_k, 0, N))
    rows = jnp.arange(T, dtype=jnp.int32)
    r = jnp.searchsorted(cu_seqlens_q, rows, side="right") - 1
    is_real = (r >= 0) & (r < cu_seqlens_q.shape[0] - 1)
    r = jnp.clip(r, 0, cu_seqlens_q.shape[0] - 2)
    lengths = jnp.diff(cu_seqlens_k)[r]
    positions = jnp.where(is_real, lengths - (cu_seqlens_q[r + 1] - rows), -1)
    return dispatch.IMPLEMENTATIONS[name].select_packed(
        *_constants(q, keys, w),
        _visible(positions, lengths),
        cu_seqlens_q,
        cu_seqlens_k,
        method,
        tiles or _default_tiles(),
        return_scores=return_scores,
        return_blocks=return_blocks,
    )


def implementations(
    q: Array | None = None, k: Array | QuantizedKeys | None = None, method: Method | None = None
) -> dict[str, str | None]:
    """Lists the implementations in the order in which "auto" tries them.

    Args:
        q, k, method: those of a call to `select` or `select_packed`, to ask about that call; none of them, to ask about
            the device alone. Arrays may be `jax.ShapeDtypeStruct`.

    Returns: name -> None if it can run on JAX's default device, else the reason why it cannot.
    Raises: ValueError: only some of `q`, `k` and `method` given.
    Example:
        >>> hj.implementations()["xla"] is None
        True
    """
    device = dispatch.Device.default()
    given = (q, k, method)
    if q is None or k is None or method is None:
        if any(argument is not None for argument in given):
            raise ValueError("implementations: wanted all of q, k and method, or none of them")
        return dispatch.reasons(device, None)
    return dispatch.reasons(device, _problem(q, _keys_of(k), method))


def _keys_of(k: Array | QuantizedKeys) -> Keys:
    return Keys(k.values, k.scales) if isinstance(k, QuantizedKeys) else Keys(k, None)


def _of(array: Array) -> str:
    return f"[{', '.join(map(str, array.shape))}]"


def _check_dtypes(call: str, q: Array, keys: Keys, w: Array) -> None:
    checks.dtype(call, "q", q, checks.KEY_DTYPES)
    checks.dtype(call, "w", w, ("float32",))
    if keys.scales is None:
        checks.dtype(call, "k", keys.values, checks.KEY_DTYPES)
    else:
        checks.dtype(call, "k.values", keys.values, ("float8_e4m3fn", "int8"))
        checks.dtype(call, "k.scales", keys.scales, ("float32",))


def _problem(q: Array, keys: Keys, method: Method) -> dispatch.Problem:
    (H, D), S = q.shape[-2:], keys.values.shape[-2]
    return dispatch.Problem(H=H, D=D, S=S, q_dtype=q.dtype.name, k_dtype=keys.values.dtype.name, method=method)


def _prepare(
    call: str, q: Array, keys: Keys, method: Any, implementation: str, return_blocks: bool, tiles: xla.Tiles | None
) -> str:
    """Checks what is no array and returns the name of the implementation to run."""
    if not isinstance(method, Hisa | Dsa | BlockSparse):
        raise TypeError(f"{call}: method is {method!r}, wanted a Hisa, Dsa or BlockSparse")
    if return_blocks and isinstance(method, Dsa):
        raise ValueError(f"{call}: return_blocks=True with {method}: the flat indexer keeps no blocks")
    name = dispatch.choose(call, implementation, dispatch.reasons(dispatch.Device.default(), _problem(q, keys, method)))
    if tiles is not None and name != "xla":
        raise ValueError(f'{call}: tiles={tiles} with implementation="{name}", wanted implementation="xla"')
    return name


def _default_tiles() -> xla.Tiles:
    return xla.Tiles.heuristic(dispatch.Device.default().platform)


def _visible(positions: Array, lengths: Array) -> Array:
    """How many tokens each query sees: min(position + 1, length), 0 for padding, without overflow."""
    return jnp.maximum(jnp.minimum(positions, lengths - 1) + 1, 0)


def _constants(q: Array, keys: Keys, w: Array) -> tuple[Array, Keys, Array]:
    """The selection is piecewise constant: cut the gradient here, where loops need not be differentiated."""
    return jax.tree.map(lax.stop_gradient, (jnp.asarray(q), keys, jnp.asarray(w)))


def _nothing(rows: tuple[int, ...], method: Method, return_scores: bool, return_blocks: bool) -> Selection:
    """The selection where there is no query or no key."""
    return Selection(
        indices=jnp.full((*rows, method.topk), -1, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        scores=jnp.full((*rows, method.topk), -jnp.inf, jnp.float32) if return_scores else None,
        blocks=None
        if isinstance(method, Dsa) or not return_blocks
        else jnp.full((*rows, method.block_topk), -1, jnp.int32),
    )
