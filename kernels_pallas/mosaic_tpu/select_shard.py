"""The stages on one device's share of the keys of sequences: each result comes with its sort keys, for `merge`.

In all of them a call has the keys, or the pages, that the device has, and what its queries see of those. A batch also
says how many tokens are present.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu import flat, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.merge import merge
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import Found as Chosen
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import of_call
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Queries

__all__ = ["best_blocks", "best_in_blocks", "best_tokens", "merge", "most_to_all"]

most_to_all = 0  # bytes: exchanges between TPUs take microseconds

# [T, k] int32 each, a row a query: sort keys, `INVISIBLE` where there is none; ids or positions, ascending, then -1.
# A query without a candidate gets anything.
Found = tuple[Array, Array]


def best_blocks(call: Call, eligible: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    """The best blocks by score alone, none forced, of the first `eligible` [T]."""
    with jax.enable_x64(False):  # see bits.py
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        queries, ragged = of_call(call, block_size)
        eligible = jnp.pad(eligible, (0, queries.q.shape[0] - eligible.shape[0]))
        return _found(call, select.best_blocks(queries, ragged, eligible, choice))


def best_in_blocks(call: Call, block_ids: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    """The best visible tokens of some blocks, `block_ids` [T, m] ascending, then -1."""
    with jax.enable_x64(False):
        queries, ragged = of_call(call, block_size)
        missing = queries.q.shape[0] - block_ids.shape[0]
        block_ids = jnp.pad(block_ids, ((0, missing), (0, 0)), constant_values=-1)
        queries = queries._replace(visible=select.candidates(block_ids, queries.visible, block_size))
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        return _found(call, select.best_tokens(queries, ragged, block_ids, choice))


def best_tokens(call: Call, k: int, interpret: Interpret = False) -> Found:
    """The best of all visible tokens."""
    with jax.enable_x64(False):
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        if call.k is not None:
            found = flat.flat(Queries(call.q, call.w, call.visible), call.k, choice=choice)
            return _found(call, tuple(x.reshape(-1, k) for x in found))
        assert call.cache is not None
        return _found(call, select.best_of_all(*of_call(call, max(LANES, call.cache.page_size)), choice))


def _found(call: Call, found: Chosen) -> Found:
    """Rows of the call's queries, without those of padding."""
    chosen, sort_keys = (x[: math.prod(call.shape)] for x in found)
    return jnp.where(chosen >= 0, sort_keys, INVISIBLE), chosen
