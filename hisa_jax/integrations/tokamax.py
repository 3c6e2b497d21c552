"""tokamax.ops.lightning_indexer by this library.

tokamax takes a function in place of the name of an implementation, so nothing of it is replaced or imported:

    tokamax.ops.lightning_indexer(..., implementation=hisa_jax.integrations.tokamax.lightning_indexer)
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks
from hisa_jax.index_cache import IndexCache
from hisa_jax.integrations.streamindex import Batch, select
from hisa_jax.methods import Dsa, Method

_STATIC = (
    "k", "compression_ratio", "kv_layout", "cp_size", "interleave_size", "return_scores", "method", "implementation",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=_STATIC)
def lightning_indexer(
    q: Array,
    indexer_weights: Array,
    cache_kv: Array | IndexCache,
    seq_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array | Sequence[int],
    *,
    k: int,
    compression_ratio: int = 1,
    kv_layout: Any = "head_along_sublane",
    cp_size: int = 1,
    cp_rank: Array | int = 0,
    interleave_size: int = 1,
    return_scores: bool = False,
    method: Method | None = None,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Chooses entries for a batch of requests, as `tokamax.ops.lightning_indexer` does.

    What is not listed here is as for `streamindex_topk`.

    Args:
        kv_layout: "head_along_sublane" or "seq_along_lane", or tokamax's KVLayout.
        cp_size: over how many devices each request's entries are split; this device chooses among its own.
        cp_rank: int32, which of them it is.
        interleave_size: tokens in a row that one of them has.
        return_scores: whether to return scores, too.

    Returns: [T, k] int32, entries in ascending order, then -1; with cp_size > 1 entries of this device, counted from 0.
        With `return_scores` also their scores, [T, k] int32: the bits of float32, -inf where there is none.
    Raises: TypeError, ValueError: arguments that are not these; a method other than `Dsa` with cp_size > 1, whose
        blocks one device has not whole.
    """
    call = "lightning_indexer"
    checks.integer(call, "cp_size", cp_size, 1)
    checks.integer(call, "interleave_size", interleave_size, 1)
    batch = Batch(seq_lens, page_indices, cu_q_lens, distribution, compression_ratio)
    checks.integer(call, "compression_ratio", compression_ratio, 1)
    own: Any = {}
    if cp_size > 1:
        if interleave_size % compression_ratio:
            raise ValueError(
                f"{call}: interleave_size={interleave_size}, wanted a multiple of compression_ratio={compression_ratio}"
            )
        if method is not None and not isinstance(method, Dsa):
            raise ValueError(f"{call}: cp_size={cp_size} with {method}, wanted a Dsa: blocks are split over devices")
        own = dict(own=functools.partial(_own, cp_rank, cp_size, interleave_size // compression_ratio))
    options: Any = dict(kv_layout=kv_layout, return_scores=return_scores, **own)
    selection = select(call, q, indexer_weights, cache_kv, batch, k, method, implementation, **options)
    if selection.scores is None:
        return selection.indices
    return selection.indices, lax.bitcast_convert_type(selection.scores, jnp.int32)


def _own(rank: Array | int, n: int, width: int, total: Array) -> Array:
    """How many of the first `total` entries a device has, where `width` in a row go to each of n in turn."""
    rounds, rest = total // (n * width), total % (n * width)
    return rounds * width + jnp.clip(rest - rank * width, 0, width)
