"""The flat indexer: all visible keys scored and the exact top-k of them, in one kernel.
    o[t] = the topk tokens s < visible[t] of largest scale[s] * sum_h w[t, h] relu(q[t, h] . k[s]), ascending, then -1

Floor, 4096 queries of dsv32 at 128K on v5e: MXU 8.8 PFLOP / 197 TFLOP/s = 45 ms; HBM 128 passes over 32 MiB of keys =
5 ms. Bound by the MXU. The sort keys of a tile of queries wait in VMEM (4 bytes a query and token) for the exact
selection, so that nothing but keys and the chosen positions crosses HBM.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.flat_body import Plan, flat_body, products_a_step, ragged_body
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk import from_tiles, padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.types import Interpret, Ref

_SORT_KEYS_BYTES = 36 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_t: int = 32  # queries whose sort keys are in VMEM together
    tile_s: int = 2048  # keys a grid step

    def __post_init__(self) -> None:
        if self.tile_t % ROWS or self.tile_s % 256:
            raise ValueError(f"{self}: tile_t must be a multiple of {ROWS} and tile_s of 256")

    def vmem_bytes(self, H: int, D: int, S: int, k: int, itemsize: int) -> int:
        sort_keys = 4 * self.tile_t * padded_groups(S) * LANES
        keys = 2 * self.tile_s * (D * itemsize + 4 * ROWS)
        queries = 2 * self.tile_t * (H * D * itemsize + 4 * LANES) + 4 * self.tile_t * H * LANES
        slots = 2 * 4 * self.tile_t * -(-k // SLOTS) * SLOTS
        return sort_keys + keys + queries + slots + 4 * LANES * max(self.tile_t, 32) * 24


def heuristic(T: int, S: int) -> Config:
    """As many queries as their sort keys fit: each more halves what the keys' copies and a grid step cost a query."""
    tile_t = 32
    while tile_t > ROWS and (4 * tile_t * S > _SORT_KEYS_BYTES or tile_t >= 2 * T):
        tile_t //= 2
    return Config(tile_t=tile_t, tile_s=2048 if tile_t == 32 else 4096)


def why_not(S: int) -> str | None:
    """None, or why so many keys cannot be selected from."""
    most = _SORT_KEYS_BYTES // (4 * ROWS)
    return None if most >= S else f"the flat indexer needs at most {most} keys, not {S}"


@functools.partial(jax.jit, static_argnames=("topk", "config", "has_sort_keys", "interpret"))
def select_flat(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    config: Config | None = None,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[B, T, H, D], [B, S, D], [B, S] or None, [B, T, H], [B, T] -> indices [B, T, topk], count [B, T], both int32.

    With `has_sort_keys` also the sort keys of the chosen, [B, T, topk] int32, anything where there is none.
    """
    (B, T, H, D), S = q.shape, k.shape[1]
    config = config or heuristic(T, S)
    tile_t, tile_s = config.tile_t, min(config.tile_s, -(-S // 256) * 256)
    k, k_scale = whole_blocks(k, k_scale, tile_s)
    groups, slots = padded_groups(k.shape[1]), -(-topk // SLOTS) * SLOTS
    missing = -T % tile_t
    q, w, visible = (jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in (q, w, visible))
    visible = jnp.clip(visible, 0, S)
    tiles = (T + missing) // tile_t
    furthest = jnp.max(visible.reshape(B * tiles, tile_t), axis=1)

    def step(b, t, s, furthest_smem):
        # Beyond the last key that some query of the tile sees, the same keys again: nothing is copied.
        return jnp.minimum(s, jnp.maximum(pl.cdiv(furthest_smem[b * tiles + t], tile_s) - 1, 0))

    keys = pl.BlockSpec((None, tile_s, D), lambda b, t, s, last: (b, step(b, t, s, last), 0))
    scales = pl.BlockSpec((None, 1, tile_s), lambda b, t, s, last: (b, 0, step(b, t, s, last)))
    queries = lambda *shape: pl.BlockSpec((None, tile_t, *shape), lambda b, t, s, _: (b, t, *(0 for _ in shape)))  # noqa: E731
    tiled = (tile_t // ROWS, slots // LANES * ROWS, LANES)
    scale_rows = [] if k_scale is None else [k_scale[:, None]]
    in_rows = (tile_t // ROWS, ROWS, slots)
    out_shapes = [tiled, in_rows][: 1 + has_sort_keys]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B, tiles, k.shape[1] // tile_s),
        in_specs=[queries(H, D), queries(H), queries(1), keys, *([scales] * len(scale_rows))],
        out_specs=[pl.BlockSpec((None, *shape), lambda b, t, s, _: (b, t, 0, 0)) for shape in out_shapes],
        scratch_shapes=[
            pltpu.VMEM((tile_t // ROWS, groups * ROWS, LANES), jnp.int32),
            pltpu.VMEM((tile_t, H, LANES), jnp.float32),
            pltpu.VMEM((products_a_step(tile_t, tile_s) * tile_t * 2 * ROWS, LANES), jnp.float32),
            pltpu.VMEM((tile_t // ROWS, ROWS, LANES), jnp.int32),
            pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
        ],
    )
    out, *sort_keys = pl.pallas_call(
        functools.partial(
            flat_body,
            Plan(topk=topk, tiles=tiles, rows=min(T, ROWS), span=min(groups, LANES), has_sort_keys=has_sort_keys),
        ),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct((B, tiles * shape[0], *shape[1:]), jnp.int32) for shape in out_shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=config.vmem_bytes(H, D, k.shape[1], topk, q.dtype.itemsize)
            + 8 * has_sort_keys * tile_t * slots
            + (6 << 20),
        ),
        name="dsa_select_flat",
        interpret=interpret,
    )(furthest, q, w, visible[..., None], k, *scale_rows)
    indices = from_tiles(out.reshape(-1, *tiled[1:])).reshape(B, -1, slots)[:, :T, :topk]
    sort_keys = (x.reshape(B, -1, slots)[:, :T, :topk] for x in sort_keys)
    return indices, jnp.minimum(visible[:, :T], topk), *sort_keys


def select_ragged(q: Array, w: Array, visible: Array, ragged: Ragged, tiles: RaggedTiles, **options: Any) -> Array:
    """Of the sequences in `tiles`: [T, H, D], [T, H], [T] -> [T, topk] int32, as `select_flat`."""
    w, visible = tiles.gather(w), tiles.gather(visible)
    return tiles.scatter(_launch_ragged(q, w, visible, ragged.k, ragged.k_scale, tiles, S=ragged.max_keys, **options))


@functools.partial(jax.jit, static_argnames=("S", "unit", "topk", "tile_t", "n_cores", "interpret"))
def _launch_ragged(
    q: Array,
    w: Array,
    visible: Array,
    k: Array,
    k_scale: Array | None,
    tiles: RaggedTiles,
    *,
    S: int,
    unit: int,
    topk: int,
    tile_t: int,
    n_cores: int,
    interpret: Interpret,
) -> Array:
    """[rows, H, D], else [1, T, ...] in tiles -> [1, T, topk] int32.

    Args:
        unit: keys of a block, as far as copies go, 128 or 256; S: most keys of a sequence.
    """
    (H, D), T, page_size = q.shape[1:], visible.shape[1], k.shape[-2]
    config = Config(tile_t=tile_t, tile_s=GROUP * unit)
    S = -(-S // config.tile_s) * config.tile_s
    groups, slots, per_core = padded_groups(S), -(-topk // SLOTS) * SLOTS, T // tile_t // n_cores
    tiled = (tile_t // ROWS, slots // LANES * ROWS, LANES)
    operands = [k] if k_scale is None else [k, k_scale]
    rows = functools.partial(launch.rows, tile_t, per_core)
    scratch: dict[str, Ref] = {
        "keys_vmem": pltpu.VMEM((2, GROUP, unit, D), k.dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
        "sort_keys_vmem": pltpu.VMEM((tile_t // ROWS, groups * ROWS, LANES), jnp.int32),
        "w_vmem": pltpu.VMEM((tile_t, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((products_a_step(tile_t, config.tile_s) * tile_t * 2 * ROWS, LANES), jnp.float32),
        "thresholds_vmem": pltpu.VMEM((tile_t // ROWS, ROWS, LANES), jnp.int32),
        "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
    }
    if k_scale is not None:
        scratch["scale_vmem"] = pltpu.VMEM((2, GROUP * tiles.per_block, page_size), jnp.float32)
    out = launch.call_by_sequence(
        functools.partial(
            ragged_body, Plan(topk=topk, tiles=per_core, rows=ROWS, span=min(groups, LANES), has_sort_keys=False)
        ),
        tiles,
        name="dsa_select_flat",
        grid=(n_cores, 1, per_core),
        prefetch=[jnp.max(visible.reshape(-1, tile_t), axis=1)],
        operands=[q, w, visible[..., None], *operands],
        in_specs=[
            launch.queries(tiles, tile_t, per_core, H, D),
            rows(H),
            rows(1),
            *launch.in_hbm(operands),
        ],
        out_specs=launch.rows(tiled[0], per_core, *tiled[1:]),
        out_shape=jax.ShapeDtypeStruct((1, T // ROWS, *tiled[1:]), jnp.int32),
        scratch=scratch,
        vmem_bytes=config.vmem_bytes(H, D, S, topk, q.dtype.itemsize) + 8 * GROUP * tiles.per_block * LANES,
        interpret=interpret,
    )
    return from_tiles(out[0])[None, :, :topk]
