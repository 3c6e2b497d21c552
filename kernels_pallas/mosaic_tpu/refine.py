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
from kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS, Chip
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
        if self.tile_t % ROWS:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of 8, the sublanes of a float32 tile")
        if self.columns % 256:
            raise ValueError(f"Config(columns={self.columns}): must be a multiple of 256, the candidates of a product")

    @property
    def queries_per_eight(self) -> int:
        return 1 if self.is_split else ROWS

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
        staged = 2 * GROUP * block_size * max(D, LANES) * itemsize
        keys = resident_bytes(n, block_size, D, itemsize) + staged if self.is_resident else ring
        return queries + scratch + images + keys


def resident_bytes(n: int, block_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales."""
    return n * (block_size * max(D, LANES) * itemsize + 4 * max(block_size, LANES) * (itemsize == 1))


def heuristic(chip: Chip, B: int, T: int, H: int, D: int, n: int, m: int, block_size: int, itemsize: int) -> Config:
    """Keys in VMEM if they fit and enough queries share them; else the queries of a batch side by side."""
    is_resident = T >= ROWS and T * m >= n and resident_bytes(n, block_size, D, itemsize) <= _RESIDENT_BYTES
    queries = T if is_resident else B * T
    # 128 products a step hide how long the first and the last of them take; copies take longer than that anyway, and
    # with more heads a product has more rows.
    columns = 2048 if is_resident and H <= 64 else 1024 if H <= 64 else 512
    tile_t = min(32, -(-queries // ROWS) * ROWS)
    is_split = not is_resident and queries < ROWS
    if is_split:
        columns = min(columns, -(-m * block_size // (256 * ROWS)) * 256)
    return Config(
        tile_t=tile_t,
        columns=columns,
        is_resident=is_resident,
        # bfloat16: 15.6 -> 10.5 cycles a query and block on v7x, 15.8 -> 12.8 on v6e. On v5e the products take as long
        # as the loads, and 8-bit keys are half as many registers.
        is_transposed=is_resident and itemsize == 2 and chip.mxu > LANES and block_size % LANES == 0,
        is_split=is_split,
        n_cores=chip.n_cores if tile_t < queries else 1,
    )


@functools.partial(
    jax.jit,
    static_argnames=("topk", "keep_first", "keep_last", "has_images", "is_masked", "name", "config", "interpret"),
)
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
    has_images: bool = False,
    is_masked: bool = False,
    name: str = "hisa_refine",
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[B, T, H, D], [B, T, H], [B, n, block_size, D], [B, n, block_size], [B, T, m], ... -> [B, T, topk] int32, ....

    Args:
        k: n a multiple of GROUP if keys are resident.
        block_ids: blocks of its sequence that each query keeps, ascending, then -1.
        n_visible: [B, T] int32, candidates of each query: the first ones of its list.
        n_tokens: [B] int32, tokens present.
        keep_first, keep_last: candidates chosen whatever they score, the first and the last visible ones.
        has_images: whether to return the images of the chosen, too, [B, T, topk] int32, anything where there is none.
        is_masked: whether to return instead which candidates were chosen, [B, T, m, block_size] float32, 1 or 0.
        name: of the kernel.
    """
    (B, T, H, D), (n, block_size), m = q.shape, k.shape[1:3], block_ids.shape[2]
    block_ids = jnp.clip(block_ids, -1, n - 1)
    places = jnp.maximum(block_ids, 0)
    n_kept = jnp.where(n_visible > 0, jnp.sum(block_ids >= 0, axis=2, dtype=jnp.int32), 0)
    if not config.is_resident:
        # One sequence of all queries and all keys: lists of places in it, and of blocks of their own for the positions.
        places += n * jnp.arange(B, dtype=jnp.int32)[:, None, None]
        q, w, block_ids, places, n_visible, n_kept = (
            x.reshape(1, B * T, *x.shape[2:]) for x in (q, w, block_ids, places, n_visible, n_kept)
        )
        k = k.reshape(-1, *k.shape[2:])
        k_scale = None if k_scale is None else k_scale.reshape(-1, 1, block_size)
    queries = config.tile_t * config.n_cores
    q, w, block_ids, places, n_visible, n_kept = (
        launch.pad_axis(x, 1, queries) for x in (q, w, block_ids, places, n_visible, n_kept)
    )
    padded_m = config.padded_blocks(m, block_size)
    plan = Plan(
        tiles=q.shape[1] // queries,
        eights=config.tile_t // config.queries_per_eight,
        is_split=config.is_split,
        is_transposed=config.is_transposed,
        topk=topk,
        m=padded_m,
        block_size=block_size,
        columns=config.columns,
        keep_first=keep_first,
        keep_last=keep_last,
        has_images=has_images,
        is_masked=is_masked,
    )
    places = launch.pad_axis(places, 2, padded_m).reshape(*q.shape[:2], -1, plan.slots)
    operands = [k] if k_scale is None else [k, k_scale]
    prefetch = [steps_of(n_visible, plan, config)] + ([n_tokens] if config.is_resident else [])
    blocks = launch.pad_axis(jnp.maximum(block_ids, 0), 2, LANES)
    slots = -(-topk // LANES) * LANES
    groups = -(-m * block_size // LANES)
    rows = functools.partial(launch.rows, config.tile_t, plan.tiles)
    by_eight = functools.partial(launch.rows, config.tile_t // ROWS, plan.tiles)
    in_eights = (*q.shape[:1], q.shape[1] // ROWS, ROWS)
    outs = launch.call(
        functools.partial(refine_body.resident_body if config.is_resident else refine_body.gathered_body, plan),
        name=name,
        grid=(config.n_cores, q.shape[0], plan.tiles),
        prefetch=prefetch,
        operands=[
            places,
            n_kept[..., None],
            blocks.reshape(*in_eights, -1),
            n_visible.reshape(*in_eights, 1),
            q,
            w,
            *operands,
        ],
        in_specs=[
            rows(*places.shape[2:], memory_space=pltpu.SMEM),
            rows(1, memory_space=pltpu.SMEM),
            by_eight(ROWS, blocks.shape[2]),
            by_eight(ROWS, 1),
            rows(H, D),
            rows(H),
            *launch.in_hbm(operands),
        ],
        out_specs=[rows(groups, LANES)] if is_masked else [by_eight(ROWS, slots)] * (1 + has_images),
        out_shape=[jax.ShapeDtypeStruct((*q.shape[:2], groups, LANES), jnp.float32)]
        if is_masked
        else [jax.ShapeDtypeStruct((*in_eights, slots), jnp.int32)] * (1 + has_images),
        scratch={
            "w_vmem": pltpu.VMEM((config.tile_t, H, LANES), jnp.float32),
            "partial_vmem": pltpu.VMEM((config.columns // LANES * ROWS * ROWS, LANES), jnp.float32),
            **launch.selection_scratch(config.tile_t // ROWS, padded_groups(padded_m * block_size), topk),
            **keys_scratch(k, k_scale, plan, config),
        },
        vmem_bytes=config.vmem_bytes(H, D, n, m, block_size, topk, k.dtype.itemsize)
        + 8 * config.tile_t * (has_images * slots + is_masked * groups * LANES),
        interpret=interpret,
    )
    whole = [out.reshape(*q.shape[:2], -1)[:, : B * T // q.shape[0]] for out in outs]
    if is_masked:
        return (whole[0][..., : m * block_size].reshape(B, T, m, block_size),)
    return tuple(out[..., :topk].reshape(B, T, topk) for out in whole)


def steps_of(n_visible: Array, plan: Plan, config: Config) -> Array:
    """[B, T] -> [B * T / queries_per_eight] int32; none where nobody asks for scores and all keep all they see."""
    most = jnp.max(n_visible.reshape(-1, config.queries_per_eight), axis=1)
    longest = jnp.minimum(most, plan.blocks_per_list * plan.block_size)
    steps = -(-longest // plan.columns)
    return steps if plan.has_images else jnp.where(most <= plan.topk, 0, steps)


def keys_scratch(k: Array, k_scale: Array | None, plan: Plan, config: Config) -> dict[str, Ref]:
    """Where the keys lie in VMEM: all of a sequence, or a ring of two steps."""
    shape: tuple
    scale_shape: tuple
    sems: tuple
    block_size, D = k.shape[-2:]
    if config.is_resident:
        block = (D, block_size) if config.is_transposed else (block_size, D)
        shape, scale_shape, sems = (k.shape[1], *block), (k.shape[1], block_size), (2,)
    else:
        ring = 2, ROWS, plan.slots
        shape, scale_shape, sems = (*ring, block_size, D), (*ring, 1, block_size), (2, 2)
    scratch: dict[str, Ref] = {"keys_vmem": pltpu.VMEM(shape, k.dtype), "sems": pltpu.SemaphoreType.DMA(sems)}
    if config.is_transposed:
        scratch["staged_vmem"] = pltpu.VMEM((2, GROUP, block_size, D), k.dtype)
    if k_scale is not None:
        scratch["scale_vmem"] = pltpu.VMEM(scale_shape, jnp.float32)
    return scratch
