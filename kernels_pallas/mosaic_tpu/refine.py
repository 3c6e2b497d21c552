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
        columns: candidates of a list a step; 1024 are 64 products of 128 keys, which take 800 to 1200 cycles.
        is_resident: whether the keys of a sequence are in VMEM whole.
        is_split: whether the list of a query is cut into eighths that are scored side by side.
        n_cores: cores that share the queries of a sequence.
    """

    tile_t: int = 32
    columns: int = 1024
    is_resident: bool = True
    is_split: bool = False
    n_cores: int = 1

    def __post_init__(self):
        if self.tile_t % ROWS:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")
        if self.columns % 256:
            raise ValueError(f"Config(columns={self.columns}): must be a multiple of 256, the candidates of a product")

    def padded_blocks(self, m: int, block_size: int) -> int:
        """Blocks of a query, padded to whole steps."""
        step = self.columns * (ROWS if self.is_split else 1)
        return -(-m * block_size // step) * step // block_size

    def vmem_bytes(self, H: int, D: int, n: int, m: int, block_size: int, topk: int, itemsize: int) -> int:
        """Everything in VMEM at a time."""
        width = self.padded_blocks(m, block_size) * block_size
        queries = 2 * self.tile_t * (H * max(D, LANES) * itemsize + 4 * max(H, LANES) + 4 * width // block_size)
        scratch = 4 * (self.tile_t * H * LANES + ROWS * ROWS * self.columns)
        images = self.tile_t * 4 * (padded_groups(width) * LANES + 3 * (topk + SLOTS))
        ring = 2 * ROWS * self.columns * (max(D, LANES) * itemsize + 4 * ROWS * (itemsize == 1))
        return queries + scratch + images + (resident_bytes(n, block_size, D, itemsize) if self.is_resident else ring)


def resident_bytes(n: int, block_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales."""
    return n * (block_size * max(D, LANES) * itemsize + 4 * max(block_size, LANES) * (itemsize == 1))


def heuristic(chip: Chip, B: int, T: int, H: int, D: int, n: int, m: int, block_size: int, itemsize: int) -> Config:
    """Keys in VMEM if they fit and enough queries share them; else the queries of a batch side by side."""
    # Fewer candidates a step where a product has more rows, for the sake of the code's size.
    columns = 1024 if H <= 64 else 512
    is_resident = T >= ROWS and T * m >= n and resident_bytes(n, block_size, D, itemsize) <= _RESIDENT_BYTES
    queries = T if is_resident else B * T
    tile_t = min(32, -(-queries // ROWS) * ROWS)
    is_split = not is_resident and queries < ROWS
    if is_split:
        columns = min(columns, -(-m * block_size // (256 * ROWS)) * 256)
    n_cores = chip.n_cores if tile_t < queries else 1
    return Config(tile_t=tile_t, columns=columns, is_resident=is_resident, is_split=is_split, n_cores=n_cores)


@functools.partial(jax.jit, static_argnames=("topk", "keep_first", "keep_last", "config", "interpret"))
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
    keep_first: int = 0,
    keep_last: int = 0,
    interpret: Interpret = False,
) -> Array:
    """[B, T, H, D], [B, T, H], [B, n, block_size, D], [B, n, block_size], [B, T, m], ... -> [B, T, topk] int32.

    Args:
        k: n a multiple of GROUP if keys are resident.
        block_ids: blocks of its sequence that each query keeps, ascending, then -1.
        n_visible: [B, T] int32, candidates of each query: the first ones of its list.
        n_tokens: [B] int32, tokens present.
        keep_first, keep_last: candidates chosen whatever they score, the first and the last visible ones.
    """
    if config.is_resident:
        return _refine(
            q, w, k, k_scale, block_ids, None, n_visible, n_tokens, topk, keep_first, keep_last, config, interpret
        )
    B, T, n = *q.shape[:2], k.shape[1]
    # One sequence of all queries and all keys; the lists name blocks of their own sequences for the positions.
    global_ids = block_ids + n * jnp.arange(B, dtype=jnp.int32)[:, None, None]
    flat = [x.reshape(1, B * T, *x.shape[2:]) for x in (q, w, block_ids, global_ids, n_visible)]
    q, w, block_ids, global_ids, n_visible = flat
    k = k.reshape(-1, *k.shape[2:])
    k_scale = None if k_scale is None else k_scale.reshape(-1, 1, k_scale.shape[2])
    out = _refine(
        q, w, k, k_scale, block_ids, global_ids, n_visible, n_tokens, topk, keep_first, keep_last, config, interpret
    )
    return out.reshape(B, T, topk)


def _refine(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    global_ids: Array | None,
    n_visible: Array,
    n_tokens: Array,
    topk: int,
    keep_first: int,
    keep_last: int,
    config: Config,
    interpret: Interpret,
) -> Array:
    B, n_queries = q.shape[:2]
    q, w, block_ids, n_visible = (
        launch.pad_axis(x, 1, config.tile_t * config.n_cores) for x in (q, w, block_ids, n_visible)
    )
    (_, T, H, D), (block_size, _), m = q.shape, k.shape[-2:], block_ids.shape[2]
    padded_m = config.padded_blocks(m, block_size)
    tiles, eights = T // config.tile_t // config.n_cores, config.tile_t // ROWS
    rows_per_eight = 1 if config.is_split else ROWS
    plan = Plan(
        tiles=tiles,
        eights=config.tile_t // rows_per_eight,
        is_split=config.is_split,
        topk=topk,
        m=padded_m,
        block_size=block_size,
        columns=config.columns,
        keep_first=keep_first,
        keep_last=keep_last,
    )
    most = jnp.max(n_visible.reshape(-1, rows_per_eight), axis=1)
    if config.is_split:
        most = jnp.minimum(most, padded_m // ROWS * block_size)  # the longest eighth is the first
    # Queries that keep all they see need no scores.
    keeps_all = jnp.max(n_visible.reshape(-1, rows_per_eight), axis=1) <= topk
    n_steps = jnp.where(keeps_all, 0, -(-most // config.columns))
    operands = [k] if k_scale is None else [k, k_scale]
    rows = functools.partial(launch.rows, config.tile_t, tiles)
    by_eight = functools.partial(launch.rows, eights, tiles)
    smem_blocks = launch.pad_axis(jnp.maximum(block_ids, 0), 2, padded_m)
    ring = (2, ROWS, plan.slots)
    scratch: dict[str, Ref] = {
        "w_vmem": pltpu.VMEM((config.tile_t, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((config.columns // LANES * ROWS * ROWS, LANES), jnp.float32),
        **launch.selection_scratch(eights, padded_groups(padded_m * block_size), topk),
    }
    if config.is_resident:
        body, prefetch = refine_body.resident_body, [n_steps, n_tokens]
        scratch |= {"keys_vmem": pltpu.VMEM(k.shape[1:], k.dtype), "sems": pltpu.SemaphoreType.DMA((2,))}
        if k_scale is not None:
            scratch["scale_vmem"] = pltpu.VMEM(k_scale.shape[1:], jnp.float32)
    else:
        body, prefetch = refine_body.gathered_body, [n_steps]
        n_kept = jnp.sum(block_ids >= 0, axis=2, dtype=jnp.int32)
        n_kept = jnp.minimum(n_kept, jnp.where(n_visible > 0, m, 0))
        smem_blocks = launch.pad_axis(launch.pad_axis(global_ids, 1, config.tile_t * config.n_cores), 2, padded_m)
        smem_blocks = jnp.concatenate([smem_blocks, n_kept[..., None]], axis=2)
        scratch |= {"keys_vmem": pltpu.VMEM((*ring, block_size, D), k.dtype), "sems": pltpu.SemaphoreType.DMA((2, 2))}
        if k_scale is not None:
            scratch["scale_vmem"] = pltpu.VMEM((*ring, 1, block_size), jnp.float32)
    vmem_blocks = launch.pad_axis(jnp.maximum(block_ids, 0), 2, LANES).reshape(B, T // ROWS, ROWS, -1)
    slots = -(-topk // LANES) * LANES
    out = launch.call(
        functools.partial(body, plan),
        name="hisa_refine",
        grid=(config.n_cores, B, tiles),
        prefetch=prefetch,
        operands=[smem_blocks, vmem_blocks, n_visible.reshape(B, -1, ROWS, 1), q, w, *operands],
        in_specs=[
            rows(smem_blocks.shape[2], memory_space=pltpu.SMEM),
            by_eight(ROWS, vmem_blocks.shape[3]),
            by_eight(ROWS, 1),
            rows(H, D),
            rows(H),
            *launch.in_hbm(operands),
        ],
        out_specs=by_eight(ROWS, slots),
        out_shape=jax.ShapeDtypeStruct((B, T // ROWS, ROWS, slots), jnp.int32),
        scratch=scratch,
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=config.vmem_bytes(H, D, k.shape[-3], m, block_size, topk, k.dtype.itemsize),
        interpret=interpret,
    )
    return out.reshape(B, T, slots)[:, :n_queries, :topk]
