"""Token scores of listed units and the exact top-k of them, where eight queries side by side share a list.
    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s]), s in the units of t's list;   o[t] = the k best s, ascending

A query scores what its neighbours want, too, so it may find what its own scan has missed, but never less. Floor, 4096
queries of dsv32 with 8192 tokens a list: as `refine` of 64 blocks, v5e 1024 cycles a query; v6e 512, as here eight
queries share the load of a key into the matrix unit. Bound by the MXU. Copying a unit takes a load, a store and its
number's load, an eighth of it a query.

Keys of a sequence are in VMEM whole.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import flat_body, launch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Chip, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import tokens_a_row
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import RaggedTiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.refine_shared_body import Plan, Refs, ragged_body, refine_shared_body
from hisa_jax.kernels_pallas.mosaic_tpu.scan import Lists
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.layout import Keys, Queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result.

    Attributes:
        tile_t: queries a grid step: eights whose searches for the threshold share the latency of a sum over lanes.
        columns: tokens of a list a step.
        n_cores: cores that share the queries of a sequence.
    """

    tile_t: int = 32
    columns: int = 1024
    n_cores: int = 1

    def vmem_bytes(self, H: int, D: int, S: int, slots: int, groups: int, k: int, itemsize: int, scales: int) -> int:
        """For S keys of a sequence, and rows of scales."""
        queries = 2 * self.tile_t * (H * max(D, LANES) * itemsize + 2 * LANES * 4) + self.tile_t * H * LANES * 4
        lists = 2 * (self.tile_t // SUBLANES) * slots * 4 * 2
        keys = (S + 2 * self.columns + 3 * 16) * max(D, LANES) * itemsize
        return (
            queries
            + lists
            + keys
            + scales * LANES * 4
            + 4 * self.tile_t * (groups * LANES + 3 * (k + SLOTS))
            + (2 << 20)
        )


def heuristic(chip: Chip, T: int) -> Config:
    """For T queries of a sequence."""
    tile_t = min(32, -(-T // SUBLANES) * SUBLANES)
    return Config(tile_t=tile_t, n_cores=chip.n_cores if tile_t < T else 1)


def refine_shared(queries: Queries, keys: Keys, lists: Lists, unit: int, *, choice: Choice, config: Config) -> Array:
    """The best tokens of the units that queries side by side share.

    Args:
        queries: of [B, T, ...]; a query that sees one token has its last one's unit in its list.
        keys: [B, S, D], their scales [B, S].
        lists: of every eight queries, as `scan` gives them.

    Returns: [B, T, k] int32 positions, ascending, then -1.
    """
    (B, T, H, D), n_cores = queries.q.shape, config.n_cores
    k, scales = whole_blocks(*keys, 2 * SUBLANES if keys.scales is None else 2 * LANES)
    keys = Keys(k, None if scales is None else scales.reshape(B, -1, LANES))
    multiple = config.tile_t * n_cores
    q, w, visible = (launch.pad_axis(x, 1, multiple) for x in queries)
    tiles = q.shape[1] // multiple
    own_q = q, launch.rows(config.tile_t, tiles, H, D)
    lists = Lists(*(_with_rows(x, q.shape[1] // SUBLANES) for x in lists))
    plan = _plan(tiles, lists, unit, choice, config)
    one = _launch(plan, own_q, w, visible, lists, keys, k.shape[1], config)
    (chosen,) = dataclasses.replace(
        one, body=functools.partial(refine_shared_body, plan), grid=(n_cores, B, tiles), pinned=("q",)
    )()
    return chosen.reshape(B, q.shape[1], -1)[:, :T, : choice.k]


def refine_shared_ragged(
    queries: Queries,
    ragged: Ragged,
    tiles: RaggedTiles,
    lists: Lists,
    S: int,
    unit: int,
    *,
    choice: Choice,
    config: Config,
) -> Array:
    """The same of queries in `tiles`; anything for the others.

    Args:
        queries: of [T, ...]; lists: of every eight slots of the tiles, as `scan_ragged` gives them.
        ragged: its blocks are what is copied at a time; S: most keys of a sequence that has a tile.

    Returns: [T, k] int32.
    """
    per_core, rows = len(tiles.first) // config.n_cores, GROUP * ragged.block_size
    own_q = launch.queries(tiles, queries.q, config.tile_t, per_core)
    w, visible = tiles.gather(queries.w), tiles.gather(queries.visible)
    plan, S = _plan(per_core, lists, unit, choice, config), -(-S // rows) * rows
    one = _launch(plan, own_q, w, visible, Lists(*(x[None] for x in lists)), ragged.keys, S, config)
    one = dataclasses.replace(
        one,
        body=functools.partial(ragged_body, plan, ragged.block_size),
        grid=(config.n_cores, 1, per_core),
        scalars={**one.scalars, "n_tokens_smem": ragged.lengths},
    )
    (chosen,) = launch.by_sequence(one, tiles)()
    return tiles.scatter(chosen.reshape(1, w.shape[1], -1)[:, :, : choice.k])


def _plan(tiles: int, lists: Lists, unit: int, choice: Choice, config: Config) -> Plan:
    groups, n_eights = padded_groups(lists.units.shape[-1] * unit), config.tile_t // SUBLANES
    span, part = min(groups, LANES), min(groups, 4 * LANES // n_eights // 4)
    return Plan(choice=choice, tiles=tiles, unit=unit, columns=config.columns, span=span, part=part)


def _launch(
    plan: Plan,
    q: tuple[Array, pl.BlockSpec],
    w: Array,
    visible: Array,
    lists: Lists,
    keys: Keys,
    S: int,
    config: Config,
) -> Launch:
    """What all sequences have in common: a launch but for its body and its grid.

    Args:
        q: with its spec; w, visible: of [B, whole tiles, ...]; lists: of every eight of those.
        keys: their scales in rows of 128 or of a page; S: room for so many of a sequence.
    """
    (B, T, H), D, tile_t, k_dtype = w.shape, q[0].shape[-1], config.tile_t, keys.values.dtype
    per_row = tokens_a_row(k_dtype)
    pad = SUBLANES * per_row  # tokens after the last: a unit is copied as so many
    unit, tiles, units, n_eights = plan.unit, plan.tiles, lists.units, tile_t // SUBLANES
    slots = units.shape[2]
    n_visible = listed_tokens(visible.reshape(B, -1, SUBLANES), units, unit)
    in_row = min(config.columns // unit, LANES)
    groups, n_slots = padded_groups(slots * unit), -(-plan.choice.k // LANES) * LANES
    n_sums = flat_body.products_a_step(SUBLANES, config.columns) * SUBLANES * 2 * SUBLANES
    of_scales: dict[str, Ref] = {}
    if keys.scales is not None:
        f32, page_size = jnp.float32, keys.scales.shape[-1]
        of_scales["scale_vmem"] = pltpu.VMEM((S // page_size, page_size), f32)
        of_scales["unit_scales_vmem"] = pltpu.VMEM((S // unit, LANES), f32)
        of_scales |= {f"{x}_scales_vmem": pltpu.VMEM((plan.units, LANES), f32) for x in ("even", "odd")}
    n_scales = sum(x.shape[0] * -(-x.shape[1] // LANES) for x in of_scales.values())
    return Launch(
        body=refine_shared_body,
        refs=Refs,
        name="hisa_refine_shared",
        grid=(),
        scalars={"counts_smem": jnp.minimum(lists.counts, slots).reshape(-1)},
        operands={
            "pairs_smem": (
                (jnp.maximum(units, 0) * (unit // per_row)).reshape(B, -1, slots // in_row, in_row),
                launch.rows(n_eights, tiles, slots // in_row, in_row, memory_space=pltpu.SMEM),
            ),
            "units": (units.reshape(B, -1, slots // LANES, LANES), launch.rows(n_eights, tiles, slots // LANES, LANES)),
            "n_visible": (n_visible.reshape(B, -1, 1), launch.rows(tile_t, tiles, 1)),
            "q": q,
            "w": (w, launch.rows(tile_t, tiles, H)),
            "k_hbm": (keys.values, HBM),
            "scale_hbm": (keys.scales, HBM),
        },
        outs={
            "chosen": launch.out(launch.rows(n_eights, tiles, SUBLANES, n_slots), B, T // SUBLANES, SUBLANES, n_slots)
        },
        scratch={
            "keys_vmem": pltpu.VMEM((S + pad, D), k_dtype),
            "even_vmem": pltpu.VMEM((config.columns + pad, D), k_dtype),
            "odd_vmem": pltpu.VMEM((config.columns + pad, D), k_dtype),
            "w_vmem": pltpu.VMEM((tile_t, H, LANES), jnp.float32),
            "partial_vmem": pltpu.VMEM((n_sums, LANES), jnp.float32),
            **launch.selection_scratch(n_eights, groups, plan.choice.k),
            "sems": pltpu.SemaphoreType.DMA((2,)),
            **of_scales,
        },
        vmem_bytes=config.vmem_bytes(H, D, S, slots, groups, plan.choice.k, k_dtype.itemsize, n_scales),
        interpret=plan.choice.interpret,
    )


def listed_tokens(visible: Array, lists: Array, unit: int) -> Array:
    """[B, n, 8] tokens that queries see -> how many of those are in their list [B, n, slots].

    A list ascends, so those come first: whole units, and of its own a query sees a part.
    """
    last = jnp.maximum(visible - 1, 0)
    before = (lists[:, :, None] >= 0) & (lists[:, :, None] < (last // unit)[..., None])
    n = jnp.sum(before, axis=3, dtype=jnp.int32) * unit + last % unit + 1
    return jnp.where(visible > 0, n, 0)


def _with_rows(x: Array, n: int) -> Array:
    """Of [B, m, ...] the first n rows, or zeros after the last."""
    x = x[:, :n]
    return jnp.pad(x, ((0, 0), (0, n - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
