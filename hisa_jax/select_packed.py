"""Selection for packed ragged batches."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks, dispatch, prepare
from hisa_jax.check_select import check_packed
from hisa_jax.methods import Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.selection import Selection, nothing
from hisa_jax.xla import select


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
    tiles: select.Tiles | None = None,
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
    checks.unsplit(call, q=q, k=k, w=w, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    keys = check_packed(call, q, k, w, cu_seqlens_q, cu_seqlens_k)
    T, N = q.shape[0], keys.values.shape[0]
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    name = prepare.choose(call, prepare.problem_of(q, keys, method), implementation, tiles, **options)
    if cu_seqlens_q.shape[0] == 1 or 0 in (T, N):
        return nothing((T,), method, return_scores, return_blocks)

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
        *prepare.constants(q, keys, w, prepare.visible_tokens(positions, lengths), cu_seqlens_q, cu_seqlens_k),
        method,
        tiles or prepare.default_tiles(),
        **options,
    )
