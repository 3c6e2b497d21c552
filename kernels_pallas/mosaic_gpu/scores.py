"""Sort keys of the scores of a run of keys for every query: of tokens (flat indexer) or of block means (filter).
    x[t, c] = sort_key(k_scale[c] * sum_h w[t, h] * relu(q[t, h] . sum_p k[c, p]))       float32 sums

Floor, 4096 queries of dsv32 on an H200: block means of 64K (n = 512, two e4m3 parts each) 69 GFLOP / 1979 TFLOP/s =
0.035 ms; tokens of 64K 4.4 TFLOP = 2.2 ms. A warp-group keeps 128 keys in registers and streams the queries of a tile
past them (see ptx/score_loop.py), so keys are read once a query tile and queries once a span of keys. Two queries of 32
heads share the 64 columns of a product: 4096 of 64K take 2.13 ms, where a product each takes 2.43.

What limits it: sums and products share the registers' ports. A tile of 128 keys takes some 450 cycles, of which the
tensor core works 256 and each scheduler issues 235 instructions.

Block means come in parts whose sum is the mean (see `pool`): the tensor core adds the parts up in its accumulator,
which buys 8 bits of mean for e4m3 queries without converting them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_keys import PAD
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop import Smem
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import KEYS_PER_WARPGROUP, Shape
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.mosaic_gpu.scores_body import Inputs, Outputs, Plan, scores_body
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.types import Interpret


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and warp-groups: they change the speed, never the result."""

    n_score: int = 3  # warp-groups that score
    n_keys: int = 1  # spans of keys in shared memory, up to 4, waiting: the one in work is in registers
    ring: int = 8  # queries in flight, a power of two
    tile_t: int = 32  # queries a work item
    together: int = 1  # queries that share a product, which has 64 columns: of 32 heads two

    def __post_init__(self):
        if not 1 <= self.n_keys <= 4:
            raise ValueError(f"Config(n_keys={self.n_keys}): must be 1 to 4, a warp of the loader each")

    @property
    def span(self) -> int:
        """Keys a work item."""
        return KEYS_PER_WARPGROUP * self.n_score

    def columns(self, n: int) -> tuple[int, int]:
        """Spans that cover n columns, and columns of the result: wide ones are read in whole steps of a selection."""
        n = n if n <= COLUMNS else -(-n // COLUMNS) * COLUMNS
        n_spans = -(-n // self.span)
        width = n_spans * self.span
        return n_spans, width if width <= COLUMNS else -(-width // COLUMNS) * COLUMNS

    def smem_bytes(self, H: int, D: int, n_parts: int, itemsize: int) -> int:
        """Shared memory of a CTA, barriers and alignment included."""
        keys = self.n_keys * self.span * (n_parts * D * itemsize + PAD + 4)
        pins = self.n_score * KEYS_PER_WARPGROUP * 16 * 4  # at most
        return keys + self.ring * self.together * H * (D * itemsize + 8) + pins + RESERVED_BYTES

    def fits(self, H: int, D: int, n_parts: int, itemsize: int) -> bool:
        return self.smem_bytes(H, D, n_parts, itemsize) <= SMEM_BYTES


class Sizes(NamedTuple):
    """What a configuration depends on of queries [T, H, D] and keys [S, n_parts, D] of `itemsize` bytes a number.

    Attributes: n_sequences, that the queries are of.
    """

    T: int
    H: int
    D: int
    n_parts: int
    itemsize: int
    n_sequences: int

    @classmethod
    def of(cls, operands: Operands, n_sequences: int) -> "Sizes":
        T, H, D = operands.q.shape
        return cls(T, H, D, operands.k.shape[1], operands.k.dtype.itemsize, n_sequences)


def heuristic(sizes: Sizes, n_columns: int, n_ctas: int = 132, *, n_score: int = 2, n_keys: int = 1) -> Config:
    """Enough work items for every CTA, and as many queries an item as that allows.

    Args:
        n_keys: spans in shared memory, fewer if it does not suffice. Keys that are looked up row by row arrive late.
        n_score: warp-groups that score, fewer if their registers do not suffice. Three take 0.94 ms for 13,824 tokens
            where two take 1.05; over few columns their wider span wastes more.
    """
    T, H, D, n_parts, itemsize, n_sequences = sizes
    # Two in a slot take little more time than one, also if the second is missing; where most are, that is too much.
    together = 2 if H == 32 and 4 * n_sequences <= T else 1
    # 128 keys are 32 registers a thread, in two parts or in bfloat16 64, more than each of three warp-groups has beside
    # its accumulators.
    if n_parts * D * itemsize > 128 or H > 64:
        n_score = min(n_score, 2)
    config = next(
        config
        for n in range(n_keys, 0, -1)
        for ring in (8, 4, 2)
        if (config := Config(n_score=n_score, n_keys=n, ring=ring, together=together)).fits(H, D, n_parts, itemsize)
    )
    n_spans, _ = config.columns(n_columns)
    # Whole rounds of all CTAs, of at most 128 queries an item.
    rounds = max(-(-T * n_spans // (n_ctas * 128)), 1)
    tiles = max(n_ctas * rounds // n_spans, 1)
    tile_t = max(min(-(-T // tiles), 128), 1)
    return dataclasses.replace(config, tile_t=-(-tile_t // together) * together)


def for_last_queries(config: Config, sizes: Sizes, starts: list[int], max_keys: int, n_ctas: int) -> Config:
    """With so many queries an item that CTAs end together, where queries are the last ones of their sequences.

    Args:
        config: gives way only to one that takes less time.
        starts: the first column of each launch, ascending; together they are over all keys.
    """
    T, firsts, ends = -(-sizes.T // sizes.n_sequences), np.asarray(starts), np.asarray([*starts[1:], max_keys])

    def time(tile_t: int) -> int:
        """In queries that pass a span."""
        seen = np.minimum(np.arange(tile_t, T + tile_t, tile_t), T) + max(max_keys - T, 0)
        seen = np.clip(-(-seen[:, None] // COLUMNS) * COLUMNS - firsts, 0, ends - firsts)
        rounds = -(-sizes.n_sequences * np.sum(-(-seen // config.span), axis=0) // n_ctas)
        # An item's keys go into registers before its first query, which takes about as long as a query.
        return int(np.sum(rounds)) * (tile_t + 1)

    return dataclasses.replace(config, tile_t=min((config.tile_t, *range(128, 15, -2)), key=time))


@functools.partial(jax.jit, static_argnames=("config", "maxima_of", "n_ctas", "interpret"))
def scores(
    operands: Operands,
    columns: Columns,
    *,
    config: Config,
    maxima_of: int = 0,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Array | tuple[Array, Array]:
    """Keys [S, parts, D] -> [T, columns.n padded, see `Config.columns`] int32 sort keys.

    With a threshold there is a second result [T, width // 32] int32, which tells what passed: bit c % 32 of word
    c // 32 stands for column c. Of each 32 columns the sort keys that passed come first, side by side, then anything.
    With `maxima_of` = n the second is [T, width // n] int32, the greatest of n neighbouring ones.

    Args:
        operands: pages are of one row each, or of 32 and more.
        columns: `first` is a multiple of the span. Without `tiles` each query is one, of the only sequence,
            and `first` is 0.
        maxima_of: a power of two up to 32, without a threshold; 0: none.
    """
    if maxima_of and columns.threshold is not None:
        raise ValueError(f"scores: maxima_of = {maxima_of} with a threshold, which leaves most sort keys out")
    q, _, k, k_scale, pages = operands
    (T, H, D), (_, n_parts, _), itemsize = q.shape, k.shape, k.dtype.itemsize
    _, width = config.columns(columns.n)
    # Interpreted, gathered keys lie as those that are copied.
    gathers = pages is not None and pages.size == 1 and not interpret
    shape = Shape(
        H=H,
        row_bytes=D * itemsize,
        n_parts=n_parts,
        is_e4m3=k.dtype == jnp.float8_e4m3fn,
        ring=config.ring,
        has_scale=k_scale is not None,
        keep_first=columns.keep_first,
        keep_last=columns.keep_last,
        out_columns=width,
        filters=columns.threshold is not None,
        together=config.together,
        pitch=n_parts * D * itemsize + PAD if gathers else None,
        maxima_of=maxima_of,
    )
    rows_of = lambda width: jax.ShapeDtypeStruct((T, width), jnp.int32)  # noqa: E731
    out_type = Outputs(
        rows_of(width),
        rows_of(width // 32) if shape.filters else None,
        rows_of(width // maxima_of) if maxima_of else None,
    )
    sort_keys, *others = (
        x for x in launch(shape, operands, columns, out_type, config, n_ctas, interpret) if x is not None
    )
    return (sort_keys, *others) if others else sort_keys


def launch(
    shape: Shape,
    operands: Operands,
    columns: Columns,
    out_type: Outputs,
    config: Config,
    n_ctas: int,
    interpret: Interpret,
) -> Outputs:
    """The kernel, also for operands whose rows of q are groups of queries (`scan.py`)."""
    q, w, k, k_scale, pages = operands
    assert columns.tiles is not None or (shape.rows is None and config.tile_t == 1)
    n_spans, _ = config.columns(columns.n)
    n_items = (len(q) if columns.tiles is None else len(columns.tiles)) * n_spans
    plan = Plan(
        D=k.shape[-1],
        dtype=k.dtype,
        pages=None if pages is None else (pages.size, pages.n_pages),
        n_spans=n_spans,
        n_ctas=min(n_ctas, n_items),
        interpret=interpret,
        loop=shape,
        n_score=config.n_score,
        n_keys=config.n_keys,
    )
    table = None if pages is None else pages.table
    first = None if columns.tiles is None else columns.first
    limit, threshold = (None, None) if shape.rows else (columns.limit, columns.threshold)
    return plgpu.kernel(
        functools.partial(scores_body, plan),
        out_type=[out_type],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_score + 1,
        thread_name="warpgroup",
        scratch_types=[_smem(plan)],
        kernel_name="hisa_scores" if shape.rows is None else "hisa_scan",
        interpret=interpret,
    )(Inputs(columns.tiles, limit, first, q, w, table, k, k_scale, threshold))[0]


def _smem(plan: Plan) -> Smem:
    barrier, n_tiles, loop = plgpu.Barrier, plan.n_keys * plan.n_score, plan.loop
    return Smem(
        pin=plgpu.SMEM((plan.n_score, KEYS_PER_WARPGROUP, loop.pin_words), jnp.float32),
        k_free=barrier(num_arrivals=plan.n_score, num_barriers=plan.n_keys),
        k_full=barrier(num_arrivals=plan.n_copies, num_barriers=plan.n_keys),
        k=plgpu.SMEM((n_tiles, loop.n_parts, KEYS_PER_WARPGROUP, plan.D), plan.dtype, transforms=plan.tile_transforms)
        if loop.pitch is None
        else plgpu.SMEM((n_tiles, KEYS_PER_WARPGROUP, loop.pitch // plan.dtype.itemsize), plan.dtype),
        q_free=barrier(num_arrivals=plan.n_score, num_barriers=loop.ring),
        q_full=barrier(num_arrivals=2 * loop.together, num_barriers=loop.ring),
        q=plgpu.SMEM((loop.ring, loop.columns, plan.D), plan.dtype, transforms=plan.tile_transforms),
        scale=plgpu.SMEM((n_tiles, KEYS_PER_WARPGROUP), jnp.float32) if loop.has_scale else None,
        w=plgpu.SMEM((loop.ring, loop.w_words), jnp.float32),
    )
