"""Implementations by kernels: the functions of `xla.py` with the same names, on a backend of `kernels_pallas`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import stages, topk
from hisa_jax.keys import Keys
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method
from hisa_jax.selection import Selection
from hisa_jax.xla import Tiles

_STATIC = ("self", "method", "tiles", "return_scores", "return_blocks")
_SCORED_QUERIES = 16  # at a time: their chosen keys are gathered


class Backend(Protocol):
    """What kernels_pallas/README.md promises of every backend."""

    select_hisa: Callable[..., tuple[Array, Array, Array]]
    select_flat: Callable[..., tuple[Array, Array]]
    select_blocks: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The selection by one backend.

    Attributes:
        backend: a function that imports it, so that nothing is imported which does not run.
        flat_if_all_kept: whether its flat indexer is the faster way to `Hisa` where no query can see more blocks than
            it keeps, and both are the same by contract.
        interpret: handed to the kernels, for tests without their device.
    """

    backend: Callable[[], Backend]
    flat_if_all_kept: bool = False
    interpret: Any = False

    @functools.partial(jax.jit, static_argnames=_STATIC)
    def select(
        self,
        q: Array,
        keys: Keys,
        w: Array,
        visible: Array,
        lengths: Array,
        method: Method,
        tiles: Tiles,
        *,
        return_scores: bool,
        return_blocks: bool,
    ) -> Selection:
        """[B, T, H, D], Keys of [B, S, D], [B, T, H], [B, T], [B] -> Selection of [B, T]."""
        selection = self._select(q, keys, w, visible, method, return_blocks, lengths=lengths)
        if not return_scores:
            return selection
        scored = jax.vmap(_scores_of_chosen)(q, keys, w, selection.indices, jnp.zeros(visible.shape, jnp.int32))
        return dataclasses.replace(selection, scores=scored)

    @functools.partial(jax.jit, static_argnames=_STATIC)
    def select_packed(
        self,
        q: Array,
        keys: Keys,
        w: Array,
        visible: Array,
        cu_seqlens_q: Array,
        cu_seqlens_k: Array,
        method: Method,
        tiles: Tiles,
        *,
        return_scores: bool,
        return_blocks: bool,
    ) -> Selection:
        """[T, H, D], Keys of [N, D], [T, H], [T], [R + 1], [R + 1] -> Selection of [T]."""
        cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
        selection = self._select(q, keys, w, visible, method, return_blocks, cu_seqlens=cu_seqlens)
        if not return_scores:
            return selection
        r = jnp.searchsorted(cu_seqlens_q[1:], jnp.arange(q.shape[0], dtype=jnp.int32), side="right")
        first_key = cu_seqlens_k[jnp.minimum(r, cu_seqlens_k.shape[0] - 2)]
        return dataclasses.replace(selection, scores=_scores_of_chosen(q, keys, w, selection.indices, first_key))

    def _select(
        self, q: Array, keys: Keys, w: Array, visible: Array, method: Method, return_blocks: bool, **rows: Any
    ) -> Selection:
        backend, operands = self.backend(), (q, keys.values, keys.scales, w, visible)
        keeps_all = isinstance(method, Hisa) and keys.values.shape[-2] <= method.block_topk * method.block_size
        if isinstance(method, Dsa) or (keeps_all and self.flat_if_all_kept):
            rows.pop("lengths", None)  # `visible` says it all
            indices, count = backend.select_flat(*operands, topk=method.topk, interpret=self.interpret, **rows)
            blocks = _all_blocks(visible, method) if return_blocks and isinstance(method, Hisa) else None
            return Selection(indices=indices, count=count, blocks=blocks)
        options = dict(
            block_size=method.block_size,
            block_topk=method.block_topk,
            keep_first=method.keep_first,
            keep_last=method.keep_last,
            interpret=self.interpret,
            **rows,
        )
        if isinstance(method, Hisa):
            indices, count, blocks = backend.select_hisa(*operands, topk=method.topk, **options)
        else:
            blocks = backend.select_blocks(*operands, **options)
            indices, count = tokens_of_blocks(blocks, visible, method)
        return Selection(indices=indices, count=count, blocks=blocks if return_blocks else None)


def _all_blocks(visible: Array, method: Hisa) -> Array:
    """[...] -> [..., block_topk] int32: the blocks of the visible tokens, which are no more."""
    eligible = -(-visible // method.block_size)
    return stages.first_positions(eligible.reshape(-1), method.block_topk).reshape(*visible.shape, method.block_topk)


def tokens_of_blocks(blocks: Array, visible: Array, method: BlockSparse) -> tuple[Array, Array]:
    """[..., m], [...] -> [..., topk] int32 and [...] count: only the last block has invisible tokens, so no holes."""
    flat = blocks.reshape(-1, blocks.shape[-1])
    positions, seen = stages.tokens_of(flat, visible.reshape(-1), method.block_size)
    indices = jnp.where(seen, positions, -1).reshape(*visible.shape, method.topk)
    return indices, jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32)


def _scores_of_chosen(q: Array, keys: Keys, w: Array, indices: Array, first_key: Array) -> Array:
    """[T, H, D], Keys of [N, D], [T, H], [T, topk], [T] -> [T, topk] float32, -inf where nothing is chosen.

    Kernels hand out no scores, so the chosen ones are scored once more, in float32.
    """

    def one(row: tuple[Array, ...]) -> Array:
        q, w, indices, first_key = row
        scores = topk.score_of(topk.image_of(stages.scores(q, keys.rows(first_key + indices), w)))
        return jnp.where(indices >= 0, scores, -jnp.inf)

    return lax.map(one, (q, w, indices, first_key), batch_size=min(_SCORED_QUERIES, q.shape[0]))
