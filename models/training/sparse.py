"""Attention to selected tokens in training: those that a method selects, or those that a rollout's queries selected."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

import hisa_jax as hj
from hisa_jax.models.dsa import Attention, IndexKeys, Projections, Table, absorb
from hisa_jax.models.sharding import per_device


class Layout(NamedTuple):
    """Where the sequences of packed rows lie.

    Attributes:
        positions: [B, T] int32, each token's number in its sequence, -1 for padding.
        first: [B, T] int32, the column at which that sequence begins.
        cu_seqlens: [B, R + 1] int32, these columns, and the end of the last sequence.
    """

    positions: Array
    first: Array
    cu_seqlens: Array


class Seen(NamedTuple):
    """What one layer did beside its output.

    Attributes:
        kl: [B, T] float32, the indexer's loss over the tokens that were attended to; None in layers without an indexer.
        indices: [B, T, K] int32, these tokens, counted from the start of their sequence.
        own: [B, T, K'] int32, what the layer's own indexer selects; None unless asked for.
    """

    kl: Array | None
    indices: Array
    own: Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse:
    """How a layer attends to selected tokens: called as `forward.Attend`.

    Attributes:
        method: how its own indexer selects.
        layout: of packed rows; None: each row is one sequence.
        recorded: [B, T, K] int32, what a rollout's queries selected, from position `start` on; None: nothing was.
        start: queries at positions before it select by themselves.
        shared: for layers without an indexer, what the last one with one attended to.
        mesh: what batch and heads are split over, or None.
        compares: whether to return the own selection, too.
    """

    method: hj.Method
    layout: Layout | None = None
    recorded: Array | None = None
    start: int = 0
    shared: Array | None = None
    mesh: Mesh | None = None
    compares: bool = False

    def __call__(self, attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Seen]:
        if attention.indexer is None:
            assert self.shared is not None  # Config has checked that layer 0 selects
            return self._attended(attention, made, self.shared), Seen(None, self.shared, None)
        own = None
        if self.compares or self._needs_own():
            own = self._own(attention, x, table, made)
        indices = own if self.recorded is None else self._replayed(self.recorded, own)
        assert indices is not None
        kl = self._divergence(attention, x, table, made, indices)
        return self._attended(attention, made, indices), Seen(kl, indices, own if self.compares else None)

    def _needs_own(self) -> bool:
        """Not for queries before `start` that see no more tokens than they select: they select all."""
        return self.recorded is None or self.start > self.method.topk

    def _own(self, attention: Attention, x: Array, table: Table, made: Projections) -> Array:
        """[B, T, topk] int32, -1 in padding."""
        assert attention.indexer is not None
        x, q_latent = lax.stop_gradient((x, made.q_latent))
        q, w = attention.indexer.queries(q_latent, x, table)
        inputs = lax.stop_gradient((q, attention.indexer.keys(x, table), w))
        return select(*inputs, self.method, self.layout, self.mesh)

    def _replayed(self, recorded: Array, own: Array | None) -> Array:
        """The record, and what it leaves out."""
        assert self.layout is not None  # a record has one
        at = self.layout.positions[..., None]
        recorded = jnp.where((recorded >= 0) & (recorded <= at) & (at >= self.start), recorded, -1)
        if not self.start:
            return recorded
        if own is None:  # see `_needs_own`
            everything = jnp.arange(min(self.start, at.shape[1]), dtype=jnp.int32)
            own = jnp.where(everything[None, None, :] <= at, everything[None, None, :], -1)
        own, recorded = alike(own, recorded)
        return jnp.where(at < self.start, own, recorded)

    def _attended(self, attention: Attention, made: Projections, indices: Array) -> Array:
        """Heads' values [B, T, N, V]."""
        scale, L = attention.config.softmax_scale, attention.config.kv_lora_rank

        def attend(q: Array, kv: Array, indices: Array) -> Array:
            out = hj.sparse_mla(q, kv, indices, scale=scale, value_dim=L)
            assert isinstance(out, Array)  # no logsumexp was asked for
            return out

        heads = ("batch", None, "heads")
        attend = per_device(attend, self.mesh, (heads, ("batch",), ("batch",)), heads)
        q = absorb(made.q_nope, made.q_rope, attention.k_b[...])
        return jnp.einsum("btnl,lnd->btnd", attend(q, made.kv, self._columns(indices)), attention.v_b[...])

    def _divergence(self, attention: Attention, x: Array, table: Table, made: Projections, indices: Array) -> Array:
        """[B, T] float32."""
        scale = attention.config.softmax_scale

        def kl(*arrays: Array) -> Array:
            return hj.indexer_kl(*arrays[:-1], scale=scale, indices=arrays[-1])

        kl = per_device(kl, self.mesh, (("batch",),) * 6, ("batch",))
        return kl(*index_inputs(attention, x, table, made), *kl_target(attention, made), self._columns(indices))

    def _columns(self, indices: Array) -> Array:
        """Positions in sequences -> columns of rows."""
        return indices if self.layout is None else jnp.where(indices < 0, -1, indices + self.layout.first[..., None])


def index_inputs(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Array, Array]:
    """q, k, w. The indexer learns from its own loss alone: what it reads of the model is detached."""
    assert attention.indexer is not None
    x, q_latent = lax.stop_gradient((x, made.q_latent))
    q, w = attention.indexer.plain_queries(q_latent, x, table)
    return q, attention.indexer.plain_keys(x, table), w


def kl_target(attention: Attention, made: Projections) -> tuple[Array, Array]:
    """Queries and latents of the attention that the indexer is to follow, detached."""
    return lax.stop_gradient((absorb(made.q_nope, made.q_rope, attention.k_b[...]), made.kv))


def select(
    q: Array, k: IndexKeys, w: Array, method: hj.Method, layout: Layout | None, mesh: Mesh | None = None
) -> Array:
    """What queries of whole sequences select.

    Args:
        q, k, w: [B, T, H, D], [B, T, D] and [B, T, H].
        method: how to select.
        layout: of packed rows; None: each row is one sequence.
        mesh: what the batch is split over, or None.

    Returns: [B, T, topk] int32, counted from the start of each sequence, -1 in padding.
    """
    if layout is None:
        whole: Callable = lambda q, k, w: hj.select(q, k, w, method).indices  # noqa: E731
        return per_device(whole, mesh, (("batch",),) * 3, ("batch",))(q, k, w)

    def packed(q: Array, k: IndexKeys, w: Array, positions: Array, cu_seqlens: Array) -> Array:
        B, T = positions.shape
        # All rows in one, the padding of each a sequence of its own.
        starts = (cu_seqlens + T * jnp.arange(B, dtype=jnp.int32)[:, None]).reshape(-1)
        offsets = jnp.concatenate([starts, jnp.full((1,), B * T, jnp.int32)])
        q, k, w = jax.tree.map(lambda x: x.reshape(B * T, *x.shape[2:]), (q, k, w))
        indices = hj.select_packed(q, k, w, offsets, offsets, method).indices
        return jnp.where(positions[..., None] < 0, -1, indices.reshape(B, T, -1))

    packed = per_device(packed, mesh, (("batch",),) * 5, ("batch",))
    return packed(q, k, w, layout.positions, layout.cu_seqlens)


def alike(*selections: Array) -> tuple[Array, ...]:
    """Selections [B, T, K] of any K with -1 at their ends, so that they are equally wide."""
    width = max(x.shape[-1] for x in selections)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])), constant_values=-1)  # noqa: E731
    return tuple(map(pad, selections))
