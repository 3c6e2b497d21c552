"""Recall of a model's selections against the flat indexer's, while it generates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from hisa_jax.methods import flat_of
from hisa_jax.models.dsa import select
from hisa_jax.models.memory import Memory
from hisa_jax.models.modeling import Model, Output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecallSums:
    """Recall against the flat indexer, summed over queries that see more than topk tokens, and their number.

    Attributes:
        total, count: [layers] float32; 0 in layers that share a selection.
    """

    total: Array
    count: Array

    def __add__(self, other: "RecallSums") -> "RecallSums":
        return RecallSums(self.total + other.total, self.count + other.count)

    def means(self) -> list[float | None]:
        """Mean recall of each layer, None where there was no such query."""
        pairs = zip(np.asarray(self.total).tolist(), np.asarray(self.count).tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


def no_recall(model: Model) -> RecallSums:
    zeros = jnp.zeros((model.config.num_hidden_layers,), jnp.float32)
    return RecallSums(zeros, zeros)


def recall_of(model: Model, out: Output, is_wanted: bool) -> RecallSums:
    """Of a forward pass that kept what its layers selected by; nothing unless it is wanted."""
    sums = no_recall(model)
    if not is_wanted:
        return sums
    for i, layer in enumerate(out.layers):
        if layer.index_inputs is None:
            continue
        flat = flat_of(model.plan.layers[i])
        q, _, w = layer.index_inputs
        memory = Memory(out.cache.layers[i], out.cache.block_tables, model.mesh, model.stripe)
        reference = select(q, w, memory, out.slots, out.cache.lengths, flat)
        chooses = out.slots >= flat.topk  # a query that sees no more than topk tokens selects them all
        recall = jnp.where(chooses, hj.compare(layer.selection, reference).recall, 0)
        sums += RecallSums(
            jnp.zeros_like(sums.total).at[i].set(jnp.sum(recall)),
            jnp.zeros_like(sums.count).at[i].set(jnp.sum(chooses, dtype=jnp.float32)),
        )
    return sums
