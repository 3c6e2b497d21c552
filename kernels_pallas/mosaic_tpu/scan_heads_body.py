"""Device code of `scan_heads`: the lanes of a register are 64 queries with two heads each, its sublanes eight samples.

    q --> heads_vmem --> pairs of heads of 64 queries --+--> products with 256 keys --> products_vmem
                                                        +--> products with themselves --> squares_vmem
    weighted sums over heads --> scores_vmem --> sort_keys_vmem --> the 32 best, in `least_vmem`
    products above `least_vmem` --> n_open_vmem --> slopes
    weights, squares --> exact heads       weights, slopes --> coefficients       both turned: table_vmem
    eight queries' coefficients on a diagonal x q --> virtual; ones in their place --> exact

A row of 32 bits in VMEM holds two heads of a query, so that a load with a stride brings a pair of heads of eight
queries. Rows that are a multiple of eight apart would take a load each, hence the gaps in `heads_vmem`: 8 pairs take
556 cycles without them on v6e, and their products with themselves 437, 510 in all with them. As queries are lanes, a
sum over samples or heads is additions of registers. The best samples of 128 queries are searched for at once: even
lanes are those of the first 64 queries, odd ones those of the others.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.bits import is_any
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import copy_pairs, strided_pairs
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import column
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref
from hisa_jax.xla.scan import N_BEST, N_SAMPLES

AT_A_TIME = 8  # pairs of heads a turn
GAP = 4  # rows of 32 bits after the heads of each query
_PARTS = 3  # bfloat16 numbers that a float32 is the sum of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch.

    Attributes:
        tiles: of queries, of a sequence.
        n_halves: of a tile; half: queries that share a register.
        n_pairs: of heads.
        n_exact: heads beside the virtual one; is_sampled: whether slopes are, else they are 1.
    """

    tiles: int
    n_halves: int
    half: int
    n_pairs: int
    n_exact: int
    is_sampled: bool
    interpret: Interpret


class Refs(NamedTuple):
    """The buffers; those of [2, ...] have one half if a tile has."""

    of_rows_smem: Ref  # [rows], which sequence's keys each row of queries has
    first_smem: Ref  # [tiles of the grid], logarithm of the least step between samples that a query has
    last_smem: Ref  # the same of the greatest
    # Windows of the grid, of one tile of queries.
    q: Ref  # [1, tile_t * H, D]
    w: Ref  # [2, pairs, LANES]; in these lanes a query has its even heads, then its odd ones
    steps: Ref  # [2, 1, LANES], logarithms of the queries' steps
    n_samples: Ref  # [2, 1, LANES], how many they have
    keys: Ref  # [n_steps, 256, D], of a sequence
    virtual: Ref  # out: [tile_t, D]
    heads_vmem: Ref  # scratch: [1, tile_t * (H + 8), D], q with a gap after each query's heads
    # Scratch, LANES wide.
    products_vmem: Ref  # [2, pairs * 256], relu(q . k)
    scores_vmem: Ref  # [2, 256], of a query the sum of two neighbours
    least_vmem: Ref  # [2, 256], what products must be above to count: 0 for the best samples
    sort_keys_vmem: Ref  # [256]
    squares_vmem: Ref  # [2, pairs], |q|^2
    n_open_vmem: Ref  # [2, pairs], at how many of the best samples heads are open
    table_vmem: Ref  # [2 * LANES, pairs + n_exact padded], coefficients of pairs of heads, then which are exact
    exact: Ref = None  # out: [n_exact, tile_t, D]
    w_exact: Ref = None  # out: [2, n_exact, LANES]
    scales: Ref = None  # [n_steps, 256, 1], of the keys


def scan_heads_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (sequences, tiles): a tile of queries."""
    t, n_eights = pl.program_id(0) * plan.tiles + pl.program_id(1), plan.n_halves * plan.half // SUBLANES
    lax.fori_loop(0, n_eights, lambda eight, _: spread_heads(plan, eight, refs), None)
    refs.squares_vmem[...] = jnp.zeros_like(refs.squares_vmem)
    if plan.is_sampled:
        refs.n_open_vmem[...] = jnp.zeros_like(refs.n_open_vmem)
        lax.fori_loop(refs.first_smem[t], refs.last_smem[t] + 1, lambda step, _: sample(plan, step, refs), None)
    else:
        by_pairs(plan, lambda half, i: multiply(plan, half, i, None, refs))

    def chosen(half: Array, is_finite: Array) -> Array:
        return is_finite & choose(plan, half, refs)

    is_finite = lax.fori_loop(0, plan.n_halves, chosen, jnp.bool_(True))

    @pl.when(is_finite)
    def _eights():
        lax.fori_loop(0, n_eights, lambda eight, _: combine(plan, eight, refs), None)

    # Else 0 times infinity would reach the neighbours.
    @pl.when(jnp.logical_not(is_finite))
    def _one_by_one():
        lax.fori_loop(0, n_eights * SUBLANES, lambda query, _: combine_one(plan, query, refs), None)


def spread_heads(plan: Plan, eight: Array, refs: Refs) -> None:
    """Copies the heads of eight queries to `heads_vmem`."""
    n_pairs = plan.n_pairs
    source, size = SUBLANES * n_pairs, SUBLANES * (n_pairs + GAP)
    from_ref = refs.q.at[0, pl.ds(pl.multiple_of(2 * source * eight, 2 * source), 2 * source)]
    to_ref = refs.heads_vmem.at[0, pl.ds(pl.multiple_of(2 * size * eight, 2 * size), 2 * size)]
    for query in range(SUBLANES):
        for row in range(0, n_pairs, SUBLANES):
            copy_pairs(from_ref, query * n_pairs + row, to_ref, query * (n_pairs + GAP) + row, plan.interpret)


def by_pairs(plan: Plan, some: Callable[[Array, Array], None]) -> None:
    """Calls some(half, i) for all groups of `AT_A_TIME` pairs of heads."""

    def of_half(half: Array, _: None) -> None:
        lax.fori_loop(0, plan.n_pairs // AT_A_TIME, lambda i, _: some(half, i), None)

    lax.fori_loop(0, plan.n_halves, of_half, None)


def heads_of(plan: Plan, half: Array, i: Array, j: int, refs: Refs) -> Array:
    """[LANES, D] bfloat16: heads number 16 i + 2 j and the next of each query, zeros after the last query."""
    stride = plan.n_pairs + GAP
    first, size = half * plan.half * stride + i * AT_A_TIME, (plan.half - 1) * stride + AT_A_TIME
    rows = strided_pairs(refs.heads_vmem, first, size, (j,), stride, plan.interpret, AT_A_TIME)
    missing = LANES - rows.shape[0]
    return jnp.concatenate([rows, jnp.zeros((missing, rows.shape[1]), rows.dtype)]) if missing else rows


def multiply(plan: Plan, half: Array, i: Array, keys: Ref, refs: Refs) -> None:
    """Some pairs of heads with all samples, if there are any, and with themselves."""
    total = None if keys is None else refs.scores_vmem[half]
    squares = jnp.zeros((SUBLANES, LANES), jnp.float32)
    for j in range(AT_A_TIME):
        q, pair = heads_of(plan, half, i, j, refs), i * AT_A_TIME + j
        # One product: the heads stay in the matrix unit while the keys' rows pass, then their own.
        rows = q if keys is None else jnp.concatenate([keys[...], q], axis=0)
        x = lax.dot_general(rows, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        squares = jnp.where(sublanes() == j, diagonal(x[-LANES:]), squares)
        if keys is not None:
            x = jnp.maximum(x[:N_SAMPLES], 0.0)
            refs.products_vmem[half, pl.ds(pl.multiple_of(pair * N_SAMPLES, N_SAMPLES), N_SAMPLES)] = x
            total = total + refs.w[half, pl.ds(pair, 1)] * x
    refs.squares_vmem[half, pl.ds(pl.multiple_of(i * AT_A_TIME, AT_A_TIME), AT_A_TIME)] = squares
    if keys is not None:
        refs.scores_vmem[half] = total


def diagonal(x: Array) -> Array:
    """[LANES, LANES] -> [1, LANES]."""
    found = x[:SUBLANES]
    for first in range(SUBLANES, LANES, SUBLANES):
        found = jnp.where(lanes() >= first, x[first : first + SUBLANES], found)
    return jnp.sum(jnp.where(lanes() % SUBLANES == sublanes(), found, 0.0), axis=0, keepdims=True)


def lanes() -> Array:
    return lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)


def sublanes() -> Array:
    return lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)


def sample(plan: Plan, step: Array, refs: Refs) -> None:
    """Counts open heads at the best samples of the queries that have this step."""
    refs.scores_vmem[...] = jnp.zeros_like(refs.scores_vmem)
    by_pairs(plan, lambda half, i: multiply(plan, half, i, refs.keys.at[step], refs))
    n_samples = [jnp.where(refs.steps[half] == step, refs.n_samples[half], 0) for half in range(plan.n_halves)]
    write_sort_keys(n_samples, None if refs.scales is None else refs.scales.at[step], refs)
    write_least(refs)
    by_pairs(plan, lambda half, i: count_open(half, i, refs))


def write_sort_keys(n_samples: list[Array], scales: Ref, refs: Refs) -> None:
    """Sort keys of the first `n_samples`, [1, LANES] of each half."""
    scores = [x + swapped(x) for x in (refs.scores_vmem[half] for half in range(len(n_samples)))]
    score = of_both(*scores)
    if scales is not None:
        score = score * jnp.broadcast_to(scales[...], score.shape)
    i = lax.broadcasted_iota(jnp.int32, score.shape, 0)
    refs.sort_keys_vmem[...] = jnp.where(i < of_both(*n_samples), sort_key_of(score), INVISIBLE)


def write_least(refs: Refs) -> None:
    """Finds the best samples of each query, of equal ones the first."""

    def narrow(i: Array, kth: Array) -> Array:
        # Bit by bit, from the least number on: `kth` grows as long as enough reach it.
        guess = kth + (jnp.int32(1) << (31 - i))
        return jnp.where(how_many(operator.ge, refs.sort_keys_vmem[...], guess) >= N_BEST, guess, kth)

    kth = lax.fori_loop(0, 32, narrow, jnp.full((1, LANES), INVISIBLE, jnp.int32))
    x = refs.sort_keys_vmem[...]
    room = N_BEST - how_many(operator.gt, x, kth)
    tied = jnp.where((x == kth) & (kth > INVISIBLE), 1.0, 0.0)
    row, other = (lax.broadcasted_iota(jnp.int32, (N_SAMPLES, N_SAMPLES), axis) for axis in range(2))
    earlier = jnp.where(other < row, 1.0, 0.0).astype(jnp.bfloat16)
    tied_before = jnp.dot(earlier, tied.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    is_best = (x > kth) | ((tied > 0.0) & (tied_before < room))
    least = jnp.where(is_best, 0.0, jnp.inf)
    others = swapped(least)
    for half in range(refs.least_vmem.shape[0]):
        refs.least_vmem[half] = of_both(least, others) if half == 0 else of_both(others, least)


def swapped(x: Array) -> Array:
    """[n, LANES], each lane's neighbour of the pair."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) ^ 1
    return jnp.take_along_axis(x, lane, axis=1, mode="promise_in_bounds")


def of_both(*halves: Array) -> Array:
    """Of the first half the even lanes, of the second, if there is one, the odd ones."""
    is_even = (lax.broadcasted_iota(jnp.int32, halves[0].shape, 1) & 1) == 0
    return halves[0] if len(halves) == 1 else jnp.where(is_even, halves[0], halves[1])


def how_many(is_counted: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Of [256, LANES] how many samples compare so with y, of as many or of one row: [1, LANES] float32."""
    counts = []
    for first in range(0, N_SAMPLES, SUBLANES):
        some = slice(first, first + SUBLANES)
        counts.append(jnp.where(is_counted(x[some], y if y.shape[0] == 1 else y[some]), 1.0, 0.0))
    while len(counts) > 1:  # one after the other each addition would wait for the one before
        counts = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    return jnp.sum(counts[0], axis=0, keepdims=True)


def count_open(half: Array, i: Array, refs: Refs) -> None:
    """Adds to `n_open_vmem` at how many of the best samples some pairs of heads are open."""
    out, least = jnp.zeros((SUBLANES, LANES), jnp.float32), refs.least_vmem[half]
    for j in range(AT_A_TIME):
        rows = pl.ds(pl.multiple_of((i * AT_A_TIME + j) * N_SAMPLES, N_SAMPLES), N_SAMPLES)
        n = how_many(operator.gt, refs.products_vmem[half, rows], least)
        out = jnp.where(sublanes() == j, n, out)
    pairs = pl.ds(pl.multiple_of(i * AT_A_TIME, AT_A_TIME), AT_A_TIME)
    refs.n_open_vmem[half, pairs] = refs.n_open_vmem[half, pairs] + out


def choose(plan: Plan, half: Array, refs: Refs) -> Array:
    """The exact heads of a half and the coefficients of the others, to `table_vmem`; whether all sizes are finite."""
    w, n_pairs = refs.w[half], plan.n_pairs
    pair = lax.broadcasted_iota(jnp.int32, w.shape, 0)
    heads = 2 * pair + (lax.broadcasted_iota(jnp.int32, w.shape, 1) & 1)
    sizes = jnp.abs(w) * jnp.sqrt(refs.squares_vmem[half])
    slopes = jnp.ones_like(w)
    if plan.is_sampled:
        slopes = refs.n_open_vmem[half] / jnp.clip(refs.n_samples[half], 1, N_BEST).astype(jnp.float32)

    def of_query(reduce: Callable[..., Array], both: Callable[[Array, Array], Array], x: Array) -> Array:
        x = jnp.broadcast_to(reduce(x, axis=0, keepdims=True), (SUBLANES, LANES))
        return both(x, swapped(x))[:1]

    def lowest(mask: Array) -> Array:
        return of_query(jnp.min, jnp.minimum, jnp.where(mask, heads, 2 * n_pairs))

    sort_keys, is_exact = sort_key_of(sizes), jnp.zeros(w.shape, jnp.bool_)
    for _ in range(plan.n_exact):
        greatest = of_query(jnp.max, jnp.maximum, sort_keys)
        is_found = heads == lowest(sort_keys == greatest)
        sort_keys, is_exact = jnp.where(is_found, INVISIBLE, sort_keys), is_exact | is_found
    columns = [jnp.where(is_exact, 0.0, w * slopes)]
    for i in range(plan.n_exact):
        head = lowest(is_exact)
        is_found = heads == head
        is_exact = is_exact & jnp.logical_not(is_found)
        refs.w_exact[half, i : i + 1] = of_query(jnp.sum, jnp.add, jnp.where(is_found, w, 0.0))
        columns.append(head.astype(jnp.float32))
    width = refs.table_vmem.shape[1]
    columns.append(jnp.zeros((width - n_pairs - plan.n_exact, LANES), jnp.float32))
    table = jnp.concatenate(columns, axis=0)
    for first in range(0, width, LANES):
        rows = pl.ds(pl.multiple_of(half * LANES, LANES), LANES)
        refs.table_vmem[rows, first : first + LANES] = table[first : first + LANES].T
    return jnp.logical_not(is_any(jnp.logical_not(sizes < jnp.inf)))


def coefficients(plan: Plan, first: Array, n: int, refs: Refs) -> tuple[Array, list[Array]]:
    """Of n queries, eight or one in all rows: [8, LANES] coefficients of heads 0, 1, ... and numbers of exact heads."""
    n_pairs, half = plan.n_pairs, lax.div(first, plan.half)
    row = half * LANES + 2 * (first - half * plan.half)
    shape = (SUBLANES, LANES)
    even, odd = (refs.table_vmem[pl.ds(row + i, n, stride=2)] for i in range(2))
    even, odd = (jnp.broadcast_to(x, (SUBLANES, x.shape[1])) for x in (even, odd))
    head = lax.broadcasted_iota(jnp.int32, shape, 1) % (2 * n_pairs)
    found = [jnp.take_along_axis(x[:, :LANES], head >> 1, axis=1, mode="promise_in_bounds") for x in (even, odd)]
    exact = [
        jnp.broadcast_to(even[:, n_pairs + i : n_pairs + i + 1], shape).astype(jnp.int32) for i in range(plan.n_exact)
    ]
    return jnp.where((head & 1) == 0, found[0], found[1]), exact


def combine(plan: Plan, eight: Array, refs: Refs) -> None:
    """The virtual and the exact heads of eight queries side by side, by one product with all their heads."""
    n_heads = 2 * plan.n_pairs
    first = pl.multiple_of(eight * SUBLANES, SUBLANES)
    left, exact = coefficients(plan, first, SUBLANES, refs)
    rows = []
    for _ in range(_PARTS):
        rows.append(left.astype(jnp.bfloat16).astype(jnp.float32))
        left = left - rows[-1]
    rows += [jnp.where(lanes() % n_heads == head, 1.0, 0.0) for head in exact]

    def on_diagonal(x: Array) -> Array:
        owners = [lax.div(at + lanes(), n_heads) for at in range(0, SUBLANES * n_heads, LANES)]
        return jnp.concatenate([jnp.where(owner == sublanes(), x, 0.0) for owner in owners], axis=1)

    matrix = jnp.concatenate([on_diagonal(x) for x in rows], axis=0).astype(jnp.bfloat16)
    q = refs.q[0, pl.ds(pl.multiple_of(first * n_heads, SUBLANES * n_heads), SUBLANES * n_heads)]
    found = jnp.dot(matrix, q, preferred_element_type=jnp.float32).reshape(-1, SUBLANES, q.shape[1])
    refs.virtual[pl.ds(first, SUBLANES)] = (found[2] + found[1]) + found[0]
    for i in range(plan.n_exact):
        refs.exact[i, pl.ds(first, SUBLANES)] = found[_PARTS + i]


def combine_one(plan: Plan, query: Array, refs: Refs) -> None:
    """The same of one query, whatever its heads and weights are."""
    n_heads, D = 2 * plan.n_pairs, refs.q.shape[2]
    coefficient, exact = coefficients(plan, query, 1, refs)
    q = refs.q[0, pl.ds(pl.multiple_of(query * n_heads, n_heads), n_heads)].astype(jnp.float32)
    along = lambda row: column(row[:1, :n_heads], LANES)[:, :D]  # noqa: E731
    coefficient, head = along(coefficient), lax.broadcasted_iota(jnp.int32, q.shape, 0)
    # Neither weight nor query of an exact head: 0 times infinity is NaN.
    is_exact = jnp.zeros(q.shape, jnp.bool_)
    for i in range(plan.n_exact):
        is_found = head == along(exact[i])
        is_exact = is_exact | is_found
        refs.exact[i, pl.ds(query, 1)] = jnp.sum(jnp.where(is_found, q, 0.0), axis=0, keepdims=True)
    terms = jnp.where(is_exact, 0.0, coefficient * q)
    refs.virtual[pl.ds(query, 1)] = jnp.sum(terms, axis=0, keepdims=True)
