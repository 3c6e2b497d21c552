"""Blocks by their best token: all visible keys scored, the best score of each block, and the exact best m blocks.
    x[t, j] = max over visible tokens s of block j of k_scale[s] * sum_h w[t, h] * f(q[t, h] . k[s])
    o[t] = the m blocks of largest x[t], ascending, then -1

Floor, 4096 queries of 4 heads of 128 that choose alone (minimax_m3) at 128K in bfloat16: MXU 541 GFLOP, v5e 2.7 ms at
197 TFLOP/s, v6e 0.6 ms, of which a head size of 128 reaches half; HBM 32 passes over 32 MiB of keys = 1.3 and 0.7 ms.
Of several heads the floor is that of `flat`. A step of 32 requests reads 1 GiB of keys: 1.3 and 0.7 ms.

Scores never reach HBM. Sort keys of all blocks of a tile of queries wait in VMEM, 4 bytes a query and block.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import flat, launch, units_body, units_head_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import Found, Tiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.mosaic_tpu.units_body import Plan, Refs
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Queries

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
_PART = 64  # queries whose blocks are chosen side by side
_SORT_KEYS_BYTES = 18 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        tile_t: queries that keys stream past together; n_cores: cores that share them.
    """

    tile_t: int
    n_cores: int = 1

    def __post_init__(self) -> None:
        if self.tile_t % SUBLANES or self.tile_t % self.part:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be 8, 16, 32 or a multiple of {_PART}")

    @property
    def part(self) -> int:
        return min(self.tile_t, _PART)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is static about it, besides the shapes: tokens of a block, how a key is scored, what is chosen."""

    block_size: int
    has_relu: bool
    is_weighted: bool
    choice: Choice


def why_not(block_size: int, n_keys: int) -> str | None:
    """None, or why blocks of so many tokens have no kernel."""
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES[:-1]))
        return f"needs blocks of {sizes} or {BLOCK_SIZES[-1]} tokens, not {block_size}"
    most = _SORT_KEYS_BYTES // (4 * SUBLANES) // LANES * LANES
    if n_keys > most * block_size:
        return f"needs at most {most} blocks by their best token, not {-(-n_keys // block_size)}"
    return None


def most_queries(T: int, H: int, n_blocks: int) -> int:
    """Queries of a tile, where T have a sequence's keys in common: each more halves what copies of keys cost a query.

    A power of two, not below 8: the least that holds T where that is not too many.
    """
    tile_t = 512 if H == 1 else 32
    while tile_t > SUBLANES and (4 * tile_t * padded_groups(n_blocks) * LANES > _SORT_KEYS_BYTES or tile_t >= 2 * T):
        tile_t //= 2
    return tile_t


def units(queries: Queries, ragged: Ragged, tiles: Tiles, eligible: Array, *, task: Task, config: Config) -> Found:
    """The best blocks of the queries in `tiles`: [T, k] int32, ascending, then -1; maybe their sort keys.

    Args:
        queries: [T, H, D], H a multiple of 8, or 1.
        ragged: its blocks are what is copied at a time, 128 or 256 keys.
        eligible: [T] int32, blocks that each query may keep.
    """
    tile_t, choice, size, keys = config.tile_t, task.choice, task.block_size, ragged.keys
    (H, D), unit, page_size = queries.q.shape[1:], ragged.block_size, keys.values.shape[1]
    eligible, visible = tiles.gather(eligible), tiles.gather(queries.visible)
    B, T = eligible.shape
    per_core, tile_s, registers = T // tile_t // config.n_cores, GROUP * unit, tile_t // SUBLANES
    lanes = -(-tile_t // LANES) * LANES
    groups = padded_groups(-(-ragged.max_keys // tile_s) * tile_s // size)
    slots, n_tiles = -(-choice.k // LANES) * LANES, lanes // SUBLANES if H == 1 else registers
    plan = Plan(
        tiles=per_core,
        part=config.part,
        block_size=size,
        span=min(groups, LANES),
        has_one_head=H == 1,
        has_relu=task.has_relu,
        choice=choice,
    )
    rows = functools.partial(launch.rows, tile_t, per_core)
    by_eight = functools.partial(launch.rows, registers, per_core)

    def along_lanes(x: Array) -> tuple[Array, pl.BlockSpec]:
        """[B, T] -> a row of lanes for each tile."""
        x = launch.pad_axis(x.reshape(B, -1, 1, tile_t), 3, LANES)
        return x, launch.rows(None, per_core, 1, lanes)

    scratch: dict[str, Ref] = {
        "keys_vmem": pltpu.VMEM((2, GROUP, unit, D), keys.values.dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
        **launch.selection_scratch(config.part // SUBLANES, groups, choice.k),
        "sort_keys_vmem": pltpu.VMEM((n_tiles, groups * SUBLANES, LANES), jnp.int32),
    }
    row_bytes = max(D, LANES) * keys.values.dtype.itemsize
    vmem_bytes = 2 * tile_s * row_bytes + 4 * LANES * (n_tiles * groups * SUBLANES)
    vmem_bytes += 4 * (2 * tile_t * slots * (1 + choice.has_sort_keys) + config.part * (SLOTS + choice.k))
    if keys.scales is not None:
        scratch["scale_vmem"] = pltpu.VMEM((2, GROUP * ragged.per_block, page_size), jnp.float32)
        vmem_bytes += 2 * 4 * GROUP * ragged.per_block * max(page_size, LANES)
    if H == 1:
        q = launch.pad_axis(tiles.gather(queries.q[:, 0]).reshape(B, -1, tile_t, D), 2, LANES)
        operands = {"q": (q, launch.rows(None, per_core, lanes, D))}
        if task.is_weighted:
            operands["w"] = along_lanes(tiles.gather(queries.w[:, 0]))
        if plan.is_masked:
            operands["visible"] = along_lanes(visible)
        blocks = max(tile_s // size, LANES)
        scratch["best_vmem"] = pltpu.VMEM((lanes // LANES, blocks * SUBLANES, LANES), jnp.float32)
        vmem_bytes += 2 * lanes * row_bytes + 4 * lanes * (blocks * SUBLANES + 2 * units_head_body.ROWS)
        if keys.scales is not None:
            scratch["columns_vmem"] = pltpu.VMEM((tile_s, LANES), jnp.float32)
            vmem_bytes += 4 * tile_s * LANES
    else:
        operands = {
            "q": launch.queries(tiles, queries.q, tile_t, per_core),
            "w": (tiles.gather(queries.w), rows(H)),
            **({"visible": (visible[..., None], rows(1))} if plan.is_masked else {}),
        }
        of_flat = flat.scratch(H, tile_t, tile_s, groups)
        scratch |= {name: of_flat[name] for name in ("w_vmem", "partial_vmem")}
        scratch["scores_vmem"] = pltpu.VMEM((registers, tile_s // LANES * SUBLANES, LANES), jnp.float32)
        vmem_bytes += 4 * tile_t * tile_s + flat.Config(tile_t=tile_t, tile_s=tile_s).vmem_bytes(H, D, 0, 0, keys.values.dtype.itemsize)
    chosen = launch.out(by_eight(SUBLANES, slots), B, T // SUBLANES, SUBLANES, slots)
    kernel = Launch(
        body=functools.partial(units_body.units_body, plan),
        refs=Refs,
        name="hisa_units",
        grid=(config.n_cores, B, per_core),
        scalars={"seen_smem": jnp.max(eligible.reshape(-1, config.part), axis=1) * size},
        operands={
            "eligible": (eligible.reshape(B, -1, SUBLANES, 1), by_eight(SUBLANES, 1)),
            **operands,
            "k": (keys.values, HBM),
            "scale": (keys.scales, HBM),
        },
        outs={"chosen": chosen, **({"sort_keys": chosen} if choice.has_sort_keys else {})},
        scratch=scratch,
        vmem_bytes=vmem_bytes,
        interpret=choice.interpret,
    )
    outs = launch.by_sequence(kernel, tiles)()
    return tuple(tiles.scatter(out.reshape(B, T, slots)[..., : choice.k]) for out in outs)
