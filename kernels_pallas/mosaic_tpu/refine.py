"""Token scores in the kept blocks of each query, and the exact top-k of them: the whole second stage in one kernel.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the blocks of t;   o[t] = the k best s, ascending

Floor, 4096 queries of dsv32, m = 64: v5e, MXU 550 GFLOP / 197 TFLOP/s = 2.8 ms, 16 cycles a query and block; v6e and
v7x take 8 if 256 keys stand in the matrix unit. HBM: keys once, 34 MB, queries 67 MB and indices 34 MB, 0.17 ms on v5e,
under the products. Bound by the MXU on v5e, and elsewhere by loading keys into it: no two queries share a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu import launch, refine_body
from kernels_pallas.mosaic_tpu.config import LANES, ROWS, Chip
from kernels_pallas.mosaic_tpu.refine_body import Plan
from kernels_pallas.mosaic_tpu.topk import padded_groups
from kernels_pallas.mosaic_tpu.topk_body import SLOTS
from kernels_pallas.types import Interpret, Ref

_RESIDENT_BYTES = 34 << 20  # 131,072 bfloat16 keys, 262,144 of 8 bits with scales: fits beside the rest on every chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        tile_t: queries a grid step: eights whose searches for the cut share the latency of a sum over lanes.
        columns: candidates of a query a step; 1024 are 64 products of 128 keys, which take 900 to 1200 cycles.
        n_cores: cores that share the queries of a sequence.
    """

    tile_t: int = 32
    columns: int = 1024
    n_cores: int = 1

    def __post_init__(self):
        if self.tile_t % ROWS:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")
        if self.columns % 256:
            raise ValueError(f"Config(columns={self.columns}): must be a multiple of 256, the candidates of a product")

    def vmem_bytes(self, H: int, D: int, m: int, block_size: int, topk: int, itemsize: int) -> int:
        """Everything in VMEM but the keys."""
        queries = 2 * self.tile_t * (H * max(D, LANES) * itemsize + 4 * max(H, LANES) + 4 * max(m, LANES))
        scratch = ROWS * 4 * (H * LANES + ROWS * self.columns)
        images = self.tile_t * 4 * (padded_groups(m * block_size) * LANES + 3 * (topk + SLOTS))
        return queries + scratch + images


def resident_bytes(n: int, block_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales."""
    return n * (block_size * max(D, LANES) * itemsize + 4 * max(block_size, LANES) * (itemsize == 1))


def is_resident(n: int, block_size: int, D: int, itemsize: int) -> bool:
    """Whether they fit."""
    return resident_bytes(n, block_size, D, itemsize) <= _RESIDENT_BYTES


def heuristic(chip: Chip, T: int, H: int) -> Config:
    """Fewer candidates a step where a product has more rows, for the sake of the code's size."""
    tile_t = min(32, -(-T // ROWS) * ROWS)
    return Config(tile_t=tile_t, columns=1024 if H <= 64 else 512, n_cores=chip.n_cores if tile_t < T else 1)


@functools.partial(jax.jit, static_argnames=("topk", "config", "interpret"))
def refine(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    n_visible: Array,
    n_tokens: Array,
    *,
    topk: int,
    config: Config,
    interpret: Interpret = False,
) -> Array:
    """[B, T, H, D], [B, T, H], [B, n, block_size, D], [B, n, block_size], [B, T, m], ... -> [B, T, topk] int32.

    Args:
        q: T a multiple of tile_t * n_cores.
        k: n a multiple of GROUP; all of a sequence's keys must fit in VMEM (`is_resident`).
        block_ids: blocks of its sequence that each query keeps, ascending, then -1.
        n_visible: [B, T] int32, candidates of each query: the first ones of its list.
        n_tokens: [B] int32, tokens present.
    """
    (B, T, H, D), (n, block_size), m = q.shape, k.shape[1:3], block_ids.shape[2]
    tiles, eights = T // config.tile_t // config.n_cores, config.tile_t // ROWS
    plan = Plan(tiles=tiles, topk=topk, block_size=block_size, columns=config.columns)
    operands = [k] if k_scale is None else [k, k_scale]
    scratch: dict[str, Ref] = {
        "w_vmem": pltpu.VMEM((ROWS, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((config.columns // LANES * ROWS * ROWS, LANES), jnp.float32),
        "keys_vmem": pltpu.VMEM((n, block_size, D), k.dtype),
        "sems": pltpu.SemaphoreType.DMA((2,)),
        **launch.selection_scratch(eights, padded_groups(m * block_size), topk),
    }
    if k_scale is not None:
        scratch["scale_vmem"] = pltpu.VMEM((n, block_size), jnp.float32)
    blocks = jnp.maximum(block_ids, 0)  # what is not visible is scored all the same
    most = jnp.max(n_visible.reshape(-1, ROWS), axis=1)
    n_steps = jnp.where(most <= topk, 0, -(-most // config.columns))  # eights that keep all they see need no scores
    slots = -(-topk // LANES) * LANES
    rows = functools.partial(launch.rows, config.tile_t, tiles)
    by_eight = functools.partial(launch.rows, eights, tiles)
    out = launch.call(
        functools.partial(refine_body.resident_body, plan),
        name="hisa_refine",
        grid=(config.n_cores, B, tiles),
        prefetch=[n_steps, n_tokens],
        operands=[
            _pad_last(blocks, config.columns // block_size),
            _pad_last(blocks, LANES).reshape(B, T // ROWS, ROWS, -1),
            n_visible.reshape(B, -1, ROWS, 1),
            q,
            w,
            *operands,
        ],
        in_specs=[
            rows(-(-m * block_size // config.columns) * config.columns // block_size, memory_space=pltpu.SMEM),
            by_eight(ROWS, -(-m // LANES) * LANES),
            by_eight(ROWS, 1),
            rows(H, D),
            rows(H),
            *launch.in_hbm(operands),
        ],
        out_specs=by_eight(ROWS, slots),
        out_shape=jax.ShapeDtypeStruct((B, T // ROWS, ROWS, slots), jnp.int32),
        scratch=scratch,
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=config.vmem_bytes(H, D, m, block_size, topk, q.dtype.itemsize)
        + resident_bytes(n, block_size, D, k.dtype.itemsize),
        interpret=interpret,
    )
    return out.reshape(B, T, slots)[..., :topk]


def _pad_last(x: Array, multiple: int) -> Array:
    """Zeros to the last axis, to a multiple."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % multiple),))
