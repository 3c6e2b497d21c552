"""Context parallelism: the keys of each sequence in equal runs of whole blocks over a mesh axis, the queries on all.

Each device scores its own blocks and its own tokens. Devices exchange candidates alone, m blocks and topk tokens of
each with their scores, never a score a token, nor keys but those that a scan by kernels samples. Merging the exact best
of each gives the exact best of all. `select_xla.py` and `select_kernels.py` have what one device does. Many queries do
otherwise: `gathered.py`.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from hisa_jax import dispatch
from hisa_jax.layout import Call
from hisa_jax.methods import Method
from hisa_jax.selection import Selection
from hisa_jax.sharded import meshes
from hisa_jax.sharded.meshes import Axes
from hisa_jax.sharded.stripes import Shard
from hisa_jax.xla.select import Tiles


def select_batch(
    name: str, axes: Axes, call: Call, method: Method, tiles: Tiles, *, return_scores: bool, return_blocks: bool
) -> Selection:
    """`Implementation.select` of a batch on a mesh, by the named implementation."""
    select_shard, S = dispatch.IMPLEMENTATIONS[name].select_shard, call.max_keys
    assert select_shard is not None and axes.context is not None  # else it would have been declined
    one_device = functools.partial(
        select_shard,
        method=method,
        tiles=tiles,
        shard=Shard(axis=axes.context, n_devices=axes.n_devices, stripe=S // axes.n_devices, max_keys=S),
        return_scores=return_scores,
        return_blocks=return_blocks,
    )
    rows, split = PartitionSpec(axes.data), PartitionSpec(axes.data, axes.context)
    limits = jax.tree.map(lambda _: rows, dict(candidates=call.candidates, budget=call.budget))
    specs = Call(q=rows, w=rows, visible=rows, k=split, lengths=rows, **limits)  # type: ignore[arg-type]
    return meshes.on_devices(one_device, axes.mesh, (specs,), rows)(call)
