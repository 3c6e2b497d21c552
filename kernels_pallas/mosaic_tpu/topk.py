"""Exact top-k of rows of sort keys, ascending: the kernel by itself.
    o[t] = the columns of the k largest x[t], in column order, then -1; the lowest columns win ties

Floor, 4096 rows of 8192 on v5e: HBM 168 MB / 819 GB/s = 0.2 ms. Bound by the vector slots: about nine passes over a row
to find its threshold (compare, select, add: 6 cycles a pass and row), then the ordered output (`topk_body.py`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Launch
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

MAX_K = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tiles: int = 4  # of 8 rows a grid step: searches that share the latency of a sum over lanes

    def vmem_bytes(self, n: int, k: int) -> int:
        slots = -(-k // SLOTS) * SLOTS
        return self.tiles * SUBLANES * 4 * (2 * n + 2 * slots + 2 * LANES) + (1 << 20)


def heuristic(n: int, k: int, vmem_bytes: int = 64 << 20) -> Config:
    """Four tiles while they fit."""
    config = Config()
    while config.tiles > 1 and config.vmem_bytes(n, k) > vmem_bytes // 2:
        config = dataclasses.replace(config, tiles=config.tiles // 2)
    return config


def padded_groups(n: int) -> int:
    """Groups of 128 that rows of n candidates are padded to: 8, 16, 32, 64 or a multiple of 128."""
    groups = max(-(-n // LANES), SUBLANES)
    return pl.next_power_of_2(groups) if groups <= LANES else -(-groups // LANES) * LANES


def to_tiles(x: Array, rows: int, groups: int) -> Array:
    """[T, n] -> [rows // 8, groups * 8, 128], padded with `INVISIBLE`: the memory order of the array that it is."""
    T, n = x.shape
    if (rows, groups * LANES) != (T, n):
        x = jnp.pad(x, ((0, rows - T), (0, groups * LANES - n)), constant_values=INVISIBLE)
    return (
        x.reshape(rows // SUBLANES, SUBLANES, groups, LANES)
        .swapaxes(1, 2)
        .reshape(rows // SUBLANES, groups * SUBLANES, LANES)
    )


def from_tiles(x: Array) -> Array:
    """Inverts `to_tiles`."""
    tiles, sublanes, _ = x.shape
    return x.reshape(tiles, sublanes // SUBLANES, SUBLANES, LANES).swapaxes(1, 2).reshape(tiles * SUBLANES, -1)


@functools.partial(jax.jit, static_argnames=("k", "config", "interpret"))
def topk(
    x: Array, n: Array, k: int, *, config: Config | None = None, interpret: Interpret = False
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        n: how many sort keys of each row are not `INVISIBLE`.
    """
    T, W = x.shape
    groups, slots = padded_groups(W), -(-k // SLOTS) * SLOTS
    config = config or heuristic(groups * LANES, k)
    step = config.tiles * SUBLANES
    rows = -(-T // step) * step
    n = jnp.pad(n.astype(jnp.int32), (0, rows - T)).reshape(-1, SUBLANES, 1)
    tiled = lambda *shape: pl.BlockSpec((config.tiles, *shape), lambda t: (t, 0, 0))  # noqa: E731
    in_slots = (slots // LANES * SUBLANES, LANES)
    (out,) = Launch(
        body=functools.partial(topk_kernel, k),
        refs=Refs,
        name="hisa_topk",
        grid=(rows // step,),
        scalars={},
        operands={
            "sort_keys": (to_tiles(x, rows, groups), tiled(groups * SUBLANES, LANES)),
            "n": (n, tiled(SUBLANES, 1)),
        },
        outs={"chosen": launch.out(tiled(*in_slots), rows // SUBLANES, *in_slots)},
        scratch={
            "thresholds_vmem": pltpu.VMEM((config.tiles, SUBLANES, LANES), jnp.int32),
            "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
        },
        vmem_bytes=config.vmem_bytes(groups * LANES, k) + (2 << 20),
        interpret=interpret,
        dimension_semantics=("parallel",),
    )()
    return from_tiles(out)[:T, :k], jnp.minimum(n.reshape(-1)[:T], k)


class Refs(NamedTuple):
    """The buffers, all int32."""

    sort_keys: Ref  # [tiles, groups * 8, LANES]
    n: Ref  # [tiles, 8, 1], sort keys of each row that are not `INVISIBLE`
    chosen: Ref  # out: [tiles, slots // 16, LANES]
    thresholds_vmem: Ref  # [tiles, 8, LANES]
    table_vmem: Ref  # see `topk_body.table_shape`


def topk_kernel(k: int, refs: Refs) -> None:
    """A few tiles of eight rows: everything is in `topk_body`, nothing is copied by hand."""
    n = jnp.broadcast_to(refs.n[...], refs.thresholds_vmem.shape)
    topk_body.select(refs.sort_keys, n, k, refs.thresholds_vmem, refs.table_vmem, refs.chosen)
