"""Choices among tokens that are listed already, put together from a backend's stages.

refine_tokens   the best of lists that were published before
within          of what is sorted out already, the best so many of each query
within_budget   the same of chosen tokens, which are scored once more
"""

from typing import Protocol

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.types import Interpret

_STEP = 512  # capacities are multiples of this: whole tiles of the refinement
MAX_LISTED = 32768  # of the selection in lists
_BYTES = 2**30  # of the lists and their sort keys of all queries at a time


class ListStages(Protocol):
    """What a backend brings for lists."""

    def refine_tokens(
        self, call: FlatCall, tokens: Array, count: Array, topk: int, interpret: Interpret = False
    ) -> tuple[Array, Array]:
        """As in scan.py."""
        ...

    def within(self, sort_keys: Array, ids: Array, most: Array, interpret: Interpret = False) -> Array:
        """[T, k] int32 sort keys and ids, ascending, then -1 -> [T, k]: the best `most` [T] int32 of each row."""
        ...

    def within_budget(
        self, call: FlatCall, tokens: Array, count: Array, most: Array, interpret: Interpret = False
    ) -> tuple[Array, Array]:
        """[T, k] int32 tokens, ascending, then -1; [T] count -> the best `most` [T] of each row, and how many."""
        ...


def why_not(n_listed: int) -> str | None:
    """None, or why no lists of so many keys can be chosen from."""
    return None if n_listed <= MAX_LISTED else f"needs lists of at most {MAX_LISTED} candidates, not {n_listed}"


def queries_at_a_time(n_listed: int) -> int:
    """A power of two."""
    return 1 << (max(_BYTES // (8 * _capacity(n_listed)), 1).bit_length() - 1)


def _capacity(n_listed: int) -> int:
    return -(-n_listed // _STEP) * _STEP


def best_listed(
    stages: ListStages, call: FlatCall, ids: Array, size: int, topk: int, interpret: Interpret
) -> tuple[Array, Array]:
    """The best of the visible tokens of some blocks: [T, topk] int32, ascending, then -1; [T] count.

    Args:
        ids: [T, m] int32 blocks of `size` tokens, ascending, then -1.
    """
    tokens = ids[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)[None, None, :]
    is_there = (ids[:, :, None] >= 0) & (tokens < call.visible[:, None, None])
    tokens = jnp.where(is_there, tokens, -1).reshape(ids.shape[0], -1)  # what is not there comes last
    tokens = jnp.pad(tokens, ((0, 0), (0, _capacity(tokens.shape[1]) - tokens.shape[1])), constant_values=-1)
    count = jnp.sum(is_there, axis=(1, 2), dtype=jnp.int32)
    k = min(topk, tokens.shape[1])
    best, _ = stages.refine_tokens(call, tokens, count, k, interpret)
    # A list that is chosen whole: Mosaic takes it for all that the query sees.
    best = jnp.where((count <= k)[:, None], tokens[:, :k], best)
    return jnp.pad(best, ((0, 0), (0, topk - k)), constant_values=-1), jnp.minimum(count, k)
