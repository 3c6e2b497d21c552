"""Token scores in the kept blocks of each query, and the exact top-k of them: the whole second stage in one kernel.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the blocks of t;   o[t] = the k best s, ascending

Floor, 4096 queries of dsv32, m = 64: v5e, MXU 550 GFLOP / 197 TFLOP/s = 2.8 ms, 16 cycles a query and block; v6e and
v7x take 8 if 256 keys stand in the matrix unit. HBM: keys once, 34 MB, queries 67 MB and indices 34 MB, 0.17 ms on v5e,
under the products. Bound by the MXU on v5e, and elsewhere by loading keys into it: no two queries share a block.

Keys of a sequence stay in VMEM while they fit; beyond, and where each query has a sequence of its own, every step
copies the blocks that its queries keep, 2 MiB a query in bfloat16: 2.6 us on v5e, 1.3 on v6e, 0.6 on v7x.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, refine_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Chip, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import BatchTiles, Found, Tiles
from hisa_jax.kernels_pallas.mosaic_tpu.refine_body import Plan
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Keys, Queries

_RESIDENT_BYTES = 34 << 20  # 131,072 bfloat16 keys, 262,144 of 8 bits with scales: fits beside the rest on every chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        tile_t: queries a grid step: eights whose searches for the threshold share the latency of a sum over lanes.
        columns: candidates of a list a step; 2048 are 128 products with 128 keys, which take 1300 to 2300 cycles.
        is_resident: whether the keys of a sequence are in VMEM whole.
        is_transposed: whether those are transposed on the way, so that the matrix unit loads them as they lie.
        is_split: whether the list of a query is cut into eighths that are scored side by side.
        n_cores: cores that share the queries of a sequence.
    """

    tile_t: int = 32
    columns: int = 2048
    is_resident: bool = True
    is_transposed: bool = False
    is_split: bool = False
    n_cores: int = 1

    def __post_init__(self):
        if self.tile_t % SUBLANES:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")
        if self.columns % 256:
            raise ValueError(f"Config(columns={self.columns}): must be a multiple of 256, the candidates of a product")

    @property
    def queries_per_eight(self) -> int:
        return 1 if self.is_split else SUBLANES

    def padded_blocks(self, m: int, block_size: int) -> int:
        """Blocks of a query, padded to whole steps."""
        step = self.columns * (SUBLANES if self.is_split else 1)
        return -(-m * block_size // step) * step // block_size

    def vmem_bytes(self, q: Array, keys: Keys, m: int, task: "Task") -> int:
        """Everything in VMEM at a time, for m blocks a query."""
        (H, D), page_size, itemsize = q.shape[-2:], keys.values.shape[1], q.dtype.itemsize
        block_size, n_slots = task.block_size, task.choice.k + SLOTS
        width = self.padded_blocks(m, block_size) * block_size
        queries = 2 * self.tile_t * (H * max(D, LANES) * itemsize + 4 * max(H, LANES) + 4 * width // block_size)
        scratch = 4 * (self.tile_t * H * LANES + SUBLANES * SUBLANES * self.columns)
        sort_keys = self.tile_t * 4 * (padded_groups(width) * LANES + 3 * n_slots)
        ring = 2 * SUBLANES * self.columns * (max(D, LANES) * itemsize + 4 * SUBLANES * (itemsize == 1))
        staged = 2 * GROUP * block_size * max(D, LANES) * itemsize
        resident = resident_bytes(task.n, block_size, page_size, D, itemsize) + staged
        return queries + scratch + sort_keys + (resident if self.is_resident else ring)


def resident_bytes(n: int, block_size: int, page_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales, which lie a page a row."""
    scales = 4 * max(page_size, LANES) * (block_size // page_size) * (itemsize == 1)
    return n * (block_size * max(D, LANES) * itemsize + scales)


def most_resident(block_size: int, page_size: int, D: int, itemsize: int) -> int:
    """Blocks of a sequence that fit VMEM; whole groups."""
    return _RESIDENT_BYTES // resident_bytes(GROUP, block_size, page_size, D, itemsize) * GROUP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is static about a refinement, besides the shapes.

    Attributes:
        n: blocks of a sequence that VMEM has room for; 0 where queries copy their own.
        name: of the kernel.
    """

    choice: Choice
    config: Config
    block_size: int
    n: int = 0
    name: str = "hisa_refine"


class Lists(NamedTuple):
    """The blocks that each query keeps."""

    block_ids: Array  # [T, m] int32, of its sequence, ascending, then -1
    page_index: Array  # [T, m * per_block] int32: which of the keys' pages, or which blocks in VMEM


def resident(chip: Chip, T: int, tile_t: int, H: int, block_size: int, itemsize: int) -> Config:
    """For keys in VMEM, shared by T queries."""
    return Config(
        tile_t=tile_t,
        columns=_columns(H, is_resident=True),
        # bfloat16: 15.6 -> 10.5 cycles a query and block on v7x, 15.8 -> 12.8 on v6e. On v5e the products take as long
        # as the loads, and 8-bit keys are half as many registers.
        is_transposed=itemsize == 2 and chip.mxu > LANES and block_size % LANES == 0,
        n_cores=chip.n_cores if tile_t < T else 1,
    )


def gathered(chip: Chip, T: int, H: int, m: int, block_size: int) -> Config:
    """For T queries side by side that copy m blocks each."""
    tile_t, columns = min(32, -(-T // SUBLANES) * SUBLANES), _columns(H, is_resident=False)
    is_split = T < SUBLANES
    if is_split:
        columns = min(columns, -(-m * block_size // (256 * SUBLANES)) * 256)
    n_cores = chip.n_cores if tile_t < T else 1
    return Config(tile_t=tile_t, columns=columns, is_resident=False, is_split=is_split, n_cores=n_cores)


def _columns(H: int, *, is_resident: bool) -> int:
    # 128 products a step hide how long the first and the last of them take; copies take longer than that anyway, and
    # with more heads a product has more rows.
    return 2048 if is_resident and H <= 64 else 1024 if H <= 64 else 512


def is_shared(n_queries: Rows, n_blocks: Rows, m: int, most: int) -> Rows:
    """Whether the keys of sequences are brought to VMEM: they fit, and their queries read them all."""
    return (n_queries >= SUBLANES) & (n_queries * m >= n_blocks) & (n_blocks <= most)


def refine(
    queries: Queries, keys: Keys, lists: Lists, task: Task, tiles: Tiles | None = None, n_tokens: Array | None = None
) -> Found:
    """The best candidates of each query.

    Args:
        queries: see candidates, of the first blocks of their lists.
        tiles: of queries whose sequences' keys are brought to VMEM; None: all queries copy the pages of their blocks.
        n_tokens: [R] int32, tokens of each sequence that are brought.

    Returns: [T, k] int32 positions, ascending, then -1; maybe their sort keys, anything in empty slots.
    """
    config, choice, block_size = task.config, task.choice, task.block_size
    H, m, page_size = queries.q.shape[1], lists.block_ids.shape[1], keys.values.shape[1]
    per_block = block_size // page_size
    if tiles is None:
        multiple = config.tile_t * config.n_cores
        tiles = BatchTiles(B=1, T=queries.q.shape[0], multiple=multiple, n_blocks=0)
    n_kept = jnp.where(queries.visible > 0, jnp.sum(lists.block_ids >= 0, axis=1, dtype=jnp.int32), 0)
    w, n_visible, n_kept, block_ids, page_index = map(
        tiles.gather, (queries.w, queries.visible, n_kept, lists.block_ids, lists.page_index)
    )
    B, T = n_visible.shape
    padded_m = config.padded_blocks(m, block_size)
    plan = Plan(
        tiles=T // (config.tile_t * config.n_cores),
        eights=config.tile_t // config.queries_per_eight,
        is_split=config.is_split,
        is_transposed=config.is_transposed,
        m=padded_m,
        block_size=block_size,
        per_block=per_block,
        columns=config.columns,
        choice=choice,
    )
    # Of resident keys lists name blocks, else pages.
    listed = 1 if config.is_resident else per_block
    page_index = launch.pad_axis(page_index, 2, padded_m * listed).reshape(B, T, -1, plan.blocks_per_step * listed)
    blocks = launch.pad_axis(jnp.maximum(block_ids, 0), 2, LANES)
    slots = -(-choice.k // LANES) * LANES
    rows = functools.partial(launch.rows, config.tile_t, plan.tiles)
    by_eight = functools.partial(launch.rows, config.tile_t // SUBLANES, plan.tiles)
    in_eights = (B, T // SUBLANES, SUBLANES)
    chosen = launch.out(by_eight(SUBLANES, slots), *in_eights, slots)
    body = refine_body.resident_body if config.is_resident else refine_body.gathered_body
    refinement = Launch(
        body=functools.partial(body, plan),
        refs=refine_body.Refs,
        name=task.name,
        grid=(config.n_cores, B, plan.tiles),
        scalars={
            "n_steps_smem": steps_of(n_visible, plan, config),
            **({"n_tokens_smem": n_tokens} if n_tokens is not None else {}),
        },
        operands={
            "page_index_smem": (page_index, rows(*page_index.shape[2:], memory_space=pltpu.SMEM)),
            "n_kept_smem": (n_kept[..., None], rows(1, memory_space=pltpu.SMEM)),
            "block_ids": (blocks.reshape(*in_eights, -1), by_eight(SUBLANES, blocks.shape[2])),
            "n_visible": (n_visible.reshape(*in_eights, 1), by_eight(SUBLANES, 1)),
            "q": launch.queries(tiles, queries.q, config.tile_t, plan.tiles),
            "w": (w, rows(H)),
            "k_hbm": (keys.values, HBM),
            "scale_hbm": (keys.scales, HBM),
        },
        outs={"chosen": chosen, **({"sort_keys": chosen} if choice.has_sort_keys else {})},
        scratch={
            "w_vmem": pltpu.VMEM((config.tile_t, H, LANES), jnp.float32),
            "partial_vmem": pltpu.VMEM((config.columns // LANES * SUBLANES * SUBLANES, LANES), jnp.float32),
            **launch.selection_scratch(config.tile_t // SUBLANES, padded_groups(padded_m * block_size), choice.k),
            **keys_scratch(keys, task.n, plan, config),
        },
        vmem_bytes=config.vmem_bytes(queries.q, keys, m, task) + 8 * config.tile_t * choice.has_sort_keys * slots,
        interpret=choice.interpret,
    )
    outs = (launch.by_sequence(refinement, tiles) if config.is_resident else refinement)()
    return tuple(tiles.scatter(out.reshape(B, T, -1)[..., : choice.k]) for out in outs)


def steps_of(n_visible: Array, plan: Plan, config: Config) -> Array:
    """[B, T] -> [B * T / queries_per_eight] int32; none where all keep all they see and no sort keys are asked for."""
    most = jnp.max(n_visible.reshape(-1, config.queries_per_eight), axis=1)
    longest = jnp.minimum(most, plan.blocks_per_list * plan.block_size)
    steps = -(-longest // plan.columns)
    return steps if plan.choice.has_sort_keys else jnp.where(most <= plan.choice.k, 0, steps)


def keys_scratch(keys: Keys, n: int, plan: Plan, config: Config) -> dict[str, Ref]:
    """Where the keys lie in VMEM: all of a sequence, or a ring of two steps."""
    shape: tuple
    scale_shape: tuple
    block_size, (page_size, D), dtype = plan.block_size, keys.values.shape[1:], keys.values.dtype
    if config.is_resident:
        block = (D, block_size) if config.is_transposed else (block_size, D)
        shape, scale_shape = (n, *block), (n * plan.per_block, page_size)
    else:
        ring = 2, SUBLANES, plan.blocks_per_step
        shape, scale_shape = (*ring, block_size, D), (*ring, plan.per_block, page_size)
    scratch: dict[str, Ref] = {"keys_vmem": pltpu.VMEM(shape, dtype), "sems": pltpu.SemaphoreType.DMA((2, 2))}
    if config.is_transposed:
        scratch["staged_vmem"] = pltpu.VMEM((2, GROUP, block_size, D), dtype)
    if keys.scales is not None:
        scratch["scale_vmem"] = pltpu.VMEM(scale_shape, jnp.float32)
    return scratch
