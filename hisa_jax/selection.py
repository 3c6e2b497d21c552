"""What a selection is, for one query or for a batch of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.methods import Dsa, Method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens each query may attend to. Leading axes are [B, T], or [T] for a packed batch, and H with `per_head`.

    Attributes:
        indices: [..., topk] int32, chosen positions in their sequence, ascending, then -1. With an `entry_size` r there
            are topk * r, with a tail r - 1 more; entries by their numbers if the method `returns` these.
        count: [...] int32, how many of `indices` are real.
        scores: [..., topk] float32, the indexer's score of each chosen token, or of its entry, infinity for those of
            the tail, -inf after them; None unless asked for.
        blocks: [..., block_topk] int32, the kept blocks, ascending, then -1; None unless asked for.
    """

    indices: Array
    count: Array
    scores: Array | None = None
    blocks: Array | None = None


def nothing(rows: tuple[int, ...], method: Method, return_scores: bool, return_blocks: bool) -> Selection:
    """The selection where there is no query or no key."""
    return Selection(
        indices=jnp.full((*rows, method.topk), -1, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        scores=jnp.full((*rows, method.topk), -jnp.inf, jnp.float32) if return_scores else None,
        blocks=None
        if isinstance(method, Dsa) or not return_blocks
        else jnp.full((*rows, method.block_topk), -1, jnp.int32),
    )


def selected_mask(indices: Array, S: int) -> Array:
    """[B, T, K] int32 -> [B, T, S] bool, which tokens are selected."""
    targets = jnp.where(indices < 0, S, indices)
    row = functools.partial(jnp.zeros, (S,), bool)
    return jax.vmap(jax.vmap(lambda at: row().at[at].set(True, mode="drop")))(targets)
