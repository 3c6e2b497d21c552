"""A model whose like layers are stacked: one program runs them one after the other, so it compiles in minutes.

Weights of a run of like layers lie in one array, a layer after the other. So do their pages, in one `hj.IndexCache`:
a layer's table is that of all layers, moved to its pages. Nothing of a layer's cache is copied on the way, and writes
are in place.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

import hisa_jax as hj
from hisa_jax.models.cache import Cache, pages_sharding
from hisa_jax.models.modeling import Layer, LayerTrace, Model
from hisa_jax.models.plan import Phase
from hisa_jax.models.sharding import mesh_axes, size_of
from hisa_jax.selection import nothing


class Run(NamedTuple):
    """So many like layers after each other, from the first one's number on."""

    first: int
    n: int


class Stacked(Model):
    """The same model, its weights copied into stacks. `Cache.layers` has the pages of a run, not of a layer.

    Args:
        model: on a mesh or not.
    """

    def __init__(self, model: Model):
        self.config, self.folder, self.plan, self.mesh = model.config, model.folder, model.plan, model.mesh
        self._page_size = model._page_size
        self.embed, self.norm, self.head = model.embed, model.norm, model.head
        self.runs = nnx.List([_stacked([model.layers[first + i] for i in range(n)]) for first, n in runs_of(model)])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """As of the model, but for its layers' pages, which lie in those of their run."""
        cache = super().empty_cache(batch, capacity)
        return dataclasses.replace(cache, layers=self.empty_pages(cache.layers[0].n_pages))

    def empty_pages(self, n_pages: int) -> tuple[hj.IndexCache, ...]:
        """Pages of every run, `n_pages` a layer, in the order that `table_of_layer` has them."""
        of_layers = super().empty_pages

        def make() -> tuple[hj.IndexCache, ...]:
            pages = of_layers(n_pages)
            return tuple(
                jax.tree.map(lambda leaf, n=n: jnp.concatenate([leaf] * n), pages[first]) for first, n in runs_of(self)
            )

        return jax.jit(make, out_shardings=None if self.mesh is None else pages_sharding(self.mesh, n_pages))()

    def _through_layers(
        self, x: Array, cache: Cache, phase: Phase, trace: bool, every: Any
    ) -> tuple[Array, list[hj.IndexCache], list[LayerTrace]]:
        if trace:
            raise ValueError("Stacked: trace=True, wanted a model of single layers: a stack keeps nothing of one")
        selection, pages = None, []
        for run, layers, run_pages in zip(runs_of(self), self.runs, cache.layers, strict=True):
            method = self.plan(run.first, phase)
            if selection is None or self.config.indexer_kinds[run.first] == "full":
                selection = nothing(x.shape[:2], method, False, False)
            x, run_pages, selection = self._through_run(
                run, layers, (x, run_pages, selection), cache.block_tables, method, every
            )
            pages.append(run_pages)
        return x, pages, []

    def _through_run(
        self, run: Run, layers: Layer, carry: tuple[Array, hj.IndexCache, hj.Selection], tables: Array,
        method: hj.Method, every: Any,
    ) -> tuple[Array, hj.IndexCache, hj.Selection]:  # fmt: skip
        graph, weights = nnx.split(layers)
        n_groups = math.prod(size_of(self.mesh, axis) for axis in mesh_axes(self.mesh, "batch", tables.shape[0]))
        n_devices = size_of(self.mesh, "context")

        def one(
            carry: tuple[Array, hj.IndexCache, hj.Selection], layer: tuple[Array, nnx.State]
        ) -> tuple[tuple[Array, hj.IndexCache, hj.Selection], None]:
            (x, pages, selection), (i, weights) = carry, layer
            own = table_of_layer(tables, i, run.n, pages.n_pages // n_groups, n_devices)
            pages, trace = nnx.merge(graph, weights)(
                x, pages=pages, block_tables=own, method=method, selection=selection, **every
            )
            return (trace.hidden, pages, trace.selection), None

        return lax.scan(one, carry, (jnp.arange(run.n, dtype=jnp.int32), weights))[0]


def table_of_layer(tables: Array, layer: Array, n_layers: int, n_pages: int, n_devices: int = 1) -> Array:
    """Pages of one layer among those of all.

    Args:
        tables: [B, P] int32, pages of a layer, from 0; numbers that are none stay none.
        layer: which of `n_layers`.
        n_pages: of all layers together.
        n_devices: over which they are split in equal parts: each has an equal part of every layer.

    Returns: [B, P] int32; page p of a layer lies on the device on which it would lie alone.
    """
    own = n_pages // (n_layers * n_devices)
    is_page = (tables >= 0) & (tables < own * n_devices)
    return jnp.where(is_page, (tables // own * n_layers + layer) * own + tables % own, -1)


def runs_of(model: Model) -> Iterator[Run]:
    """Layers of the same kinds and methods that follow each other."""
    config, phases = model.config, get_args(Phase)

    def kind(i: int) -> tuple[Any, ...]:
        return config.layer_kinds[i], config.indexer_kinds[i], *(model.plan(i, phase) for phase in phases)

    for _, layers in itertools.groupby(range(config.num_hidden_layers), kind):
        numbers = list(layers)
        yield Run(numbers[0], len(numbers))


def _stacked(layers: list[Layer]) -> Layer:
    """One layer whose parameters have those of all along a new first axis."""
    graph, first = nnx.split(layers[0])
    states = [first, *(nnx.state(layer) for layer in layers[1:])]
    return nnx.merge(graph, jax.tree.map(lambda *xs: jnp.stack(xs), *states))
