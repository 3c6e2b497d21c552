"""Exact top-k of rows of score sort keys, ascending: the kernel by itself.
    o[t] = the columns of the k largest x[t], in column order, then -1; the lowest columns win ties

Floor, 4096 rows of 8192 on v5e: HBM 168 MB / 819 GB/s = 0.2 ms. Bound by the vector slots: about nine passes over a row
to find its threshold (compare, select, add: 6 cycles a pass and row), then the ordered output (`topk_body.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, ROWS
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
        return self.tiles * ROWS * 4 * (2 * n + 2 * slots + 2 * LANES) + (1 << 20)


def heuristic(n: int, k: int, vmem_bytes: int = 64 << 20) -> Config:
    """Four tiles while they fit."""
    config = Config()
    while config.tiles > 1 and config.vmem_bytes(n, k) > vmem_bytes // 2:
        config = dataclasses.replace(config, tiles=config.tiles // 2)
    return config


def padded_groups(n: int) -> int:
    """Groups of 128 that rows of n candidates are padded to: 8, 16, 32, 64 or a multiple of 128."""
    groups = max(-(-n // LANES), ROWS)
    return pl.next_power_of_2(groups) if groups <= LANES else -(-groups // LANES) * LANES


def to_tiles(x: Array, rows: int, groups: int) -> Array:
    """[T, n] -> [rows // 8, groups * 8, 128], padded with `INVISIBLE`: the memory order of the array that it is."""
    T, n = x.shape
    if (rows, groups * LANES) != (T, n):
        x = jnp.pad(x, ((0, rows - T), (0, groups * LANES - n)), constant_values=INVISIBLE)
    return x.reshape(rows // ROWS, ROWS, groups, LANES).swapaxes(1, 2).reshape(rows // ROWS, groups * ROWS, LANES)


def from_tiles(x: Array) -> Array:
    """Inverts `to_tiles`."""
    tiles, sublanes, _ = x.shape
    return x.reshape(tiles, sublanes // ROWS, ROWS, LANES).swapaxes(1, 2).reshape(tiles * ROWS, -1)


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
    step = config.tiles * ROWS
    rows = -(-T // step) * step
    n = jnp.pad(n.astype(jnp.int32), (0, rows - T)).reshape(-1, ROWS, 1)
    out = pl.pallas_call(
        functools.partial(_kernel, k=k),
        grid=(rows // step,),
        in_specs=[
            pl.BlockSpec((config.tiles, groups * ROWS, LANES), lambda t: (t, 0, 0)),
            pl.BlockSpec((config.tiles, ROWS, 1), lambda t: (t, 0, 0)),
        ],
        out_specs=pl.BlockSpec((config.tiles, slots // LANES * ROWS, LANES), lambda t: (t, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows // ROWS, slots // LANES * ROWS, LANES), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((config.tiles, ROWS, LANES), jnp.int32),
            pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=config.vmem_bytes(groups * LANES, k) + (8 << 20)
        ),
        name="hisa_topk",
        interpret=interpret,
    )(to_tiles(x, rows, groups), n)
    return from_tiles(out)[:T, :k], jnp.minimum(n.reshape(-1)[:T], k)


def _kernel(x_ref: Ref, n_ref: Ref, o_ref: Ref, thresholds_ref: Ref, table_ref: Ref, *, k: int) -> None:
    n = jnp.broadcast_to(n_ref[...], thresholds_ref.shape)
    topk_body.select(x_ref, n, k, thresholds_ref, table_ref, o_ref)
