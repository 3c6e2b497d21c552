"""The scan: which units of tokens each eight queries keep by the score of a few heads in place of all.
    o[e] = every unit that is among the k best of some query of eight, by the maximum over a unit's tokens s of
           v[t] . k[s] + sum over n exact heads of w[t, h] * relu(q[t, h] . k[s])

Floor, 4096 queries of dsv32 at 128K, 4 exact heads: 5 / 64 of the flat indexer's products, v5e 1280 cycles a query and
v6e 640; HBM 64 passes over 32 MiB of keys = 2.6 ms on v5e, 960 cycles a query, under the products. Bound by the MXU,
and on v6e as much by the VPU: about 20 operations for each register of scores.

Sort keys of units wait in VMEM, as those of tokens do in `flat`, for the search of each query's threshold. A threshold
that a few more units reach is as good: what `refine_shared` scores may be more than asked for, not less.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.scan_body import Plan, Refs, groups_a_turn, ragged_body, scan_body
from hisa_jax.kernels_pallas.mosaic_tpu.topk import from_tiles, padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Keys
from hisa_jax.xla.scan import ScanHeads

__all__ = ["groups_a_turn", "heuristic", "listed", "scan", "scan_ragged"]

_MOST_LISTED = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, and how many units are kept beyond those asked for.

    Attributes:
        tile_t: queries that share a pass over the keys: eight lists make one tile of eight rows.
        tile_s: keys a grid step.
        slack: a part of the units asked for, by which there may be more.
    """

    tile_t: int = 64
    tile_s: int = 8192
    slack: float = 1 / 8

    def __post_init__(self) -> None:
        if self.tile_t % SUBLANES or self.tile_t > SUBLANES * SUBLANES:
            raise ValueError(f"Config(tile_t={self.tile_t}): must be a multiple of {SUBLANES}, at most 64")

    def vmem_bytes(self, R: int, D: int, groups: int, slots: int) -> int:
        """Of everything in VMEM, for R heads."""
        sort_keys = 4 * LANES * groups * (self.tile_t + SUBLANES)
        windows = 2 * (self.tile_s * D * 2 + self.tile_t * (R * D * 2 + (R + 1) * LANES * 4) + SUBLANES * slots * 4)
        return sort_keys + windows + self.tile_t * R * LANES * 4 + (2 << 20)


def heuristic(T: int, S: int, unit: int) -> Config:
    """For T queries and S keys of a sequence."""
    whole = -(-S // (LANES * unit)) * LANES * unit
    return Config(tile_t=min(64, -(-T // SUBLANES) * SUBLANES), tile_s=min(8192, whole))


def listed(S: int, unit: int) -> int:
    """Units that a list has room for: all of few, half of many, as where half are kept the flat indexer is faster."""
    return min(-(-S // (unit * SLOTS)) * SLOTS, _MOST_LISTED)


class Lists(NamedTuple):
    """Which units each eight queries keep.

    Attributes:
        units: [..., n, slots] int32, ascending, then -1.
        counts: [..., n] int32, how many they are, which may be more than there is room for.
    """

    units: Array
    counts: Array


def scan(
    heads: ScanHeads, eligible: Array, keys: Keys, unit: int, *, choice: Choice, config: Config | None = None
) -> Lists:
    """The units that each eight queries of a batch keep, on a grid of (sequences, tiles of queries, tiles of keys).

    Args:
        heads: of [B, T, ...]; eligible: [B, T] int32, units of each query.
        keys: [B, S, D], their scales [B, S].
        choice: units a query.

    Returns: of each sequence n eights, at least T / 8.
    """
    (B, T, D), S = heads.virtual.shape, keys.values.shape[1]
    config = config or heuristic(T, S, unit)
    tile_t, tile_s = config.tile_t, config.tile_s
    k, scales = whole_blocks(*keys, tile_s)
    padded, eligible = jax.tree.map(lambda x: launch.pad_axis(x, 1, tile_t), (heads, eligible))
    tiles = eligible.shape[1] // tile_t
    furthest = jnp.minimum(jnp.max(eligible.reshape(B * tiles, tile_t), axis=1) * unit, k.shape[1])

    def step(b, t, s, furthest_smem):
        # Past the last key that some query of the tile sees, the same keys again: nothing is copied.
        return jnp.minimum(s, jnp.maximum(pl.cdiv(furthest_smem[b * tiles + t], tile_s) - 1, 0))

    def of_queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, t, s, _: (b, t, *(0 for _ in shape[1:])))

    operands = Operands(
        (k, pl.BlockSpec((1, tile_s, D), lambda b, t, s, last: (b, step(b, t, s, last), 0))),
        (
            None if scales is None else scales.reshape(B, -1, LANES),
            pl.BlockSpec((None, tile_s // LANES, LANES), lambda b, t, s, last: (b, step(b, t, s, last), 0)),
        ),
    )
    plan = _plan(padded, tiles, k.shape[1], unit, choice, config)
    one = _launch(plan, padded, eligible, furthest, operands, of_queries, k.shape[1], config)
    grid, semantics = (B, tiles, k.shape[1] // tile_s), ("parallel", "parallel", "arbitrary")
    body = functools.partial(scan_body, plan)
    written = dataclasses.replace(one, body=body, grid=grid, dimension_semantics=semantics)()
    return _of_eights(written, tile_t // SUBLANES)


def scan_ragged(
    heads: ScanHeads,
    eligible: Array,
    ragged: Ragged,
    tiles: RaggedTiles,
    S: int,
    unit: int,
    *,
    choice: Choice,
    n_cores: int,
) -> Lists:
    """The same of the queries in `tiles`, on a grid of (cores, 1, tiles of queries).

    Args:
        heads, eligible: of the tiles' slots, [1, tiles * tile_t, ...].
        ragged: its blocks are what is copied at a time; S: most keys of a sequence that has a tile.

    Returns: of every eight slots; a tile without a query keeps nothing.
    """
    n_tiles, D = len(tiles.first), heads.virtual.shape[2]
    tile_t, per_core = eligible.shape[1] // n_tiles, n_tiles // n_cores
    config = Config(tile_t=tile_t, tile_s=GROUP * ragged.block_size)
    S = -(-S // config.tile_s) * config.tile_s

    def of_queries(*shape: int) -> pl.BlockSpec:
        return launch.rows(shape[0], per_core, *shape[1:])

    furthest = jnp.minimum(jnp.max(eligible.reshape(n_tiles, tile_t), axis=1) * unit, S)
    keys, dtype = Operands((ragged.keys.values, HBM), (ragged.keys.scales, HBM)), ragged.keys.values.dtype
    plan = _plan(heads, per_core, S, unit, choice, config)
    one = _launch(plan, heads, eligible, furthest, keys, of_queries, S, config)
    scratch = {
        **one.scratch,
        "keys_vmem": pltpu.VMEM((2, config.tile_s, D), dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if ragged.keys.scales is not None:
        page_size = ragged.keys.values.shape[1]
        scratch["scale_vmem"] = pltpu.VMEM((2, config.tile_s // page_size, page_size), jnp.float32)
    body, grid = functools.partial(ragged_body, plan), (n_cores, 1, per_core)
    written = launch.by_sequence(dataclasses.replace(one, body=body, grid=grid, scratch=scratch), tiles)()
    lists = _of_eights(written, tile_t // SUBLANES)
    is_tile = jnp.repeat(tiles.sequence >= 0, tile_t // SUBLANES)
    return Lists(lists.units[0], jnp.where(is_tile, lists.counts[0], 0))


class Operands(NamedTuple):
    """Keys and their scales or None, as an operand of a launch."""

    values: tuple[Array, pl.BlockSpec]
    scales: tuple[Array | None, pl.BlockSpec]


def _plan(heads: ScanHeads, tiles: int, S: int, unit: int, choice: Choice, config: Config) -> Plan:
    """For room for S keys of a sequence; `tiles`: see `Plan`."""
    return Plan(
        tiles=tiles,
        unit=unit,
        n_exact=heads.w.shape[2],
        slack=int(config.slack * choice.k),
        span=min(padded_groups(S // unit), LANES),
        choice=choice,
    )


def _launch(
    plan: Plan,
    heads: ScanHeads,
    eligible: Array,
    furthest: Array,
    keys: Operands,
    of_queries: Callable[..., pl.BlockSpec],
    S: int,
    config: Config,
) -> Launch:
    """What all sequences have in common: a launch but for its body and its grid.

    Args:
        heads, eligible: of [B, whole tiles, ...]; furthest: [B * tiles] int32, keys that a tile sees.
        of_queries: shape of a tile of [B, n, ...] -> its spec.
        S: room for so many keys of a sequence.
    """
    (B, T, D), n_exact, n_eights = heads.virtual.shape, plan.n_exact, config.tile_t // SUBLANES
    groups, slots = padded_groups(S // plan.unit), listed(S, plan.unit)
    rows = jnp.concatenate([heads.virtual[:, :, None], heads.exact.astype(jnp.float32)], axis=2).astype(jnp.bfloat16)
    rows, w = (x.reshape(B, T // SUBLANES, SUBLANES, *x.shape[2:]).swapaxes(2, 3) for x in (rows, heads.w))
    scratch: dict[str, Ref] = {
        "sort_keys_vmem": pltpu.VMEM((n_eights, groups * SUBLANES, LANES), jnp.int32),
        "thresholds_vmem": pltpu.VMEM((n_eights, SUBLANES, LANES), jnp.int32),
        "union_vmem": pltpu.VMEM((1, groups * SUBLANES, LANES), jnp.int32),
        "table_vmem": pltpu.VMEM(topk_body.table_shape(groups), jnp.int32),
    }
    if n_exact:
        scratch["w_vmem"] = pltpu.VMEM((n_eights, n_exact * SUBLANES, LANES), jnp.float32)
    if keys.values[0].dtype != rows.dtype:
        scratch["wide_vmem"] = pltpu.VMEM((1, config.tile_s, D), rows.dtype)
    in_tile, n_tiles = (slots // LANES * SUBLANES, LANES), T // config.tile_t
    of_exact = of_queries(n_eights, n_exact * SUBLANES, 1)
    return Launch(
        body=scan_body,
        refs=Refs,
        name="hisa_scan",
        grid=(),
        scalars={"furthest_smem": furthest},
        operands={
            "heads": (rows.reshape(B, T // SUBLANES, -1, D), of_queries(n_eights, (n_exact + 1) * SUBLANES, D)),
            "w": (w.reshape(B, T // SUBLANES, -1, 1) if n_exact else None, of_exact),
            "eligible": (eligible.reshape(B, -1, SUBLANES, 1), of_queries(n_eights, SUBLANES, 1)),
            "k": keys.values,
            "scale": keys.scales,
        },
        outs={
            "lists": launch.out(of_queries(*in_tile), B, n_tiles * in_tile[0], LANES),
            "counts": launch.out(of_queries(SUBLANES, LANES), B, n_tiles * SUBLANES, LANES),
        },
        scratch=scratch,
        vmem_bytes=config.vmem_bytes(n_exact + 1, D, groups, slots),
        interpret=plan.choice.interpret,
    )


def _of_eights(written: Sequence[Array], n_eights: int) -> Lists:
    """What the kernel writes, eight lists a tile -> those of the tile's `n_eights`, of [B, n, ...]."""
    lists, counts = written
    B, n_tiles = lists.shape[0], counts.shape[1] // SUBLANES
    lists = from_tiles(lists.reshape(B * n_tiles, -1, LANES)).reshape(B, n_tiles, SUBLANES, -1)[:, :, :n_eights]
    counts = counts[:, :, 0].reshape(B, n_tiles, SUBLANES)[:, :, :n_eights]
    return Lists(lists.reshape(B, n_tiles * n_eights, -1), counts.reshape(B, -1))
