"""The best of what several devices have found: rows of their candidates, sort key and position of each.
    o[t] = the positions of the k largest x[t], in column order, then -1; the lowest columns win ties

Floor, 4096 rows of 8 devices' 2048 on v5e: HBM 604 MB / 819 GB/s = 0.74 ms. Bound by the vector slots, as `topk`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Launch
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import in_tile, look_up
from hisa_jax.kernels_pallas.mosaic_tpu.topk import from_tiles, padded_groups, to_tiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

_WINDOW_BYTES = 24 << 20


def tiles_of(W: int, k: int) -> int:
    """Eights of rows a grid step, whose searches share the latency of a sum over lanes: four while they fit."""
    row_bytes = 4 * (4 * padded_groups(W) * LANES + 5 * (k + SLOTS))
    return max(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * SUBLANES * row_bytes <= _WINDOW_BYTES)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("k", "interpret"))
def merge(sort_keys: Array, positions: Array, k: int, *, interpret: Interpret = False) -> tuple[Array, Array]:
    """[T, W] int32 each, `INVISIBLE` where there is no candidate -> positions, sort keys, [T, k] int32 each.

    Positions ascend along a row as far as there are candidates, so the lowest win ties.
    """
    T, W = sort_keys.shape
    # What devices sent is a reshape away from tiles, one that the v7x does not have: XLA is to make rows of it first.
    sort_keys, positions = lax.optimization_barrier((sort_keys, positions))
    groups, slots, tiles = padded_groups(W), -(-k // SLOTS) * SLOTS, tiles_of(W, k)
    rows = -(-T // (tiles * SUBLANES)) * tiles * SUBLANES
    n = jnp.pad(jnp.sum(sort_keys != INVISIBLE, axis=1, dtype=jnp.int32), (0, rows - T)).reshape(-1, SUBLANES, 1)
    tiled = lambda *shape: pl.BlockSpec((tiles, *shape), lambda t: (t, 0, 0))  # noqa: E731
    in_slots = (slots // LANES * SUBLANES, LANES)
    out = launch.out(tiled(*in_slots), rows // SUBLANES, *in_slots)
    best = Launch(
        body=functools.partial(merge_body, k),
        refs=Refs,
        name="hisa_merge",
        grid=(rows // (tiles * SUBLANES),),
        scalars={},
        operands={
            "sort_keys": (to_tiles(sort_keys, rows, groups), tiled(groups * SUBLANES, LANES)),
            "positions": (to_tiles(positions, rows, groups), tiled(groups * SUBLANES, LANES)),
            "n": (n, tiled(SUBLANES, 1)),
        },
        outs={"best_positions": out, "best_sort_keys": out},
        scratch={
            "thresholds_vmem": pltpu.VMEM((tiles, SUBLANES, LANES), jnp.int32),
            "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
            "chosen_vmem": pltpu.VMEM((tiles, *in_slots), jnp.int32),
        },
        vmem_bytes=4 * tiles * SUBLANES * (4 * groups * LANES + 5 * slots + LANES),
        interpret=interpret,
        dimension_semantics=("parallel",),
    )()
    positions, sort_keys = (from_tiles(x)[:T, :k] for x in best)
    return positions, sort_keys


class Refs(NamedTuple):
    """The buffers, all int32; `slots` are those of the output."""

    sort_keys: Ref  # [tiles, groups * 8, LANES], of the candidates
    positions: Ref  # the same
    n: Ref  # [tiles, 8, 1], candidates of each row
    best_positions: Ref  # out: [tiles, slots // 16, LANES]
    best_sort_keys: Ref  # out: the same
    thresholds_vmem: Ref  # [tiles, 8, LANES]
    table_vmem: Ref  # see `topk_body.table_shape`
    chosen_vmem: Ref  # [tiles, slots // 16, LANES], columns of the best


def merge_body(k: int, refs: Refs) -> None:
    """The best columns of each row, then what stands in them: nothing is copied by hand."""
    n = jnp.broadcast_to(refs.n[...], refs.thresholds_vmem.shape)
    topk_body.select(refs.sort_keys, n, k, refs.thresholds_vmem, refs.table_vmem, refs.chosen_vmem)

    def one_tile(tile: Array, _: None) -> None:
        for values, out in ((refs.positions, refs.best_positions), (refs.sort_keys, refs.best_sort_keys)):

            def store(i: int, x: Array, out: Ref = out) -> None:
                out[tile, pl.ds(i * SUBLANES, SUBLANES)] = x

            groups, slots = values.shape[1] // SUBLANES, out.shape[1] // SUBLANES * LANES
            look_up(in_tile(values.at[tile]), groups, refs.chosen_vmem.at[tile], slots, store)

    lax.fori_loop(0, refs.best_positions.shape[0], one_tile, None)
