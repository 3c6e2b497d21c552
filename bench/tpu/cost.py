"""What runs in the TPU kernels, how often, and what they move: the numbers by which schedules are multiplied.

Loops are named in program order. How many passes a search for a threshold takes is found by trial (`passes.py`);
everything else follows from shapes.
All figures are for one TensorCore.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from bench import shapes
from bench.tpu.chips import Chip
from bench.tpu.passes import near_passes, passes
from bench.tpu.schedule import Schedule
from hisa_jax.kernels_pallas.mosaic_tpu import (
    block_filter,
    flat,
    refine,
    refine_shared,
    scan,
    scan_heads,
    sparse_mla,
    units,
)
from hisa_jax.kernels_pallas.mosaic_tpu.config import CHIPS as KERNEL_CHIPS
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.config import Chip as KernelChip
from hisa_jax.kernels_pallas.mosaic_tpu.flat_body import COLUMNS, products_a_step
from hisa_jax.kernels_pallas.mosaic_tpu.scan_heads_body import AT_A_TIME
from hisa_jax.kernels_pallas.mosaic_tpu.scan_stages import unit_of
from hisa_jax.kernels_pallas.mosaic_tpu.topk import padded_groups
from hisa_jax.kernels_pallas.mosaic_tpu.topk_body import SLOTS
from hisa_jax.methods import BlockSparse, Scan

TOPK = ("bounds", "passes", "count", "tie_steps", "tie_count", "tie_drop", "tiles")
_NO_TIES = {"tie_steps": 0.0, "tie_count": 0.0, "tie_drop": 0.0}
# Units that eight queries side by side keep, of those that one keeps: of 1.5 k tokens on SmolLM2 (docs/tpu.md).
UNION = 1.43
_ITEMSIZE = {"bf16": 2, "int8": 1, "e4m3": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """How often the loops of one kernel run (see `Schedule.named_trips`) and what it moves.

    Attributes:
        moved_bytes: over HBM, under the arithmetic; `exposed_bytes`: while nothing else runs.
        pairs: (query, 128 keys) products of a turn of the loop "score", where that is of interest.
    """

    name: str
    loops: tuple[str, ...]
    trips: Mapping[str, float]
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rest: Mapping[str, float] = dataclasses.field(default_factory=dict)
    moved_bytes: float = 0.0
    exposed_bytes: float = 0.0
    pairs: float = 0.0

    def cycles(self, schedule: Schedule) -> tuple[float, float, Mapping[str, float]]:
        """Cycles of all, of the exact top-k, and slots used."""
        trips = schedule.named_trips(self.loops, self.trips, self.shares, self.rest)
        nothing = {name: 0.0 for name in self.loops if name in TOPK}
        without = schedule.named_trips(self.loops, {**self.trips, **nothing}, self.shares, self.rest)
        cost = schedule.cost(trips)
        return cost.cycles, cost.cycles - schedule.cost(without).cycles, cost.slots

    def cycles_a_pair(self, schedule: Schedule) -> float:
        path = next(path for path, name in schedule.names(self.loops).items() if name == "score")
        return schedule.cost(path=path).cycles / self.pairs


def flat_kernels(chip: Chip, model: shapes.Model, B: int, T: int, S: int, dtype: str) -> list[Kernel]:
    config = flat.heuristic(T, S)
    per_sequence = -(-T // config.tile_t)
    tiles = -(-B * per_sequence // chip.cores_per_device)
    # Visible to the last query of each tile.
    last = np.minimum(S - T + config.tile_t * (np.arange(per_sequence) + 1), S)
    tile_s = min(config.tile_s, S)
    steps = float(np.mean(-(-last // tile_s)))
    groups = padded_groups(S)
    span = min(groups, 128)
    scanned = float(np.mean(-(-last // (span * 128)) * span))
    trips = {
        "grid": tiles * S / tile_s,
        "score": tile_s / COLUMNS / products_a_step(config.tile_t, tile_s),
        "fill": 0.0,
        **_topk_trips(scanned, S, model.topk, config.tile_t),
        "spans": scanned / span,
    }
    share = tile_s / S  # of the steps of a tile
    names = ["score", "fill", *_topk_loops(groups, config.tile_t), *(["spans"] if groups > 128 else [])]
    keys = tiles * steps * tile_s * (model.D * _ITEMSIZE[dtype] + (0 if dtype == "bf16" else 4))
    return [
        Kernel(
            name="dsa_select_flat",
            loops=tuple(names),
            trips=trips,
            shares={"score": steps * share, "fill": share},
            rest={"grid": share, "spans": min(1.0, SLOTS / model.topk + 0.6 * span / scanned)},
            moved_bytes=keys + tiles * config.tile_t * _query_bytes(model, dtype),
        )
    ]


def hisa_kernels(chip: Chip, model: shapes.Model, T: int, S: int, dtype: str) -> list[Kernel]:
    kind = KERNEL_CHIPS[chip.kind]
    n, queries = S // model.block_size, T // chip.cores_per_device
    key_bytes = S * (model.D * _ITEMSIZE[dtype] + (0 if dtype == "bf16" else 4))
    moved = queries * _query_bytes(model, dtype)
    out = []
    if n > model.block_topk:
        config = block_filter.heuristic(kind, T)
        tiles = queries / config.tile_t
        groups = padded_groups(n)
        trips = {
            "grid": tiles,
            "pool": n / 16,
            "load": 0.0,
            "score": math.ceil(n / 256),
            **_topk_trips(groups, n, model.block_topk, config.tile_t),
        }
        out.append(
            Kernel(
                name="hisa_block_filter",
                loops=("fill", "score", *_topk_loops(groups, config.tile_t)),
                trips=trips,
                shares={"pool": 1 / tiles},
                moved_bytes=moved + key_bytes,
            )
        )
    refine_config = _refine_config(kind, model, T, n, _ITEMSIZE[dtype])
    tiles = queries / refine_config.tile_t
    width = min(model.block_topk * model.block_size, S)
    pairs = queries * width / model.block_size
    trips = {
        "grid": tiles,
        "pool": n / 16,  # what a sequence's keys are brought in by, turned for the product
        "load": 0.0,
        "score": refine_config.tile_t / 8 * width / refine_config.columns,
        **_topk_trips(padded_groups(width), width, model.topk, refine_config.tile_t),
    }
    gathered = 0.0 if refine_config.is_resident else pairs * key_bytes / n
    out.append(
        Kernel(
            name="hisa_refine",
            loops=("fill", "score", *_topk_loops(padded_groups(width), refine_config.tile_t), "positions"),
            trips=trips,
            shares={"pool": 1 / tiles},
            moved_bytes=moved + gathered + 4 * queries * model.topk,
            exposed_bytes=key_bytes if refine_config.is_resident else 0.0,
            pairs=8 * refine_config.columns / 128,
        )
    )
    return out


def units_kernels(
    chip: Chip, model: shapes.Model, method: BlockSparse, B: int, T: int, S: int, dtype: str
) -> list[Kernel]:
    """Of a batch, whose keys are copied 128 at a time; of heads that choose alone each is a query."""
    heads, H = (model.H, 1) if method.per_head else (1, model.H)
    n, tile_s, rows = S // method.block_size, GROUP * LANES, T * heads
    config = units.Config(tile_t=units.most_queries(rows, H, n))
    per_sequence = -(-rows // config.tile_t)
    tiles = B * per_sequence / min(chip.cores_per_device, B * per_sequence)
    # The blocks that the last query of each tile sees, whole.
    last = S - T + np.minimum((config.tile_t * (np.arange(per_sequence) + 1) - 1) // heads, T - 1) + 1
    steps = float(np.mean(-(-last // tile_s)))
    groups, per_step = padded_groups(n), tile_s // method.block_size
    parts, chunks = config.tile_t // config.part, config.lanes // LANES * max(per_step // LANES, 1)
    selection = [name for name in TOPK if name != "tiles" or config.part > SUBLANES]
    if H == 1:
        scoring, trips = ["flush"], {"flush": chunks * min(per_step / LANES, 1.0)}
    else:
        scoring, trips = ["score"], {"score": tile_s / COLUMNS / products_a_step(config.tile_t, tile_s)}
    row_bytes = model.D * _ITEMSIZE[dtype] + (0 if dtype == "bf16" else 4)
    return [
        Kernel(
            name="hisa_units",
            loops=("steps", *scoring, *(["parts"] if parts > 1 else []), "finish", *selection),
            trips={
                "grid": tiles,
                "steps": steps,
                "parts": parts,
                "finish": groups,
                **trips,
                **_topk_trips(groups, n, method.block_topk, config.part, method.block_size),
            },
            moved_bytes=tiles * (steps * tile_s * row_bytes + config.tile_t * H * (model.D * _ITEMSIZE[dtype] + 4)),
            exposed_bytes=tiles * tile_s * row_bytes,
        )
    ]


def scan_kernels(chip: Chip, model: shapes.Model, method: Scan, T: int, S: int) -> list[Kernel]:
    """Of a batch of one sequence, bfloat16; lists have `UNION` times the units of a query."""
    kind = KERNEL_CHIPS[chip.kind]
    queries, unit, eight = T // chip.cores_per_device, unit_of(method, jnp.bfloat16), SUBLANES
    config = scan.heuristic(T, S, unit)
    n, tiles, steps = S // unit, queries / config.tile_t, S / config.tile_s
    groups, per_step = padded_groups(n), config.tile_s / (unit * 128)
    span, slack = min(groups, 128), int(config.slack * method.block_topk)
    of_sample, of_all = near_passes(n, method.block_topk, slack, unit, config.tile_t)
    listed = UNION * method.block_topk
    heads = method.exact_heads + 1
    scanning = Kernel(
        name="hisa_scan",
        loops=(
            "score", "fill", "sample_bounds", "sample_passes", "sample_count", "first_count", "passes", "count",
            "eights", "unite", *(["spans"] if groups > span else []),
        ),
        trips={
            "grid": tiles * steps,
            "score": per_step / scan.groups_a_turn(unit, int(per_step)),
            "fill": 0.0,
            "sample_bounds": groups / 8 / min(8, groups // 8),
            "sample_passes": of_sample,
            "sample_count": groups / 8 / min(16, groups // 8),
            "first_count": groups / 16,
            "passes": of_all - 1,
            "count": groups / 16,
            "eights": config.tile_t / eight,
            "unite": groups / 32,
            "spans": groups / span,
        },
        shares={"fill": 1 / steps},
        # A span's units fill its share of the list, and a register of slots begun before it.
        rest={"grid": 1 / steps, "spans": min(1.0, (listed * span / groups + SLOTS) / scan.listed(S, unit))},
        moved_bytes=tiles * S * model.D * 2 + queries * (heads * model.D * 2 + scan.listed(S, unit) / 2),
    )  # fmt: skip
    refining = refine_shared.heuristic(kind, T)
    columns = listed * unit
    part = float(-(-columns // 128))
    rows = refining.tile_t
    spans = ["spans"] if padded_groups(scan.listed(S, unit) * unit) > 128 else []
    trips = {
        "grid": queries / rows,
        # Two a turn; of an odd number one is in vain.
        "steps": rows / eight * columns / refining.columns / 2 + 1 / 4,
        "fill_eights": rows / eight,
        "fill": 0.0,
        **_topk_trips(part, int(columns), model.topk, rows),
        "spans": math.ceil(part / 128),
        "positions": rows / eight,
        "parts": part / unit / 4,
    }
    exact = Kernel(
        name="hisa_refine_shared",
        loops=("steps", "fill_eights", "fill", *TOPK, *spans, "positions", "parts"),
        trips=trips,
        rest={"spans": 1.0},
        moved_bytes=queries * (_query_bytes(model, "bf16") + 4 * model.topk + scan.listed(S, unit)),
        exposed_bytes=S * model.D * 2,
    )  # fmt: skip
    tile_t = scan_heads.heuristic(T).tile_t
    halves = float(scan_heads.Config(tile_t=tile_t).n_halves)
    pairs = model.H // 2 / AT_A_TIME
    finding = Kernel(
        name="hisa_scan_heads",
        loops=("spread", "steps", "halves", "pairs", "bits", "open_halves", "open", "choose", "eights", "one_by_one"),
        trips={
            "grid": queries / tile_t,
            "spread": tile_t / eight,
            "steps": 1.0,  # the queries of a tile sample at the same step
            "halves": halves,
            "pairs": pairs,
            "bits": 32,
            "open_halves": halves,
            "open": pairs,
            "choose": halves,
            "eights": tile_t / eight,
            "one_by_one": 0.0,
        },
        moved_bytes=queries * (_query_bytes(model, "bf16") + 4 * (method.exact_heads + 1) * model.D),
    )
    return [finding, scanning, exact]


def _refine_config(kind: KernelChip, model: shapes.Model, T: int, n: int, itemsize: int) -> refine.Config:
    """As `select.best_tokens` chooses it, for one sequence of n blocks."""
    m = min(model.block_topk, n)
    most = refine.most_resident(model.block_size, model.block_size, model.D, itemsize)
    if refine.is_shared(np.array(T), np.array(n), m, most):
        return refine.resident(kind, T, 32, model.H, model.block_size, itemsize)
    return refine.gathered(kind, T, model.H, m, model.block_size)


def decode_kernels(chip: Chip, model: shapes.Model, B: int, S: int, dtype: str) -> list[Kernel]:
    """One query a sequence, from kept means: the block filter and refine are one kernel on means and on keys."""
    kind = KERNEL_CHIPS[chip.kind]
    parts = block_filter.heuristic(kind, 1).mean_parts
    n, m = S // model.block_size, model.block_topk
    row_bytes = model.D * _ITEMSIZE[dtype] + (0 if dtype == "bf16" else 4)
    return [
        # XLA cuts the means into parts first.
        _gathered(chip, "hisa_block_filter", model, B, n // 128, 128, model.block_topk,
                  row_bytes=2 * parts * model.D, exposed_bytes=B * n * model.D * (4 + 2 * parts)),
        _gathered(chip, "hisa_refine", model, B, m, model.block_size, model.topk,
                  row_bytes=row_bytes, exposed_bytes=0.0),
    ]  # fmt: skip


def _gathered(
    chip: Chip, name: str, model: shapes.Model, B: int, m: int, block_size: int, k: int, *,
    row_bytes: int, exposed_bytes: float,
) -> Kernel:  # fmt: skip
    """`refine` of one query a sequence, which keeps m blocks, all of them full."""
    config = refine.gathered(KERNEL_CHIPS[chip.kind], B, model.H, m, block_size)
    queries = min(B, -(-B // (config.tile_t * config.n_cores)) * config.tile_t)
    width = config.padded_blocks(m, block_size) * block_size
    steps = -(-m * block_size // (config.columns * (SUBLANES // config.queries_per_eight)))
    trips = {
        "grid": -(-queries // config.tile_t),
        "score": min(queries, config.tile_t) / config.queries_per_eight * steps,
        **_topk_trips(padded_groups(width), m * block_size, k, config.tile_t),
    }
    positions = ["positions"] if config.tile_t > SUBLANES else []
    return Kernel(
        name=name,
        loops=("fill", "score", *_topk_loops(padded_groups(width), config.tile_t), *positions),
        trips=trips,
        moved_bytes=queries * (m * block_size * row_bytes + _query_bytes(model, "bf16") + 4 * k),
        exposed_bytes=exposed_bytes,
    )


def topk_kernels(chip: Chip, T: int, W: int, k: int) -> list[Kernel]:
    tiles = T / 32 / chip.cores_per_device
    trips = {"grid": tiles, **_topk_trips(padded_groups(W), W, k, 32)}
    return [Kernel(name="hisa_topk", loops=TOPK, trips=trips, moved_bytes=32 * tiles * 4 * (W + k))]


def sparse_mla_kernels(chip: Chip, model: shapes.Model, T: int) -> list[Kernel]:
    """For the tokens of `block_topk` blocks a query; the keys of a block take whole tiles of 128 lanes."""
    queries = T / chip.cores_per_device
    tokens = model.block_topk * model.block_size
    row_bytes = 2 * (-(-model.mla_dim // 128) * 128)
    heads_bytes = 2 * model.mla_heads * (model.mla_dim + model.mla_value_dim)
    return [
        Kernel(
            name="sparse_mla",
            loops=("attempts", "steps", "clear"),
            # A second pass, which clears, is for queries that a NaN beside their tokens poisons.
            trips={"grid": queries, "attempts": 1, "steps": tokens / sparse_mla.Config().tile_s, "clear": 0},
            moved_bytes=queries * (tokens * row_bytes + heads_bytes),
        )
    ]


def _query_bytes(model: shapes.Model, dtype: str) -> int:
    return model.H * (model.D * _ITEMSIZE[dtype] + 4)


def _topk_trips(groups: float, n: int, k: int, rows: int, unit: int = 1) -> dict[str, float]:
    return {
        "bounds": groups / _unroll(32, n, rows),
        "passes": passes(n, k, rows, unit),
        "count": groups / _unroll(128, n, rows),
        **_NO_TIES,
        "tiles": rows // SUBLANES,
    }


def _topk_loops(groups: int, rows: int) -> tuple[str, ...]:
    """Those of `TOPK` that are loops; what runs once is not a loop."""
    few, many = (groups > _unroll(registers, groups * 128, rows) for registers in (32, 128))
    is_loop = {"bounds": few, "count": many, "tie_count": few, "tie_drop": few, "tiles": rows > SUBLANES}
    return tuple(name for name in TOPK if is_loop.get(name, True))


def _unroll(registers: int, n: int, rows: int) -> int:
    return min(max(registers * SUBLANES // rows, SUBLANES), padded_groups(n), 128)
