"""Selection for batches, and what can run it."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hisa_jax import checks, dispatch, prepare
from hisa_jax.check_select import check_batch, check_question
from hisa_jax.methods import Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection, nothing
from hisa_jax.xla import select as xla


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
    checks.unsplit(call, q=q, k=k, w=w, query_positions=query_positions, lengths=lengths)
    keys = check_batch(call, q, k, w, query_positions, lengths)
    (B, T, _, _), S = q.shape, keys.values.shape[1]
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    name = prepare.choose(call, prepare.problem_of(q, keys, method), implementation, tiles, **options)

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
        **options,
    )


def implementations(
    q: Array | None = None, k: Array | QuantizedKeys | None = None, method: Method | None = None
) -> dict[str, str | None]:
    """Lists the implementations, the fastest first: "auto" takes the first that can run here.

    Args:
        q, k, method: those of a call to `select` or `select_packed`, to ask about that call; none of them, to ask about
            the device alone. Arrays may be `jax.ShapeDtypeStruct`.

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
    keys = check_question("implementations", q, k, method)
    return dispatch.reasons(device, prepare.problem_of(q, keys, method))
