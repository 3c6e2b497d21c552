"""The layer whole and in parts: the model's own functions, each compiled for itself."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from bench.layer.setting import Inputs, Setting, make
from bench.timing import in_turn
from hisa_jax.models import dsa
from hisa_jax.models.cache import packing, write
from hisa_jax.models.memory import Memory

Call = Callable[[], Any]


class Result(NamedTuple):
    """What the whole layer gives, its pages last."""

    out: Array
    selection: hj.Selection
    pages: hj.IndexCache


class Layer:
    """A setting's layer, and the arrays between its parts.

    Attributes:
        inputs: of a call; `pages`: with the new tokens, which each call writes again.
        projections, q, keys, w, absorbed: what the parts before attention give.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.graph, self.inputs, pages = make(setting)
        self.projections: dsa.Projections = jax.jit(self._project)(*self._hidden)
        self.q, self.keys, self.w = jax.jit(self._index)(*self._hidden, self.projections.q_latent)
        self.pages = jax.jit(write, donate_argnums=0)(pages, *self._append_operands)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """The layer's, in float32, by name, for checks."""
        return jax.tree.map(lambda x: np.asarray(x, np.float32), nnx.to_pure_dict(self.inputs.state))

    def parts(self) -> Iterator[tuple[str, Call]]:
        """The parts that no method changes; `append` has pages of its own."""
        config, x = self.setting.config, self.inputs.x
        shape = (*x.shape[:2], config.num_attention_heads, config.v_head_dim)
        values = jax.random.normal(jax.random.key(2), shape, x.dtype)
        yield "project", _bound(self._project, *self._hidden)
        yield "indexer", _bound(self._index, *self._hidden, self.projections.q_latent)
        yield "append", in_turn(write, (self.pages, *self._append_operands))
        yield "output", _bound(self._output, self.inputs.state, values)

    def parts_of(self, method: hj.Method) -> Iterator[tuple[str, Call]]:
        """Those that it does change; `sparse_mla` is the kernel alone, a part of `attention`."""
        x = self.inputs
        select = functools.partial(self._select, method)
        operands = self.q, self.w, _memory(self.pages, x), x.slots, x.lengths
        selection = jax.jit(select)(*operands)
        yield "select", _bound(select, *operands)
        yield "attention", _bound(self._attention, x, self.projections, self.pages, selection.indices)
        rows = packing(x.slots)
        q = rows.pack(jax.jit(self._absorb)(x.state, self.projections))
        scale, value_dim = self.setting.config.softmax_scale, self.setting.config.kv_lora_rank
        sparse = functools.partial(hj.sparse_mla_paged, scale=scale, value_dim=value_dim)
        indices = rows.pack(selection.indices)
        yield "sparse_mla", _bound(sparse, q, self.pages, indices, x.block_tables, rows.cu_seqlens)

    def whole(self, method: hj.Method) -> tuple[Callable[..., Result], tuple]:
        """The layer as the model calls it, and its operands, the pages first, which it uses up."""

        def call(pages: hj.IndexCache, inputs: Inputs) -> Result:
            out, pages, selection, _ = self._layer(inputs.state)(
                inputs.x, table=inputs.table, slots=inputs.slots, lengths=inputs.lengths, pages=pages,
                block_tables=inputs.block_tables, method=method, selection=None, form="absorbed", mesh=None,
            )  # fmt: skip
            return Result(out, selection, pages)

        return call, (self.pages, self.inputs)

    def plain_queries(self, b: int, t: int) -> tuple[Array, Array]:
        """Index query [H, D] and head weights [H] of one token as they are before they are quantised."""
        at = slice(b, b + 1), slice(t, t + 1)
        table = jax.tree.map(lambda part: part[at], self.inputs.table)
        q, w = self._indexer(self.inputs.state).plain_queries(self.projections.q_latent[at], self.inputs.x[at], table)
        return q[0, 0], w[0, 0]

    @property
    def _hidden(self) -> tuple:
        return self.inputs.state, self.inputs.x, self.inputs.table

    @property
    def _append_operands(self) -> tuple:
        x = self.inputs
        return self.keys, self.projections.kv, x.block_tables, x.slots, x.lengths

    def _layer(self, state: Any) -> dsa.Attention:
        return nnx.merge(self.graph, state)

    def _indexer(self, state: Any) -> dsa.Indexer:
        indexer = self._layer(state).indexer
        assert indexer is not None  # layer 0 has one
        return indexer

    def _project(self, state: Any, x: Array, table: dsa.Table) -> dsa.Projections:
        return self._layer(state).project(x, table)

    def _index(self, state: Any, x: Array, table: dsa.Table, q_latent: Array) -> tuple[Array, dsa.IndexKeys, Array]:
        indexer = self._indexer(state)
        q, w = indexer.queries(q_latent, x, table)
        return q, indexer.keys(x, table), w

    def _select(
        self, method: hj.Method, q: Array, w: Array, memory: Memory, slots: Array, lengths: Array
    ) -> hj.Selection:  # fmt: skip
        return dsa.select(q, w, memory, slots, lengths, method)

    def _absorb(self, state: Any, given: dsa.Projections) -> Array:
        return dsa.absorb(given.q_nope, given.q_rope, self._layer(state).k_b[...])

    def _attention(self, x: Inputs, given: dsa.Projections, pages: hj.IndexCache, indices: Array) -> Array:
        layer, scale, memory = self._layer(x.state), self.setting.config.softmax_scale, _memory(pages, x)
        return dsa.absorbed(given.q_nope, given.q_rope, memory, indices, layer.k_b[...], layer.v_b[...], scale)

    def _output(self, state: Any, values: Array) -> Array:
        return self._layer(state).merge_heads(values)


def _memory(pages: hj.IndexCache, x: Inputs) -> Memory:
    return Memory(pages, x.block_tables, mesh=None, stripe=None)


def _bound(f: Callable, *operands: Any) -> Call:
    compiled = jax.jit(f)
    return lambda: compiled(*operands)
