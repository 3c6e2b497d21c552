"""The flat indexer: every token of the sequence is scored, with a streaming top-k, or for few queries all at once.

Of many queries no [T, S] matrix is ever in memory. Tokens come in tiles. The best of the first tile are selected by
`topk`. Later tiles are filtered where they are scored, by the k-th best so far, and `merge` takes what passes. Both say
what the k-th best is, so between kernels nothing is left to do.

A few queries would wait for ten tiles, one after the other. They have all their sort keys written, and the greatest of
each group of neighbours. By these `topk_few` takes the best of a row, of which it reads little.

Floor, 1, 32 and 128 queries over 128K in e4m3 each on an H200: 17, 553 and 2214 MB / 4.3 TB/s = 4, 129 and 515 us;
docs/decoding.md has what was measured.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_gpu import merge as merge_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk as topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk_few as few_topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret

ONE_TILE = 16384  # up to this many tokens are selected from in one piece
_UNIT = math.lcm(384, COLUMNS)  # whole spans of three warp-groups, and whole steps of a selection
_WIDEST = topk_stage.MAX_WIDTH // _UNIT * _UNIT  # piece whose scores, in whole units, can be selected from
FIRST = 13824  # tokens of the first tile: the most of which a CTA selects from four rows at a time
STEP = 19968  # of later ones: bounds the memory to T * STEP sort keys
_ALL_AT_ONCE = 8  # later tiles of keys in one piece: of more, as many are scored as queries see
WIDTH = few_topk_stage.MAX_WIDTH  # columns of a row of few queries that a CTA selects from
MOST_BYTES = 1 << 29  # of the sort keys of few queries
_MANY = 8 * 384  # tokens a CTA


Found = tuple[Array, Array, Array | None]  # positions, ascending, then -1, [T, topk]; count, [T]; maybe sort keys


def flat(
    operands: Operands, visible: Array, sequences: Sequences, *, topk: int, n_ctas: int, interpret: Interpret = False
) -> tuple[Array, Array]:
    """Keys [S, D], visible [T] -> [T, topk] positions in the sequence, ascending, then -1; [T] count."""
    positions, count, _ = _flat(operands, visible, sequences, topk, False, n_ctas, interpret)
    return positions, count


def flat_with_sort_keys(
    operands: Operands, visible: Array, sequences: Sequences, *, topk: int, n_ctas: int, interpret: Interpret = False
) -> tuple[Array, Array, Array]:
    """`flat` and the [T, topk] sort keys of what it chose, `INVISIBLE` where nothing is chosen."""
    positions, count, sort_keys = _flat(operands, visible, sequences, topk, True, n_ctas, interpret)
    assert sort_keys is not None
    return positions, count, sort_keys


def _flat(
    operands: Operands,
    visible: Array,
    sequences: Sequences,
    topk: int,
    has_sort_keys: bool,
    n_ctas: int,
    interpret: Interpret,
) -> Found:
    T = operands.q.shape[0]
    launch: Any = {"n_ctas": n_ctas, "interpret": interpret}
    operands = operands._replace(k=operands.k[:, None])
    is_in_one_piece = sequences.max_keys <= min(max(ONE_TILE, 2 * topk), _WIDEST) and 2 * topk <= topk_stage.MAX_WIDTH
    if not is_in_one_piece and is_for_few(T, sequences.max_keys, topk, n_ctas):
        return _of_few(operands, visible, sequences, topk, has_sort_keys, launch)

    sizes = scores_stage.Sizes.of(operands, len(sequences.lengths))
    config = scores_stage.heuristic(sizes, min(STEP, sequences.max_keys), n_ctas, n_score=3)
    # Whole spans, and whole steps of a selection: a tile's result must not reach into the next tile.
    unit = math.lcm(config.span, COLUMNS)
    n_first, step = (-(-n // unit) * unit for n in (FIRST, STEP))
    starts = [0, *range(n_first, sequences.max_keys, step)]
    config = scores_stage.for_last_queries(
        config, sizes, starts[: 1 if is_in_one_piece else None], sequences.max_keys, n_ctas
    )
    if not is_in_one_piece:
        # Out of device memory a tile's limits come one after the other, in 15 us; out of L2 in 3.
        visible = jnp.maximum(visible, 0)
    tiles = sequences.query_tiles(T, config.tile_t, visible, COLUMNS)

    def sort_keys(start: Array, n: int, threshold: Array | None = None) -> Any:
        columns = Columns(limit=visible, tiles=tiles, first=start, n=n, threshold=threshold)
        return scores_stage.scores(operands, columns, config=config, **launch)

    if is_in_one_piece:
        # Whole steps of a selection, also where a span is less.
        x = sort_keys(jnp.zeros((1,), jnp.int32), -(-sequences.max_keys // COLUMNS) * COLUMNS)
        return _best(x, visible, topk, has_sort_keys, launch)

    n_best = -(-topk // COLUMNS) * COLUMNS
    x = sort_keys(jnp.zeros((1,), jnp.int32), n_first)
    positions, count, keys, least = topk_stage.topk_with_sort_keys(x, visible, n_best, **launch)
    best = merge_stage.Best(keys, positions, count, least)

    def one_tile(i: int | Array, best: merge_stage.Best) -> merge_stage.Best:
        start = jnp.full((1,), n_first + i * step, jnp.int32)
        # What does not beat the least of the best so far is not even written.
        tile = sort_keys(start, step, best.least)
        return merge_stage.merge(best, tile, start, visible, **launch)

    # An even number of tiles a turn: after an odd number of merges the best would have to be copied to where the next
    # turn expects them. As many turns as the query that sees most needs, which only the run knows, and for which the
    # host waits, 50 us a turn. A tile that nobody sees adds nothing, but no tile begins beyond the last key. Pages have
    # room for more than is there; keys in one piece are what is there, so of few tiles none is asked for.
    n_later, is_paged = len(starts) - 1, operands.pages is not None
    per_turn = 2 if is_paged else 4
    n_first_ones = n_later if n_later <= _ALL_AT_ONCE and not is_paged else n_later % per_turn
    for i in range(n_first_ones):
        best = one_tile(i, best)
    if n_later > n_first_ones:

        def a_turn(turn: Array, best: merge_stage.Best) -> merge_stage.Best:
            for i in range(per_turn):
                best = one_tile(n_first_ones + per_turn * turn + i, best)
            return best

        left = jnp.max(visible) - n_first - n_first_ones * step
        best = lax.fori_loop(0, (left + per_turn * step - 1) // (per_turn * step), a_turn, best)
    if n_best == topk:
        return best.positions, best.n, best.sort_keys if has_sort_keys else None
    # Rows are whole steps of the selection: the topk of those n_best.
    columns, count, best_keys = _best(best.sort_keys, best.n, topk, has_sort_keys, launch)
    positions = jnp.take_along_axis(best.positions, jnp.maximum(columns, 0), axis=1)
    return jnp.where(columns >= 0, positions, -1), count, best_keys


def is_for_few(T: int, max_keys: int, topk: int, n_ctas: int) -> bool:
    """Whether queries are so few that all their sort keys are written, and a CTA selects from a row.

    It loads four columns at a time: an odd topk of which only groups of two fit goes by tiles.
    """
    has_groups = 4 * topk <= WIDTH or (2 * topk <= WIDTH and topk % 2 == 0)
    return n_ctas >= T and has_groups and 4 * T * _whole(max_keys) <= MOST_BYTES


def _whole(n: int) -> int:
    return -(-n // COLUMNS) * COLUMNS


def _of_few(
    operands: Operands,
    visible: Array,
    sequences: Sequences,
    topk: int,
    has_sort_keys: bool,
    launch: dict[str, Any],
) -> Found:
    """`flat` by all sort keys, and the greatest of each group of neighbours."""
    T, n, interpret = operands.q.shape[0], _whole(sequences.max_keys), launch["interpret"]
    # Several spans are on their way: a span is soon scored for one query. Three warp-groups keep up with memory, but of
    # few spans a CTA the wider ones come out uneven.
    sizes = scores_stage.Sizes.of(operands, len(sequences.lengths))
    n_score = 3 if T * n >= _MANY * launch["n_ctas"] else 2
    config = scores_stage.heuristic(sizes, n, launch["n_ctas"], n_score=n_score, n_keys=4)
    # No more queries a tile than a sequence has on average: a tile is of one sequence.
    config = dataclasses.replace(config, tile_t=min(config.tile_t, -(-T // sizes.n_sequences)))
    # The kernel knows what one query sees without a kernel of XLA before it.
    tiles = None if T == 1 and sequences.is_one else sequences.query_tiles(T, config.tile_t, visible, COLUMNS)
    # As many neighbours a group as leave room for the best groups; all that a thread of the selection has at most.
    size = next(size for size in (8, 4, 2) if size * topk <= WIDTH)
    columns = Columns(limit=visible, tiles=tiles, n=n)
    x, maxima = scores_stage.scores(operands, columns, config=config, maxima_of=size, **launch)
    levels, n = [x, maxima], n // size
    while n > WIDTH:
        levels.append(_greatest(levels[-1][:, :n], visible, size ** (len(levels) - 1), size))
        n = levels[-1].shape[1]

    def options(level: int) -> dict[str, Any]:
        common: Any = dict(size=size, limit=visible, per_column=size**level, interpret=interpret)
        return common | {"has_sort_keys": has_sort_keys and level == 0}

    highest = len(levels) - 2
    found = few_topk_stage.topk_by_maxima(*levels[highest:], topk, width=n, **options(highest))
    for level in reversed(range(highest)):
        found = few_topk_stage.topk_of_groups(levels[level], found[0], topk, **options(level))
    return found


def _greatest(x: Array, visible: Array, per_column: int, size: int) -> Array:
    """[T, W] -> [T, W / size, padded], the greatest of neighbours; columns beyond what is visible hold anything."""
    column = jnp.arange(x.shape[1], dtype=jnp.int32) * per_column
    x = jnp.where(column < visible[:, None], x, INVISIBLE)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (4 * size))), constant_values=INVISIBLE)
    return jnp.max(x.reshape(len(x), -1, size), axis=2)


def _best(x: Array, limit: Array, k: int, has_sort_keys: bool, launch: dict[str, Any]) -> Found:
    """Of rows of sort keys; a row that is chosen whole costs no search where its sort keys are not wanted."""
    if has_sort_keys:
        return topk_stage.topk_with_sort_keys(x, limit, k, **launch)[:3]
    if launch["n_ctas"] >= len(x) and x.shape[1] <= few_topk_stage.MAX_WIDTH:
        return *few_topk_stage.topk(x, limit, k, has_forced=False, interpret=launch["interpret"]), None
    return *topk_stage.topk(x, limit, k, **launch), None
