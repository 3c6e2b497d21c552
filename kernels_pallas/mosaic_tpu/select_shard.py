"""The stages on one device's share of the keys of a batch: each result comes with its sort keys, for `merge`.

In all of them a call has the keys that the device has, what its queries see of those and how many tokens are present.
"""

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu import flat, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.kernels_pallas.mosaic_tpu.merge import merge
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import of_call
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Queries

__all__ = ["best_blocks", "best_in_blocks", "best_tokens", "merge"]

# [B, T, k] int32 each: sort keys, `INVISIBLE` where there is none; ids or positions, then -1
Found = tuple[Array, Array]


def best_blocks(call: Call, eligible: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    """The best blocks by score alone, none forced, of the first `eligible` [B, T]."""
    with jax.enable_x64(False):  # see bits.py
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        return _found(call, *select.best_blocks(*of_call(call, block_size), eligible.reshape(-1), choice))


def best_in_blocks(call: Call, block_ids: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
    """The best visible tokens of some blocks, `block_ids` [B, T, m] ascending, then -1."""
    with jax.enable_x64(False):
        queries, ragged = of_call(call, block_size)
        block_ids = block_ids.reshape(-1, block_ids.shape[2])
        queries = queries._replace(visible=select.candidates(block_ids, queries.visible, block_size))
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        return _found(call, *select.best_tokens(queries, ragged, block_ids, choice))


def best_tokens(call: Call, k: int, interpret: Interpret = False) -> Found:
    """The best of all visible tokens."""
    assert call.k is not None
    with jax.enable_x64(False):
        choice = Choice(k=k, has_sort_keys=True, interpret=interpret)
        return _found(call, *flat.flat(Queries(call.q, call.w, call.visible), call.k, choice=choice))


def _found(call: Call, chosen: Array, sort_keys: Array) -> Found:
    """[B * T, k] each -> [B, T, k]."""
    chosen, sort_keys = (x.reshape(*call.shape, x.shape[-1]) for x in (chosen, sort_keys))
    return jnp.where(chosen >= 0, sort_keys, INVISIBLE), chosen
