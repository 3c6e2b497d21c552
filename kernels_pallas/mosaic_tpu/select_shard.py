"""The stages on one device's share of the keys: each result comes with its sort keys, for `merge`."""

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import flat, ragged, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.kernels_pallas.mosaic_tpu.merge import merge
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Keys, Queries, in_blocks
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret

__all__ = ["Queries", "best_blocks", "best_in_blocks", "best_tokens", "in_blocks", "merge"]

# [B, T, k] int32 each: sort keys, `INVISIBLE` where there is none; ids or positions, then -1
Found = tuple[Array, Array]


@in_32_bits
def best_blocks(
    queries: Queries, keys: Keys, eligible: Array, n_tokens: Array, *, block_topk: int, interpret: Interpret = False
) -> Found:
    """The best blocks by score alone, none forced.

    Args:
        queries: of [B, T, ...]; what they see is not looked at, but `eligible`, [B, T] int32 blocks.
        keys: as `in_blocks` gives them; n_tokens: [B] int32, tokens present.
    """
    choice = Choice(k=block_topk, has_sort_keys=True, interpret=interpret)
    rows, batch = ragged.of_batch(queries, keys, n_tokens)
    return _found(eligible.shape, *select.best_blocks(rows, batch, eligible.reshape(-1), choice))


@in_32_bits
def best_in_blocks(
    queries: Queries, keys: Keys, block_ids: Array, n_tokens: Array, *, topk: int, interpret: Interpret = False
) -> Found:
    """The best visible tokens of some blocks, `block_ids` [B, T, m] ascending, then -1; the rest as `best_blocks`."""
    choice = Choice(k=topk, has_sort_keys=True, interpret=interpret)
    rows, batch = ragged.of_batch(queries, keys, n_tokens)
    block_ids = block_ids.reshape(-1, block_ids.shape[2])
    n_visible = select.candidates(block_ids, rows.visible, batch.block_size)
    found = select.best_tokens(rows._replace(visible=n_visible), batch, block_ids, choice)
    return _found(queries.visible.shape, *found)


@in_32_bits
def best_tokens(queries: Queries, keys: Keys, *, topk: int, interpret: Interpret = False) -> Found:
    """The best of all visible tokens; keys: of [B, S, D]."""
    choice = Choice(k=topk, has_sort_keys=True, interpret=interpret)
    return _found(queries.visible.shape, *flat.flat(queries, keys, choice=choice))


def _found(shape: tuple[int, ...], chosen: Array, sort_keys: Array) -> Found:
    """[B * T, k] each -> [B, T, k]."""
    chosen, sort_keys = (x.reshape(*shape, x.shape[-1]) for x in (chosen, sort_keys))
    return jnp.where(chosen >= 0, sort_keys, INVISIBLE), chosen
