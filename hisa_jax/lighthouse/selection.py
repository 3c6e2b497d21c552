"""Which entries of the pyramid are present, and where each of them is in the sub-sequence.

Top-down, in every tile by itself. With two levels, tile 4 and a pool of 2, eight windows at the top:

    level 1   .  a  .  b  a  .  b  .      2 picked by a, the queries' scores, then 2 by b, the keys'
    level 0     01    67 89    cd         present: the windows below the picked ones, and the whole top

An entry's window ends at position e; present entries are in the order of e, then of the level. Where an entry goes is
how many present ones are before it. Level by level that is a count over whole windows, so nothing is sorted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.lighthouse.method import Lighthouse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LighthouseSelection:
    """The entries of a pyramid that are present, for each sequence and key head.

    The P windows of a pyramid over T tokens are numbered from the T tokens up: those of level l, T / pool**l of them,
    come after all of the levels below. An entry of level l is number i of these and ends at (i + 1) * pool**l - 1.

    Attributes:
        entries: [B, S, G] int32, the number of the window in each place of the sub-sequence, -1 in places at the end
            that nothing takes: with prefix="keep", as many as kept tokens that are present anyway.
        slots: [B, P, G] int32, the place of each window, -1 if it is not present.
    """

    entries: Array
    slots: Array


@functools.partial(jax.jit, static_argnames="method")
def select(a: Array, b: Array, method: Lighthouse) -> LighthouseSelection:
    """The selection by scores of queries and of keys, [B, T, G] float32 each."""
    return placed(picks(a, b, method.n_tiles, method), a.shape, method)


def picks(a: Array, b: Array, n_tiles: int, method: Lighthouse) -> tuple[Array, ...]:
    """The picked entries of each selecting level, the lowest first.

    Args:
        a, b: [B, T, G] float32, no NaN, of n_tiles tiles.

    Returns: arrays [B, G, n_tiles, tile] int32 for levels 1 and up: numbers in their tile and level, ascending.
    """
    B, T, G = a.shape
    tiles = [x.swapaxes(1, 2).reshape(B, G, n_tiles, T // n_tiles) for x in (a, b)]
    found: list[Array] = []
    candidates = None
    for level in range(method.levels - 1, 0, -1):
        width = method.pool**level
        streams = [jnp.max(x.reshape(*x.shape[:-1], -1, width), axis=-1) for x in tiles]
        if candidates is not None:
            streams = [jnp.take_along_axis(x, candidates, axis=-1) for x in streams]
        by_a = _best(streams[0], method.tile // 2)
        # Norms are not negative and NaN is -1, so -inf is below every candidate.
        is_picked = by_a | _best(jnp.where(by_a, -jnp.inf, streams[1]), method.tile // 2)
        numbers = _columns(is_picked, method.tile)
        if candidates is not None:
            numbers = jnp.take_along_axis(candidates, numbers, axis=-1)
        found.insert(0, numbers)
        candidates = _below(numbers, method.pool)
    return tuple(found)


def _below(numbers: Array, pool: int) -> Array:
    """[..., n] -> [..., n * pool]: windows of the level below."""
    each = jnp.repeat(numbers * pool, pool, axis=-1)
    return each + _iota(each.shape, -1) % pool


def _best(scores: Array, k: int) -> Array:
    """[..., n] -> [..., n] bool: the k largest of each row, of equal ones those in front.

    By rank: n * n comparisons in one pass, no loop and no sort. Rows are short: 512 at the paper's numbers.
    """
    own, other = scores[..., :, None], scores[..., None, :]
    at = (*scores.shape, scores.shape[-1])
    is_before = (other > own) | ((other == own) & (_iota(at, -1) < _iota(at, -2)))
    return jnp.sum(is_before, axis=-1, dtype=jnp.int32) < k


def _columns(mask: Array, k: int) -> Array:
    """[..., n] bool with k set in each row -> [..., k] int32: which, ascending."""
    nth = jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32), 0)
    shape = (*mask.shape[:-1], k, mask.shape[-1])
    is_here = nth[..., None, :] == _iota(shape, -2) + 1
    return jnp.sum(jnp.where(is_here, _iota(shape, -1), 0), axis=-1, dtype=jnp.int32)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis % len(shape))


def placed(picked: tuple[Array, ...], shape: tuple[int, ...], method: Lighthouse) -> LighthouseSelection:
    """The selection for [B, T, G] from the picks of all tiles."""
    B, T, G = shape
    L, pool, n_tiles = method.levels, method.pool, method.n_tiles
    pyramid = method.pyramid(T)
    in_tile = [size // n_tiles for size in pyramid.sizes]
    is_picked = [
        jnp.any(numbers[..., None] == _iota((*numbers.shape, n), -1), axis=-2)
        for n, numbers in zip(in_tile[1:], picked, strict=True)
    ]
    presence = [jnp.repeat(mask, pool, axis=-1) for mask in is_picked] + [jnp.ones((B, G, n_tiles, in_tile[-1]), bool)]
    # Of each level, how many present entries are before each of its windows, and before the tile's end.
    before = [jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - mask.astype(jnp.int32) for mask in presence[:-1]]
    before.append(_iota(presence[-1].shape, -1))
    totals = [*(method.tile * pool for _ in picked), in_tile[-1]]

    def place(level: int) -> Array:
        first = _iota(before[level].shape, 2) * sum(totals)
        ahead = [_before(before[other], totals[other], level, other, pool) for other in range(L)]
        return functools.reduce(jnp.add, ahead, first).reshape(B, G, -1)

    slots = [place(level) for level in range(L)]
    is_present = [mask.reshape(B, G, -1) for mask in presence]
    added = None
    if method.n_kept:
        is_kept = _iota((B, G, T), -1) < method.n_kept
        added = (is_kept & ~is_present[0])[..., : method.widest]
        slots = [level + _added_before(added, number, pool, level.shape[-1]) for number, level in enumerate(slots)]
        is_present[0] = is_present[0] | is_kept
    slots = [jnp.where(mask, level, -1) for mask, level in zip(is_present, slots, strict=True)]
    every = jnp.concatenate(slots, axis=-1)
    entries = _inverse(every, picked, added, T, method)
    return LighthouseSelection(entries=entries.swapaxes(1, 2), slots=every.swapaxes(1, 2))


def _before(before: Array, total: int, level: int, other: int, pool: int) -> Array:
    """How many present entries of the other level are before each window of this one: [..., windows of this level]."""
    if other >= level:
        # The other level's window around this one ends later, or it is this one.
        return jnp.repeat(before, pool ** (other - level), axis=-1)
    step = pool ** (level - other)
    end = jnp.full_like(before[..., :1], total)
    return jnp.concatenate([_in_runs(before, step)[..., 1:, 0], end], axis=-1)


def _in_runs(x: Array, length: int) -> Array:
    """[..., n] -> [..., n / length, length].

    Instead of slices with a stride, of which XLA on CPUs (jax 0.12) gave wrong numbers where a mesh splits the axis.
    """
    return x.reshape(*x.shape[:-1], -1, length)


def _added_before(added: Array, level: int, pool: int, n: int) -> Array:
    """[B, G, widest] bool, tokens that are present only as kept ones -> [B, G, n]: how many are before each window."""
    width = pool**level
    counts = jnp.cumsum(added, axis=-1, dtype=jnp.int32)
    ahead = counts - added.astype(jnp.int32) if level == 0 else _in_runs(counts, width)[..., -1]
    return jnp.concatenate([ahead, jnp.repeat(counts[..., -1:], n - ahead.shape[-1], axis=-1)], axis=-1)


def _inverse(slots: Array, picked: tuple[Array, ...], added: Array | None, T: int, method: Lighthouse) -> Array:
    """[B, G, P] places of all windows -> [B, G, S] the window in each place."""
    B, G, _ = slots.shape
    pyramid, S = method.pyramid(T), method.n_entries(T)
    windows = [_iota((B, G, pyramid.sizes[-1]), -1) + pyramid.starts[-1]]
    for level, numbers in enumerate(picked):
        below = _below(numbers, method.pool)
        first = _iota(below.shape, 2) * (pyramid.sizes[level] // method.n_tiles) + pyramid.starts[level]
        windows.append((first + below).reshape(B, G, -1))
    at = [jnp.take_along_axis(slots, numbers, axis=-1) for numbers in windows]
    if added is not None:
        kept = _iota((B, G, method.widest), -1)
        windows.append(kept)
        # Those that are present anyway go nowhere: then no place is written twice.
        at.append(jnp.where(added, slots[..., : method.widest], S + kept))
    nothing = jnp.full((B, G, S), -1, jnp.int32)
    every, where = jnp.concatenate(windows, axis=-1), jnp.concatenate(at, axis=-1)
    return nothing.at[_iota(where.shape, 0), _iota(where.shape, 1), where].set(every, mode="drop", unique_indices=True)
