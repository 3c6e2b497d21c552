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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import block_filter_body, launch, pool
from hisa_jax.kernels_pallas.mosaic_tpu.block_filter_body import COLUMNS, Plan
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, ROWS, Chip
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.types import Interpret, Ref


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
        if self.tile_t % ROWS:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")

    def vmem_bytes(self, H: int, D: int, n: int, itemsize: int) -> int:
        """Everything in VMEM but what the means come from."""
        means = 2 * n * self.mean_parts * max(D, LANES)
        queries = self.tile_t * H * (2 * max(D, LANES) * itemsize + 2 * 4 + 4 * LANES)
        return means + queries + 4 * self.tile_t * (n + SLOTS) + 4 * COLUMNS * self.tile_t * ROWS


def heuristic(chip: Chip, T: int) -> Config:
    """One part where a second would double the products."""
    tile_t = min(32, -(-T // ROWS) * ROWS)
    return Config(tile_t=tile_t, mean_parts=2 if chip.mxu > 128 else 1, n_cores=chip.n_cores if tile_t < T else 1)


def block_filter(
    q: Array,
    w: Array,
    source: Array,
    k_scale: Array | None,
    eligible: Array,
    n_tokens: Array,
    **options: Any,
) -> tuple[Array, ...]:
    """[B, T, H, D], [B, T, H], ... -> [B, T, block_topk] int32, ascending, then -1; maybe their sort keys.

    Args:
        source: keys [B, n, block_size, D], n a multiple of GROUP, pooled here; or kept means [B, n, D] float32, as
            `pool.pool` gives them.
        k_scale: [B, n, block_size] float32 with keys that have scales, else None.
        eligible: [B, T] int32, blocks that each query may keep; n_tokens: [B] int32, tokens present.
        options: of `_launch`.
    """
    block_size = source.shape[2] if source.ndim == 4 else 0
    outs = _launch(q, w, source, k_scale, eligible, n_tokens, n=source.shape[1], block_size=block_size, **options)
    return tuple(out[:, : q.shape[1]] for out in outs)


def block_filter_ragged(
    q: Array, w: Array, ragged: Ragged, tiles: RaggedTiles, page_sums: Array | None, eligible: Array, **options: Any
) -> Array:
    """The same for the sequences in `tiles`: [T, H, D], [T, H], ..., [T] -> [T, block_topk] int32.

    Args:
        page_sums: [N, D] float32, of pages; None: pooled here.
    """
    source, k_scale = (ragged.k, ragged.k_scale) if page_sums is None else (page_sums, None)
    w, eligible = tiles.gather(w), tiles.gather(eligible)
    sizes = {"n": ragged.max_blocks, "block_size": ragged.block_size}
    (out,) = _launch(q, w, source, k_scale, eligible, ragged.lengths, tiles, **sizes, **options)
    return tiles.scatter(out)


@functools.partial(
    jax.jit,
    static_argnames=(
        "n",
        "block_size",
        "block_topk",
        "keep_first",
        "keep_last",
        "has_sort_keys",
        "config",
        "interpret",
    ),
)
def _launch(
    q: Array,
    w: Array,
    source: Array,
    k_scale: Array | None,
    eligible: Array,
    n_tokens: Array,
    tiles: RaggedTiles | None = None,
    *,
    n: int,
    block_size: int,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    config: Config,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[B, T, block_topk] int32, T padded to whole tiles; maybe their sort keys.

    Args:
        q: [B, T, H, D]; of ragged sequences [rows, H, D], while what else has a row a query lies in `tiles`, B = 1.
        n: most blocks of a sequence.
    """
    tile_t, (H, D) = config.tile_t, q.shape[-2:]
    w, eligible = (launch.pad_axis(x, 1, tile_t * config.n_cores) for x in (w, eligible))
    q = launch.pad_axis(q, 1, tile_t * config.n_cores) if tiles is None else q
    B, T = eligible.shape
    groups, per_core, registers = padded_groups(n), T // tile_t // config.n_cores, tile_t // ROWS
    slots = -(-block_topk // LANES) * LANES
    scratch: dict[str, Ref] = {
        "means_vmem": pltpu.VMEM((groups * LANES, config.mean_parts * D), jnp.bfloat16),
        "w_vmem": pltpu.VMEM((tile_t, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((COLUMNS // LANES * tile_t * ROWS, LANES), jnp.float32),
        **launch.selection_scratch(registers, groups, block_topk),
    }
    operands = [source] if k_scale is None else [source, k_scale]
    vmem_bytes = config.vmem_bytes(H, D, groups * LANES, q.dtype.itemsize)
    body: Callable
    if source.ndim == 4:
        body = block_filter_body.pooled_body
        scratch |= pool.scratch(source, k_scale is not None)
        vmem_bytes += pool.vmem_bytes(source.shape[2], D, source.dtype.itemsize)
    elif tiles is not None:
        body = block_filter_body.paged_body
        scratch |= pool.sums_scratch(tiles.per_block, D)
        vmem_bytes += pool.sums_vmem_bytes(tiles.per_block, D)
    else:
        body = block_filter_body.kept_body
        scratch |= {"float_vmem": pltpu.VMEM((n, D), jnp.float32), "sem": pltpu.SemaphoreType.DMA}
        vmem_bytes += 4 * n * max(D, LANES)
    plan = Plan(
        tiles=per_core,
        mean_parts=config.mean_parts,
        block_size=block_size,
        block_topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        has_sort_keys=has_sort_keys,
    )
    rows = functools.partial(launch.rows, tile_t, per_core)
    by_eight = functools.partial(launch.rows, registers, per_core)
    outs = launch.call_by_sequence(
        functools.partial(body, plan),
        tiles,
        name="hisa_block_filter",
        grid=(config.n_cores, B, per_core),
        prefetch=[n_tokens, jnp.max(eligible.reshape(-1, tile_t), axis=1)],
        operands=[eligible.reshape(B, -1, ROWS, 1), q, w, *operands],
        in_specs=[
            by_eight(ROWS, 1),
            launch.queries(tiles, tile_t, per_core, H, D),
            rows(H),
            *launch.in_hbm(operands),
        ],
        out_specs=[by_eight(ROWS, slots)] * (1 + has_sort_keys),
        out_shape=[jax.ShapeDtypeStruct((B, T // ROWS, ROWS, slots), jnp.int32)] * (1 + has_sort_keys),
        scratch=scratch,
        vmem_bytes=vmem_bytes,
        interpret=interpret,
    )
    return tuple(out.reshape(B, T, slots)[..., :block_topk] for out in outs)
