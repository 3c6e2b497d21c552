"""The blocks that each query keeps: pooling, scores of the means and their exact top-m in one kernel.
    score[t, n] = sum_h w[t, h] * relu(q[t, h] . mean[n])       float32 sums;   o[t] = the m best n, ascending

Means never reach HBM: at the first tile of a sequence its keys stream through VMEM, each block leaves its float32 mean
there in `mean_parts` bfloat16 numbers, and the tiles of queries follow. One part errs by 2^-9 of a mean, which moves a
score by about a thousandth of the scores' spread, two by 2^-17. On a matrix unit 256 deep the second part is free: the
heads lie twice side by side and fill its depth. On one 128 deep it doubles the products.

Floor, 4096 queries of dsv32 at 128K (n = 1024): v5e, one part, MXU 69 GFLOP / 197 TFLOP/s = 0.35 ms, HBM 34 MB of keys
and 67 MB of queries / 819 GB/s = 0.12 ms. Bound by the MXU; the schedule takes 17.7 cycles a query and 128 means on v5e
(16 at best), 10.7 on v6e and 10.8 on v7x (8 at best).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import block_filter_body, launch, pool
from hisa_jax.kernels_pallas.mosaic_tpu.block_filter_body import COLUMNS, Plan
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES, Chip, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import Found, Tiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and the means' precision.

    Attributes:
        tile_t: queries a grid step.
        mean_parts: bfloat16 numbers that make up a mean: 1 or 2.
        n_cores: cores that share the queries of a sequence; each pools for itself.
    """

    tile_t: int = 32
    mean_parts: int = 2
    n_cores: int = 1

    def __post_init__(self):
        if self.tile_t % SUBLANES:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")

    def vmem_bytes(self, H: int, D: int, n: int, itemsize: int) -> int:
        """Everything in VMEM but what the means come from."""
        means = 2 * n * self.mean_parts * max(D, LANES)
        queries = self.tile_t * H * (2 * max(D, LANES) * itemsize + 2 * 4 + 4 * LANES)
        return means + queries + 4 * self.tile_t * (n + SLOTS) + 4 * COLUMNS * self.tile_t * SUBLANES


def heuristic(chip: Chip, T: int, tile_t: int | None = None) -> Config:
    """For T queries that share a sequence's keys: one part where a second would double the products."""
    tile_t = tile_t or min(32, -(-T // SUBLANES) * SUBLANES)
    return Config(tile_t=tile_t, mean_parts=2 if chip.mxu > 128 else 1, n_cores=chip.n_cores if tile_t < T else 1)


def block_filter(
    queries: Queries, ragged: Ragged, tiles: Tiles, eligible: Array, *, choice: Choice, config: Config
) -> Found:
    """The best blocks of the queries in `tiles`: [T, k] int32, ascending, then -1; maybe their sort keys.

    Args:
        eligible: [T] int32, blocks that each query may keep.
    """
    tile_t, (H, D) = config.tile_t, queries.q.shape[-2:]
    w, eligible = tiles.gather(queries.w), tiles.gather(eligible)
    keys, n, per_block = ragged.keys, ragged.most_blocks, ragged.per_block
    B, T = eligible.shape
    groups, per_core, registers = padded_groups(n), T // tile_t // config.n_cores, tile_t // SUBLANES
    slots = -(-choice.k // LANES) * LANES
    scratch: dict[str, Ref] = {
        "means_vmem": pltpu.VMEM((groups * LANES, config.mean_parts * D), jnp.bfloat16),
        "w_vmem": pltpu.VMEM((tile_t, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((COLUMNS // LANES * tile_t * SUBLANES, LANES), jnp.float32),
        **launch.selection_scratch(registers, groups, choice.k),
    }
    vmem_bytes = config.vmem_bytes(H, D, groups * LANES, queries.q.dtype.itemsize)
    if ragged.page_sums is None:
        source = {"k_hbm": (keys.values, HBM), "scale_hbm": (keys.scales, HBM)}
        scratch |= pool.scratch(keys)
        vmem_bytes += pool.vmem_bytes(ragged.block_size, D, keys.values.dtype.itemsize)
    else:
        source = {"sums_hbm": (ragged.page_sums, HBM)}
        scratch |= pool.sums_scratch(per_block, D)
        vmem_bytes += pool.sums_vmem_bytes(per_block, D)
    plan = Plan(tiles=per_core, mean_parts=config.mean_parts, block_size=ragged.block_size, choice=choice)
    by_eight = functools.partial(launch.rows, registers, per_core)
    chosen = launch.out(by_eight(SUBLANES, slots), B, T // SUBLANES, SUBLANES, slots)
    filtering = Launch(
        body=functools.partial(block_filter_body.block_filter_body, plan),
        refs=block_filter_body.Refs,
        name="hisa_block_filter",
        grid=(config.n_cores, B, per_core),
        scalars={"n_tokens_smem": ragged.lengths, "n_columns_smem": jnp.max(eligible.reshape(-1, tile_t), axis=1)},
        operands={
            "eligible": (eligible.reshape(B, -1, SUBLANES, 1), by_eight(SUBLANES, 1)),
            "q": launch.queries(tiles, queries.q, tile_t, per_core),
            "w": (w, launch.rows(tile_t, per_core, H)),
            **source,
        },
        outs={"chosen": chosen, **({"sort_keys": chosen} if choice.has_sort_keys else {})},
        scratch=scratch,
        vmem_bytes=vmem_bytes,
        interpret=choice.interpret,
    )
    outs = launch.by_sequence(filtering, tiles)()
    return tuple(tiles.scatter(out.reshape(B, T, slots)[..., : choice.k]) for out in outs)
