"""Implementations by kernels: `xla.select.select`, on a backend of kernels_pallas."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import kernel_heads
from hisa_jax.layout import Call, sequence_of_rows
from hisa_jax.methods import Activation, BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.selection import Selection
from hisa_jax.xla import select as xla
from hisa_jax.xla import stages, topk
from hisa_jax.xla.select import Tiles

_SCORED_QUERIES = 16  # at a time: their chosen keys are gathered


class Backend(Protocol):
    """What kernels_pallas/README.md promises of every backend: results have a row a query.

    Of a call's limits they heed `candidates`, which is the flat indexer's, and a `budget` of tokens.
    """

    def select_hisa(
        self, call: Call, method: Hisa, interpret: Any = False, n_kept: Array | None = None
    ) -> tuple[Array, Array, Array]: ...
    def select_flat(self, call: Call, topk: int, interpret: Any = False) -> tuple[Array, Array]: ...
    def select_blocks(
        self, call: Call, method: BlockSparse, interpret: Any = False, n_kept: Array | None = None
    ) -> Array: ...
    def select_scan(self, call: Call, method: Scan, interpret: Any = False) -> tuple[Array, Array]: ...


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

    @functools.partial(jax.jit, static_argnames=("self", "method", "tiles", "return_scores", "return_blocks"))
    def select(
        self, call: Call, method: Method, tiles: Tiles, *, return_scores: bool, return_blocks: bool
    ) -> Selection:
        """The selection of all queries of a call, with leading axes `call.shape`."""
        backend, visible = self.backend(), call.queries.visible
        if not visible.size or not call.max_keys:  # nothing for a kernel to do
            return xla.select(call, method, tiles, return_scores=return_scores, return_blocks=return_blocks)
        scan_is_flat = kernel_heads.is_flat(method, call.q.shape[-2])
        activation, (_, block_budget) = method.activation, xla.budgets(call.limits, method)
        heads, method = kernel_heads.as_kernels_take(call, method)
        is_flat = isinstance(method, Scan) or (isinstance(method, Hisa) and self.flat_if_all_kept)
        blocks = None
        if isinstance(method, Dsa) or scan_is_flat or (is_flat and not xla.has_filter(method, call.max_keys, False)):
            indices, count = backend.select_flat(heads, method.topk, self.interpret)
            if isinstance(method, Hisa):
                blocks = stages.first_positions(-(-visible // method.block_size), method.block_topk)
        elif isinstance(method, Scan):
            indices, count = backend.select_scan(heads, method, self.interpret)
        else:
            n_kept = stages.how_many_kept(-(-visible // method.block_size), method, block_budget)
            if isinstance(method, Hisa):
                indices, count, blocks = backend.select_hisa(heads, method, self.interpret, n_kept)
            else:
                blocks = backend.select_blocks(heads, method, self.interpret, n_kept)
                indices, count = tokens_of_blocks(blocks, visible, method)
        scores = _scores_of_chosen(call, indices, activation) if return_scores else None
        selection = Selection(indices=indices, count=count, scores=scores, blocks=blocks if return_blocks else None)
        return call.unflatten(selection)


def tokens_of_blocks(blocks: Array, visible: Array, method: BlockSparse) -> tuple[Array, Array]:
    """[T, m], [T] -> [T, topk] int32 and [T] count: only the last block has invisible tokens, so there are no holes."""
    positions, seen = stages.tokens_of(blocks, visible, method.block_size)
    indices = jnp.where(seen, positions, -1)
    return indices, jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32)


def _scores_of_chosen(call: Call, indices: Array, activation: Activation | None) -> Array:
    """[T, topk] -> [T, topk] float32, -inf where nothing is chosen.

    Kernels hand out no scores, so the chosen tokens are scored once more, in float32.
    """
    q, w, _ = call.queries
    r, _ = sequence_of_rows(jnp.asarray(call.query_starts), q.shape[0])

    def one(row: tuple[Array, ...]) -> Array:
        q, w, indices, r = row
        scores = topk.score_of(topk.sort_key_of(stages.scores(q, call.sequence(r).rows(indices), w, activation)))
        return jnp.where(indices >= 0, scores, -jnp.inf)

    return lax.map(one, (q, w, indices, r), batch_size=min(_SCORED_QUERIES, q.shape[0]))
