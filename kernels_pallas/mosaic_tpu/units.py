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
from hisa_jax.kernels_pallas.mosaic_tpu.units_plan import Plan, Refs
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
            raise ValueError(f"{self}: tile_t must be a multiple of {SUBLANES}, and beyond {_PART} of {_PART}")

    @property
    def part(self) -> int:
        """Queries whose blocks are chosen side by side."""
        return min(self.tile_t, _PART)

    @property
    def lanes(self) -> int:
        """Those that queries of one head lie along."""
        return -(-self.tile_t // LANES) * LANES

    def vmem_bytes(self, H: int, D: int, unit: int, groups: int, best: int, choice: Choice, itemsize: int) -> int:
        """Of everything in VMEM, for `groups` of 128 blocks; `best`: blocks whose maxima are turned together."""
        n, row_bytes, slots = GROUP * unit, max(D, LANES) * itemsize, choice.k + SLOTS
        ring = 2 * n * (row_bytes + 4 * SUBLANES * (itemsize == 1))
        selection = 4 * (self.part * (slots + LANES) + 4 * self.tile_t * slots) + (1 << 20)
        if H > 1:
            scoring = flat.Config(tile_t=self.tile_t).vmem_bytes(H, D, 0, 0, itemsize) + 4 * self.tile_t * n
            return ring + selection + scoring + 4 * self.tile_t * groups * LANES
        columns = 4 * n * LANES * (itemsize == 1)
        best_rows = 4 * self.lanes * best * SUBLANES
        products = 2 * 4 * units_head_body.ROWS * units_head_body.COLUMNS
        queries = 2 * self.lanes * (row_bytes + 2 * 4 * SUBLANES)
        return ring + selection + columns + best_rows + products + queries + 4 * self.lanes * groups * LANES


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
    tile_t, lanes, choice, size, keys = config.tile_t, config.lanes, task.choice, task.block_size, ragged.keys
    (H, D), unit, page_size, dtype = queries.q.shape[1:], ragged.block_size, keys.values.shape[1], keys.values.dtype
    eligible, visible = tiles.gather(eligible), tiles.gather(queries.visible)
    B, T = eligible.shape
    per_core, tile_s, registers = T // tile_t // config.n_cores, GROUP * unit, tile_t // SUBLANES
    groups, slots = padded_groups(-(-ragged.max_keys // tile_s) * tile_s // size), -(-choice.k // LANES) * LANES
    plan = Plan(
        tiles=per_core,
        part=config.part,
        block_size=size,
        span=min(groups, LANES),
        has_one_head=H == 1,
        has_relu=task.has_relu,
        choice=choice,
    )
    scratch: dict[str, Ref] = {
        **launch.selection_scratch(config.part // SUBLANES, groups, choice.k),
        "sort_keys_vmem": pltpu.VMEM((lanes // SUBLANES if H == 1 else registers, groups * SUBLANES, LANES), jnp.int32),
        "keys_vmem": pltpu.VMEM((2, GROUP, unit, D), dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if keys.scales is not None:
        scratch["scale_vmem"] = pltpu.VMEM((2, GROUP * ragged.per_block, page_size), jnp.float32)
    best = max(tile_s // size, LANES)
    if H == 1:

        def along_lanes(x: Array) -> tuple[Array, pl.BlockSpec]:
            """[B, T] -> a row of lanes for each tile."""
            row = launch.pad_axis(x.reshape(B, -1, 1, tile_t), 3, LANES)
            return row, launch.rows(None, per_core, 1, lanes)

        q = launch.pad_axis(tiles.gather(queries.q[:, 0]).reshape(B, -1, tile_t, D), 2, LANES)
        operands = {
            "q": (q, launch.rows(None, per_core, lanes, D)),
            **({"w": along_lanes(tiles.gather(queries.w[:, 0]))} if task.is_weighted else {}),
            **({"visible": along_lanes(visible)} if plan.is_masked else {}),
        }
        scratch["best_vmem"] = pltpu.VMEM((lanes // LANES, best * SUBLANES, LANES), jnp.float32)
        if keys.scales is not None:
            scratch["columns_vmem"] = pltpu.VMEM((tile_s, LANES), jnp.float32)
    else:
        rows = functools.partial(launch.rows, tile_t, per_core)
        operands = {
            "q": launch.queries(tiles, queries.q, tile_t, per_core),
            "w": (tiles.gather(queries.w), rows(H)),
            **({"visible": (visible[..., None], rows(1))} if plan.is_masked else {}),
        }
        of_flat = flat.scratch(H, tile_t, tile_s, groups)
        scratch |= {name: of_flat[name] for name in ("w_vmem", "partial_vmem")}
        scratch["scores_vmem"] = pltpu.VMEM((registers, tile_s // LANES * SUBLANES, LANES), jnp.float32)
    by_eight = functools.partial(launch.rows, registers, per_core)
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
        vmem_bytes=config.vmem_bytes(H, D, unit, groups, best, choice, dtype.itemsize),
        interpret=choice.interpret,
        dimension_semantics=("parallel", "parallel", "arbitrary"),  # a tile leaves nothing for the next one
    )
    outs = launch.by_sequence(kernel, tiles)()
    return tuple(tiles.scatter(out.reshape(B, T, slots)[..., : choice.k]) for out in outs)
