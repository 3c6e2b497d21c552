"""Where a layer reads what its rows remember, if `context` splits their pages: there, or together on every device.

    few new tokens   queries go to the pages: devices exchange candidates, absorbed queries and sums of values
    many             pages go to the queries: each device gets all pages of the rows of this pass, for this layer, and
                     then takes its share of the index queries and of the heads, as a rank of `model` does

A token of DeepSeek-V3.2 has 1.3 KB in a layer's pages, and its queries and values are 410 KB. So a chunk of 16,384
tokens sends less by its pages as long as they have room for five million tokens. The copies take no more memory than
what they replace, which is as large at that point, and one layer's are gone when the next one's are made.
"""

from typing import NamedTuple

from jax import Array
from jax.sharding import Mesh

import hisa_jax as hj
from hisa_jax.models.config import Config
from hisa_jax.models.sharding import mesh_axis, size_of
from hisa_jax.sharded import gathered
from hisa_jax.sharded.meshes import Axes
from hisa_jax.sharded.stripes import Shard


class Memory(NamedTuple):
    """The pages that a layer reads, and how.

    Attributes:
        pages, block_tables: of the layer, all new tokens among them.
        mesh: what they, heads and index queries are split over, or None.
        stripe: tokens of a row one after the other that one device has, where several share its pages.
    """

    pages: hj.IndexCache
    block_tables: Array
    mesh: Mesh | None
    stripe: int | None


def memory_of(config: Config, memory: Memory, n_tokens: int) -> Memory:
    """How a pass of so many tokens a row reads: as it is, or pages gathered and a mesh without `context`."""
    pages, tables, mesh, stripe = memory
    if mesh is None or stripe is None or not is_gathered(config, pages, tables.shape, mesh, n_tokens):
        return memory
    axes = Axes(mesh, "context", mesh_axis(mesh, "batch", tables.shape[0]))
    shard = Shard("context", axes.n_devices, stripe, tables.shape[1] * pages.page_size)
    copies, tables = gathered.pages_of_all(pages, tables, axes, shard)
    return Memory(copies, tables, ranks_alone(mesh), None)


def is_gathered(
    config: Config, pages: hj.IndexCache, tables: tuple[int, ...], mesh: Mesh, n_tokens: int
) -> bool:  # fmt: skip
    """Whether pages go to the queries: if all in the tables [B, P] are fewer bytes than queries and values are.

    Not where the heads cannot be split over the devices that would have the same pages then.
    """
    n_heads, n_ranks, n_devices = config.num_attention_heads, size_of(mesh, "model"), size_of(mesh, "context")
    if n_devices == 1 or n_heads % (n_ranks * n_devices):
        return False
    assert pages.latents is not None  # a model's cache holds them
    row_bytes = gathered.nbytes(pages) // pages.n_pages * tables[1]
    # Queries go to all, values to who adds them up and from there to all.
    wide = config.kv_lora_rank + config.qk_rope_head_dim + 2 * config.kv_lora_rank
    itemsize = 2 if isinstance(pages.latents, hj.QuantizedLatents) else pages.latents.dtype.itemsize
    return 0 < row_bytes <= n_tokens * (n_heads // n_ranks) * wide * itemsize


def ranks_alone(mesh: Mesh) -> Mesh:
    """The same devices, with those of `context` as ranks of `model`: heads lie where they lay."""
    sizes = {name: mesh.shape[name] for name in mesh.axis_names if name not in ("model", "context")}
    names = (*sizes, "model")
    # Of weights that both axes split, `model` has the larger parts (sharding.RULES).
    order = [mesh.axis_names.index(name) for name in (*names, "context") if name in mesh.axis_names]
    devices = mesh.devices.transpose(order).reshape(*sizes.values(), -1)
    return Mesh(devices, names, axis_types=mesh.axis_types[:1] * len(names))
