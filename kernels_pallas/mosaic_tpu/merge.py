"""The best of what several devices have found: rows of their candidates, sort key and position of each.
    o[t] = the positions of the k largest x[t], in column order, then -1; the lowest columns win ties

Floor, 4096 rows of 8 devices' 2048 on v5e: HBM 604 MB / 819 GB/s = 0.74 ms. Bound by the vector slots, as `topk`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import look_up
from hisa_jax.kernels_pallas.mosaic_tpu.topk import from_tiles, padded_groups, to_tiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

_WINDOW_BYTES = 24 << 20


def tiles_of(W: int, k: int) -> int:
    """Eights of rows a grid step, whose searches share the latency of a sum over lanes: four while they fit."""
    row_bytes = 4 * (4 * padded_groups(W) * LANES + 5 * (k + SLOTS))
    return max(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * ROWS * row_bytes <= _WINDOW_BYTES)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("k", "interpret"))
def merge(sort_keys: Array, positions: Array, k: int, *, interpret: Interpret = False) -> tuple[Array, Array]:
    """[T, W] int32 each, `INVISIBLE` where there is no candidate -> positions, sort keys, [T, k] int32 each.

    Positions ascend along a row as far as there are candidates, so the lowest win ties.
    """
    T, W = sort_keys.shape
    groups, slots, tiles = padded_groups(W), -(-k // SLOTS) * SLOTS, tiles_of(W, k)
    rows = -(-T // (tiles * ROWS)) * tiles * ROWS
    n = jnp.pad(jnp.sum(sort_keys != INVISIBLE, axis=1, dtype=jnp.int32), (0, rows - T)).reshape(-1, ROWS, 1)
    tiled = lambda *shape: pl.BlockSpec((tiles, *shape), lambda t: (t, 0, 0))  # noqa: E731
    in_slots = (slots // LANES * ROWS, LANES)
    out = launch.call(
        functools.partial(merge_body, k),
        name="hisa_merge",
        grid=(rows // (tiles * ROWS),),
        prefetch=[],
        operands=[to_tiles(sort_keys, rows, groups), to_tiles(positions, rows, groups), n],
        in_specs=[tiled(groups * ROWS, LANES), tiled(groups * ROWS, LANES), tiled(ROWS, 1)],
        out_specs=[tiled(*in_slots)] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows // ROWS, *in_slots), jnp.int32)] * 2,
        scratch={
            "thresholds_vmem": pltpu.VMEM((tiles, ROWS, LANES), jnp.int32),
            "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
            "chosen_vmem": pltpu.VMEM((tiles, *in_slots), jnp.int32),
        },
        vmem_bytes=4 * tiles * ROWS * (4 * groups * LANES + 5 * slots + LANES),
        interpret=interpret,
        dimension_semantics=("parallel",),
    )
    positions, sort_keys = (from_tiles(x)[:T, :k] for x in out)
    return positions, sort_keys


def merge_body(
    k: int, sort_keys_ref: Ref, positions_ref: Ref, n_ref: Ref, o_ref: Ref, o_sort_keys_ref: Ref, *,
    thresholds_vmem: Ref, table_vmem: Ref, chosen_vmem: Ref
) -> None:  # fmt: skip
    """All [tiles, groups * 8, 128] int32, as sort keys lie; n_ref: [tiles, 8, 1], candidates of each row."""
    n = jnp.broadcast_to(n_ref[...], thresholds_vmem.shape)
    topk_body.select(sort_keys_ref, n, k, thresholds_vmem, table_vmem, chosen_vmem)

    def one_tile(tile: Array, _: None) -> None:
        for values_ref, out_ref in ((positions_ref, o_ref), (sort_keys_ref, o_sort_keys_ref)):

            def store(i: int, x: Array, out_ref: Ref = out_ref) -> None:
                out_ref[tile, pl.ds(i * ROWS, ROWS)] = x

            look_up(values_ref.at[tile], chosen_vmem.at[tile], o_ref.shape[1] // ROWS * LANES, store)

    lax.fori_loop(0, o_ref.shape[0], one_tile, None)
