"""The flat indexer: all visible keys scored and the exact top-k of them, in one kernel.
    o[t] = the topk tokens s < visible[t] of largest scale[s] * sum_h w[t, h] relu(q[t, h] . k[s]), ascending, then -1

Floor, 4096 queries of dsv32 at 128K on v5e: MXU 8.8 PFLOP / 197 TFLOP/s = 45 ms; HBM 128 passes over 32 MiB of keys =
5 ms. Bound by the MXU. The sort keys of a tile of queries wait in VMEM (4 bytes a query and token) for the exact
selection, so that nothing but keys and the chosen positions crosses HBM.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.flat_body import Plan, Refs, flat_body, products_a_step, ragged_body
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import Found, Tiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.topk import from_tiles, padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Keys, Queries

_SORT_KEYS_BYTES = 36 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_t: int = 32  # queries whose sort keys are in VMEM together
    tile_s: int = 2048  # keys a grid step

    def __post_init__(self) -> None:
        if self.tile_t % SUBLANES or self.tile_s % 256:
            raise ValueError(f"{self}: tile_t must be a multiple of {SUBLANES} and tile_s of 256")

    def vmem_bytes(self, H: int, D: int, S: int, k: int, itemsize: int) -> int:
        sort_keys = 4 * self.tile_t * padded_groups(S) * LANES
        keys = 2 * self.tile_s * (D * itemsize + 4 * SUBLANES)
        queries = 2 * self.tile_t * (H * D * itemsize + 4 * LANES) + 4 * self.tile_t * H * LANES
        slots = 2 * 4 * self.tile_t * -(-k // SLOTS) * SLOTS
        return sort_keys + keys + queries + slots + 4 * LANES * max(self.tile_t, 32) * 24


def heuristic(T: int, S: int) -> Config:
    """As many queries as their sort keys fit: each more halves what the keys' copies and a grid step cost a query."""
    tile_t = 32
    while tile_t > SUBLANES and (4 * tile_t * S > _SORT_KEYS_BYTES or tile_t >= 2 * T):
        tile_t //= 2
    return Config(tile_t=tile_t, tile_s=2048 if tile_t == 32 else 4096)


def why_not(S: int) -> str | None:
    """None, or why so many keys cannot be selected from."""
    most = _SORT_KEYS_BYTES // (4 * SUBLANES)
    return None if most >= S else f"the flat indexer needs at most {most} keys, not {S}"


def flat(queries: Queries, keys: Keys, *, choice: Choice, config: Config | None = None) -> Found:
    """The best visible tokens of a batch, on a grid of (sequences, tiles of queries, tiles of keys).

    Args:
        queries: of [B, T, ...]; keys: of [B, S, D] and [B, S].

    Returns: [B, T, k] int32 positions, ascending, then -1; maybe their sort keys, anything where there is none.
    """
    (B, T, H, D), S = queries.q.shape, keys.values.shape[1]
    config = config or heuristic(T, S)
    tile_t, tile_s = config.tile_t, min(config.tile_s, -(-S // 256) * 256)
    k, k_scale = whole_blocks(*keys, tile_s)
    groups, slots = padded_groups(k.shape[1]), -(-choice.k // SLOTS) * SLOTS
    q, w, visible = (launch.pad_axis(x, 1, tile_t) for x in queries)
    visible = jnp.clip(visible, 0, S)
    tiles = visible.shape[1] // tile_t
    furthest = jnp.max(visible.reshape(B * tiles, tile_t), axis=1)

    def step(b, t, s, furthest_smem):
        # Past the last key that some query of the tile sees, the same keys again: nothing is copied.
        return jnp.minimum(s, jnp.maximum(pl.cdiv(furthest_smem[b * tiles + t], tile_s) - 1, 0))

    def of_queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, t, s, _: (b, t, *(0 for _ in shape[1:])))

    in_tiles = (tile_t // SUBLANES, slots // LANES * SUBLANES, LANES)
    in_rows = (tile_t // SUBLANES, SUBLANES, slots)
    outs = {"chosen": launch.out(of_queries(*in_tiles), B, tiles * in_tiles[0], *in_tiles[1:])}
    if choice.has_sort_keys:
        outs["sort_keys"] = launch.out(of_queries(*in_rows), B, tiles * in_rows[0], *in_rows[1:])
    plan = Plan(k=choice.k, tiles=tiles, rows=min(T, SUBLANES), span=min(groups, LANES))
    keys_spec = pl.BlockSpec((None, tile_s, D), lambda b, t, s, last: (b, step(b, t, s, last), 0))
    scale_spec = pl.BlockSpec((None, 1, tile_s), lambda b, t, s, last: (b, 0, step(b, t, s, last)))
    chosen, *sort_keys = Launch(
        body=functools.partial(flat_body, plan),
        refs=Refs,
        name="dsa_select_flat",
        grid=(B, tiles, k.shape[1] // tile_s),
        scalars={"furthest_smem": furthest},
        operands={
            "q": (q, of_queries(tile_t, H, D)),
            "w": (w, of_queries(tile_t, H)),
            "visible": (visible[..., None], of_queries(tile_t, 1)),
            "k": (k, keys_spec),
            "scale": (None if k_scale is None else k_scale[:, None], scale_spec),
        },
        outs=outs,
        scratch=scratch(H, tile_t, tile_s, groups),
        vmem_bytes=config.vmem_bytes(H, D, k.shape[1], choice.k, q.dtype.itemsize)
        + 8 * choice.has_sort_keys * tile_t * slots,
        interpret=choice.interpret,
        dimension_semantics=("parallel", "parallel", "arbitrary"),
    )()
    chosen = from_tiles(chosen.reshape(-1, *in_tiles[1:]))
    return tuple(x.reshape(B, -1, slots)[:, :T, : choice.k] for x in (chosen, *sort_keys))


def flat_ragged(queries: Queries, ragged: Ragged, tiles: Tiles, *, choice: Choice, tile_t: int, n_cores: int) -> Found:
    """The best visible tokens of the queries in `tiles`, on a grid of (cores, 1, tiles of queries).

    Args:
        ragged: its blocks are what is copied at a time, 128 or 256 keys.

    Returns: [T, k] int32, ascending, then -1; maybe their sort keys, anything where there is none.
    """
    keys, unit = ragged.keys, ragged.block_size
    (H, D), page_size = queries.q.shape[1:], keys.values.shape[1]
    w, visible = tiles.gather(queries.w), tiles.gather(queries.visible)
    T, per_block = visible.shape[1], ragged.per_block
    config = Config(tile_t=tile_t, tile_s=GROUP * unit)
    S = -(-ragged.max_keys // config.tile_s) * config.tile_s
    groups, slots, per_core = padded_groups(S), -(-choice.k // SLOTS) * SLOTS, T // tile_t // n_cores
    in_tiles = (tile_t // SUBLANES, slots // LANES * SUBLANES, LANES)
    buffers: dict[str, Ref] = {
        "keys_vmem": pltpu.VMEM((2, GROUP, unit, D), keys.values.dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
        **scratch(H, tile_t, config.tile_s, groups),
    }
    if keys.scales is not None:
        buffers["scale_vmem"] = pltpu.VMEM((2, GROUP * per_block, page_size), jnp.float32)
    plan = Plan(k=choice.k, tiles=per_core, rows=SUBLANES, span=min(groups, LANES))
    outs = {"chosen": launch.out(launch.rows(in_tiles[0], per_core, *in_tiles[1:]), 1, T // SUBLANES, *in_tiles[1:])}
    if choice.has_sort_keys:
        in_rows = launch.rows(in_tiles[0], per_core, SUBLANES, slots)
        outs["sort_keys"] = launch.out(in_rows, 1, T // SUBLANES, SUBLANES, slots)
    flat = Launch(
        body=functools.partial(ragged_body, plan),
        refs=Refs,
        name="dsa_select_flat",
        grid=(n_cores, 1, per_core),
        scalars={"furthest_smem": jnp.max(visible.reshape(-1, tile_t), axis=1)},
        operands={
            "q": launch.queries(tiles, queries.q, tile_t, per_core),
            "w": (w, launch.rows(tile_t, per_core, H)),
            "visible": (visible[..., None], launch.rows(tile_t, per_core, 1)),
            "k": (keys.values, HBM),
            "scale": (keys.scales, HBM),
        },
        outs=outs,
        scratch=buffers,
        vmem_bytes=config.vmem_bytes(H, D, S, choice.k, queries.q.dtype.itemsize)
        + 8 * (GROUP * per_block * LANES + choice.has_sort_keys * tile_t * slots),
        interpret=choice.interpret,
    )
    chosen, *sort_keys = launch.by_sequence(flat, tiles)()
    found = from_tiles(chosen[0]), *(x.reshape(T, slots) for x in sort_keys)
    return tuple(tiles.scatter(x[None, :, : choice.k]) for x in found)


def scratch(H: int, tile_t: int, tile_s: int, groups: int) -> dict[str, Ref]:
    """What scoring and the selection of a tile need."""
    n_sums = products_a_step(tile_t, tile_s) * tile_t * 2 * SUBLANES
    return {
        "sort_keys_vmem": pltpu.VMEM((tile_t // SUBLANES, groups * SUBLANES, LANES), jnp.int32),
        "w_vmem": pltpu.VMEM((tile_t, H, LANES), jnp.float32),
        "partial_vmem": pltpu.VMEM((n_sums, LANES), jnp.float32),
        "thresholds_vmem": pltpu.VMEM((tile_t // SUBLANES, SUBLANES, LANES), jnp.int32),
        "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
    }
