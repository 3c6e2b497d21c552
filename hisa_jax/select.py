"""Selection for batches, and what can run it."""

import jax.numpy as jnp
from jax import Array

from hisa_jax import checks, dispatch, prepare, xla
from hisa_jax.methods import Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection, nothing


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
        implementation: one that `implementations` lists, or "auto": the first of them that can run here.
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
    keys = prepare.keys_of(k)
    prepare.check_dtypes(call, q, keys, w)
    checks.shape(call, "q", q, ("B", "T", "H", "D"))
    B, T, H, D = q.shape
    checks.shape(
        call,
        "k",
        keys.values,
        (B, "S", D),
        f"its first and last axes must equal q's B and D (q is {prepare.axes_of(q)})",
    )
    S = keys.values.shape[1]
    if keys.scales is not None:
        checks.shape(call, "k.scales", keys.scales, (B, S), "one scale a key")
    checks.shape(call, "w", w, (B, T, H), f"one weight a query and head (q is {prepare.axes_of(q)})")
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
    name = prepare.choose(call, prepare.problem_of(q, keys, method), implementation, return_blocks, tiles)

    lengths = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    if query_positions is None:
        query_positions = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None, :]
    visible = prepare.visible_tokens(query_positions, lengths[:, None])
    if 0 in (B, T, S):
        return nothing((B, T), method, return_scores, return_blocks)
    return dispatch.IMPLEMENTATIONS[name].select(
        *prepare.constants(q, keys, w, visible, lengths),
        method,
        tiles or prepare.default_tiles(),
        return_scores=return_scores,
        return_blocks=return_blocks,
    )


def implementations(
    q: Array | None = None, k: Array | QuantizedKeys | None = None, method: Method | None = None
) -> dict[str, str | None]:
    """Lists the implementations, the fastest first: "auto" takes the first that can run here.

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
    return dispatch.reasons(device, prepare.problem_of(q, prepare.keys_of(k), method))
