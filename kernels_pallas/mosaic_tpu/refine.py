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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, refine_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS, Chip
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.refine_body import Plan
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.types import Interpret, Ref

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

    def vmem_bytes(
        self, H: int, D: int, n: int, m: int, block_size: int, page_size: int, topk: int, itemsize: int
    ) -> int:
        """Everything in VMEM at a time."""
        width = self.padded_blocks(m, block_size) * block_size
        queries = 2 * self.tile_t * (H * max(D, LANES) * itemsize + 4 * max(H, LANES) + 4 * width // block_size)
        scratch = 4 * (self.tile_t * H * LANES + ROWS * ROWS * self.columns)
        sort_keys = self.tile_t * 4 * (padded_groups(width) * LANES + 3 * (topk + SLOTS))
        ring = 2 * ROWS * self.columns * (max(D, LANES) * itemsize + 4 * ROWS * (itemsize == 1))
        staged = 2 * GROUP * block_size * max(D, LANES) * itemsize
        keys = resident_bytes(n, block_size, page_size, D, itemsize) + staged if self.is_resident else ring
        return queries + scratch + sort_keys + keys


def resident_bytes(n: int, block_size: int, page_size: int, D: int, itemsize: int) -> int:
    """Of the keys of a sequence in VMEM, with their scales, which lie a page a row."""
    scales = 4 * max(page_size, LANES) * (block_size // page_size) * (itemsize == 1)
    return n * (block_size * max(D, LANES) * itemsize + scales)


def most_resident(block_size: int, page_size: int, D: int, itemsize: int) -> int:
    """Blocks of a sequence that fit VMEM; whole groups."""
    return _RESIDENT_BYTES // resident_bytes(GROUP, block_size, page_size, D, itemsize) * GROUP


def resident(chip: Chip, T: int, H: int, block_size: int, itemsize: int) -> Config:
    """For keys in VMEM, shared by T queries."""
    tile_t = min(32, -(-T // ROWS) * ROWS)
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
    tile_t, columns = min(32, -(-T // ROWS) * ROWS), _columns(H, is_resident=False)
    is_split = T < ROWS
    if is_split:
        columns = min(columns, -(-m * block_size // (256 * ROWS)) * 256)
    n_cores = chip.n_cores if tile_t < T else 1
    return Config(tile_t=tile_t, columns=columns, is_resident=False, is_split=is_split, n_cores=n_cores)


def _columns(H: int, *, is_resident: bool) -> int:
    # 128 products a step hide how long the first and the last of them take; copies take longer than that anyway, and
    # with more heads a product has more rows.
    return 2048 if is_resident and H <= 64 else 1024 if H <= 64 else 512


def heuristic(chip: Chip, B: int, T: int, H: int, D: int, n: int, m: int, block_size: int, itemsize: int) -> Config:
    """Keys in VMEM if they fit and enough queries share them; else the queries of a batch side by side."""
    if T >= ROWS and T * m >= n and n <= most_resident(block_size, block_size, D, itemsize):
        return resident(chip, T, H, block_size, itemsize)
    return gathered(chip, B * T, H, m, block_size)


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
    has_sort_keys: bool = False,
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
        has_sort_keys: whether to return the sort keys of the chosen, too: [B, T, topk] int32, anything in empty slots.
        is_masked: whether to return instead which candidates were chosen, [B, T, m, block_size] float32, 1 or 0.
        name: of the kernel.
    """
    (B, T, *_), (n, block_size) = q.shape, k.shape[1:3]
    block_ids = jnp.clip(block_ids, -1, n - 1)
    places = jnp.maximum(block_ids, 0)
    options: dict[str, Any] = dict(
        block_size=block_size,
        topk=topk,
        config=config,
        keep_first=keep_first,
        keep_last=keep_last,
        has_sort_keys=has_sort_keys,
        is_masked=is_masked,
        name=name,
        interpret=interpret,
    )
    if config.is_resident:
        outs = _launch(q, w, k, k_scale, block_ids, places, n_visible, n_tokens, n=n, **options)
        return tuple(out[:, :T] for out in outs)
    # One sequence of all queries and all keys: lists of places in it, and of blocks of their own for the positions.
    places += n * jnp.arange(B, dtype=jnp.int32)[:, None, None]
    q, w, block_ids, places, n_visible = (x.reshape(B * T, *x.shape[2:]) for x in (q, w, block_ids, places, n_visible))
    k = k.reshape(-1, *k.shape[2:])
    k_scale = None if k_scale is None else k_scale.reshape(-1, block_size)
    outs = refine_listed(q, w, k, k_scale, block_ids, places, n_visible, **options)
    return tuple(out.reshape(B, T, *out.shape[1:]) for out in outs)


def refine_listed(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    places: Array,
    n_visible: Array,
    *,
    config: Config,
    **options: Any,
) -> tuple[Array, ...]:
    """As `refine` for queries that copy their blocks: [T, H, D], [T, H], [N, page_size, D] -> [T, topk] int32, ....

    Args:
        k_scale: [N, page_size] float32 or None.
        block_ids: [T, m] int32; places: [T, m * per_block] int32, the pages of each, 0 or more.
    """
    inputs = (q[None], w[None], k, k_scale, block_ids[None], places[None], n_visible[None])
    outs = _launch(*inputs, jnp.zeros((1,), jnp.int32), n=0, config=config, **options)
    return tuple(out[0, : q.shape[0]] for out in outs)


def refine_ragged(
    q: Array,
    w: Array,
    ragged: Ragged,
    tiles: RaggedTiles,
    block_ids: Array,
    n_visible: Array,
    *,
    n: int,
    **options: Any,
) -> Array:
    """As `refine` for the sequences in `tiles`, of n blocks at most: ..., [T, m], [T] -> [T, topk] int32."""
    w, block_ids, n_visible = (tiles.gather(x) for x in (w, block_ids, n_visible))
    places = jnp.clip(block_ids, 0, n - 1)
    (out,) = _launch(
        q,
        w,
        ragged.k,
        ragged.k_scale,
        block_ids,
        places,
        n_visible,
        ragged.lengths,
        tiles,
        n=n,
        block_size=ragged.block_size,
        **options,
    )
    return tiles.scatter(out)


@functools.partial(
    jax.jit,
    static_argnames=(
        "n",
        "block_size",
        "topk",
        "keep_first",
        "keep_last",
        "has_sort_keys",
        "is_masked",
        "name",
        "config",
        "interpret",
    ),
)
def _launch(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    places: Array,
    n_visible: Array,
    n_tokens: Array,
    tiles: RaggedTiles | None = None,
    *,
    n: int,
    block_size: int,
    topk: int,
    config: Config,
    keep_first: int = 0,
    keep_last: int = 0,
    has_sort_keys: bool = False,
    is_masked: bool = False,
    name: str = "hisa_refine",
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[B, T, topk] int32, T padded to whole tiles; maybe their sort keys; or a mask, [B, T, m, block_size] float32.

    Args:
        q: [B, T, H, D]; of ragged sequences [rows, H, D], while what else has a row a query lies in `tiles`, B = 1.
        k: [B, n, block_size, D], or [N, page_size, D].
        n_tokens: [B] or [R] int32; n: blocks of a sequence in VMEM. Both unused where queries copy their own.
    """
    (H, D), m, page_size = q.shape[-2:], block_ids.shape[2], k.shape[-2]
    per_block = block_size // page_size
    n_kept = jnp.where(n_visible > 0, jnp.sum(block_ids >= 0, axis=2, dtype=jnp.int32), 0)
    queries = config.tile_t * config.n_cores
    w, block_ids, places, n_visible, n_kept = (
        launch.pad_axis(x, 1, queries) for x in (w, block_ids, places, n_visible, n_kept)
    )
    q = launch.pad_axis(q, 1, queries) if tiles is None else q
    B, T = n_visible.shape
    padded_m = config.padded_blocks(m, block_size)
    plan = Plan(
        tiles=T // queries,
        eights=config.tile_t // config.queries_per_eight,
        is_split=config.is_split,
        is_transposed=config.is_transposed,
        topk=topk,
        m=padded_m,
        block_size=block_size,
        per_block=per_block,
        columns=config.columns,
        keep_first=keep_first,
        keep_last=keep_last,
        has_sort_keys=has_sort_keys,
        is_masked=is_masked,
    )
    # Of resident keys lists name blocks, else pages.
    listed = 1 if config.is_resident else per_block
    places = launch.pad_axis(places, 2, padded_m * listed).reshape(B, T, -1, plan.slots * listed)
    operands = [k] if k_scale is None else [k, k_scale]
    blocks = launch.pad_axis(jnp.maximum(block_ids, 0), 2, LANES)
    slots = -(-topk // LANES) * LANES
    groups = -(-m * block_size // LANES)
    rows = functools.partial(launch.rows, config.tile_t, plan.tiles)
    by_eight = functools.partial(launch.rows, config.tile_t // ROWS, plan.tiles)
    in_eights = (B, T // ROWS, ROWS)
    call: Callable = launch.call
    body: Callable = refine_body.gathered_body
    prefetch = [steps_of(n_visible, plan, config)]
    if config.is_resident:
        call, body = functools.partial(launch.call_by_sequence, tiles=tiles), refine_body.resident_body
        prefetch.append(n_tokens)
    outs = call(
        functools.partial(body, plan),
        name=name,
        grid=(config.n_cores, B, plan.tiles),
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
            launch.queries(tiles, config.tile_t, plan.tiles, H, D),
            rows(H),
            *launch.in_hbm(operands),
        ],
        out_specs=[rows(groups, LANES)] if is_masked else [by_eight(ROWS, slots)] * (1 + has_sort_keys),
        out_shape=[jax.ShapeDtypeStruct((B, T, groups, LANES), jnp.float32)]
        if is_masked
        else [jax.ShapeDtypeStruct((*in_eights, slots), jnp.int32)] * (1 + has_sort_keys),
        scratch={
            "w_vmem": pltpu.VMEM((config.tile_t, H, LANES), jnp.float32),
            "partial_vmem": pltpu.VMEM((config.columns // LANES * ROWS * ROWS, LANES), jnp.float32),
            **launch.selection_scratch(config.tile_t // ROWS, padded_groups(padded_m * block_size), topk),
            **keys_scratch(k, k_scale, n, plan, config),
        },
        vmem_bytes=config.vmem_bytes(H, D, n, m, block_size, page_size, topk, k.dtype.itemsize)
        + 8 * config.tile_t * (has_sort_keys * slots + is_masked * groups * LANES),
        interpret=interpret,
    )
    whole = [out.reshape(B, T, -1) for out in outs]
    if is_masked:
        return (whole[0][..., : m * block_size].reshape(B, T, m, block_size),)
    return tuple(out[..., :topk] for out in whole)


def steps_of(n_visible: Array, plan: Plan, config: Config) -> Array:
    """[B, T] -> [B * T / queries_per_eight] int32; none where nobody asks for scores and all keep all they see."""
    most = jnp.max(n_visible.reshape(-1, config.queries_per_eight), axis=1)
    longest = jnp.minimum(most, plan.blocks_per_list * plan.block_size)
    steps = -(-longest // plan.columns)
    return steps if plan.has_sort_keys else jnp.where(most <= plan.topk, 0, steps)


def keys_scratch(k: Array, k_scale: Array | None, n: int, plan: Plan, config: Config) -> dict[str, Ref]:
    """Where the keys lie in VMEM: all of a sequence, or a ring of two steps."""
    shape: tuple
    scale_shape: tuple
    block_size, page_size, D = plan.block_size, *k.shape[-2:]
    if config.is_resident:
        block = (D, block_size) if config.is_transposed else (block_size, D)
        shape, scale_shape = (n, *block), (n * plan.per_block, page_size)
    else:
        ring = 2, ROWS, plan.slots
        shape, scale_shape = (*ring, block_size, D), (*ring, plan.per_block, page_size)
    scratch: dict[str, Ref] = {"keys_vmem": pltpu.VMEM(shape, k.dtype), "sems": pltpu.SemaphoreType.DMA((2, 2))}
    if config.is_transposed:
        scratch["staged_vmem"] = pltpu.VMEM((2, GROUP, block_size, D), k.dtype)
    if k_scale is not None:
        scratch["scale_vmem"] = pltpu.VMEM(scale_shape, jnp.float32)
    return scratch
