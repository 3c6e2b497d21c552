"""A step of a whole model on a mesh, from shapes alone: nothing is made of its weights and its cache."""

import dataclasses
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from bench.pods.rows import Row
from bench.tpu import aot
from bench.tpu.chips import CHIPS
from hisa_jax import dispatch, models
from hisa_jax.models.cache import Cache, row_after_row
from hisa_jax.models.sharding import spec_of
from hisa_jax.models.stacked import Stacked, runs_of


class Step(NamedTuple):
    """A compiled step.

    Attributes:
        program: of `bench.tpu.aot`.
        weight_bytes, cache_bytes: of a device.
        runs: how many layers each run of like ones has.
    """

    program: aot.Program
    weight_bytes: int
    cache_bytes: int
    runs: tuple[int, ...]


def config_of(row: Row) -> models.Config:
    config = getattr(models, row.model)()
    first, end = row.layers or (0, config.num_hidden_layers)
    kinds: Any = dict(layer_kinds=config.layer_kinds[first:end], indexer_kinds=config.indexer_kinds[first:end])
    experts = row.experts or config.n_routed_experts
    return dataclasses.replace(config, num_hidden_layers=end - first, n_routed_experts=experts, **kinds)


def mesh_of(row: Row) -> Mesh:
    """The row's mesh over all devices of its chip's pod slice."""
    # Only whole axes of the torus make an axis here: those within a group are one at first.
    whole = aot.pod_mesh(row.chip, data=row.data, group=row.n_devices // row.data)
    axes = row.axes
    return Mesh(whole.devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_step(row: Row, mesh: Mesh, *, schedules: bool = True) -> Step:
    """Compiles the row's step: greedy tokens, the pages with the new tokens in place of those before, and lengths."""
    config = config_of(row)
    options: Any = dict(method=row.method, dtype=jnp.bfloat16, weight_dtype={"e4m3": "float8_e4m3fn"}.get(row.weights))
    model = nnx.eval_shape(lambda: Stacked(models.from_config(config, rngs=nnx.Rngs(0), **options)))
    model.mesh = mesh
    graph, state = nnx.split(model)
    state = nnx.from_flat_state([(path, _placed(x, mesh)) for path, x in nnx.to_flat_state(state)])
    per_request = row.context // model.page_size

    def empty_pages(state: nnx.State) -> tuple[hj.IndexCache, ...]:
        alone = nnx.merge(graph, state)
        alone.mesh = None
        return alone.empty_pages(row.batch * per_request)

    pages = jax.tree.map(lambda x: _page(x, mesh), jax.eval_shape(empty_pages, state))

    def step(state: nnx.State, pages: Any, tables: Array, lengths: Array, ids: Array) -> Any:
        cache = Cache(layers=pages, block_tables=tables, lengths=lengths)
        out = nnx.merge(graph, state).run(ids, cache=cache, phase=row.phase, last_only=True)
        return jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32), out.cache.layers, out.cache.lengths

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P("data")))

    operands = state, pages, rows(row.batch, per_request), rows(row.batch), rows(row.batch, row.queries)
    # Pages come out as they went in, so that a step writes them in place.
    outs = None, jax.tree.map(lambda x: x.format, pages), None
    device = dispatch.Device(platform="tpu", kind=CHIPS[row.chip].kind)
    with mock.patch.object(dispatch.Device, "default", lambda: device):
        program = aot.compile_sharded(
            row.chip, step, mesh, *operands, donate_argnums=1, out_shardings=outs, schedules=schedules
        )
    runs = tuple(n for _, n in runs_of(model))
    return Step(program, _bytes(state), _bytes(pages), runs)


def _placed(parameter: nnx.Variable, mesh: Mesh) -> nnx.Variable:
    """Shapes of a parameter where it will lie; those in a stack have an axis more."""
    axes = parameter.get_metadata("axes")

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        n = x.ndim - len(axes)
        spec = P(*(None,) * n, *spec_of(mesh, x.shape[n:], axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return parameter.replace(jax.tree.map(place, parameter.get_value()))


def _page(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """As an engine's pages lie on a TPU."""
    where = row_after_row(x, NamedSharding(mesh, P(("data", "context"))))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _bytes(tree: Any) -> int:
    """Of a device, without padding."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
