"""From tokens to the entries of a pyramid and back, differentiable without a scatter.

    gather: entry s is the mean over its window            spread: position j gets, of each level,
            of tokens                                              the last window that is complete at j
        tokens   0 1 2 3 4 5 6 7                               tokens   0 1 2 3 4 5 6 7
        level 1  [ 0 ] [ 1 ] [ 2 ] [ 3 ]                       level 0  0 1 2 3 4 5 6 7
                                                               level 1  . 0 0 1 1 2 2 3

An entry is in one place of the sub-sequence at most, so the transpose of either is of the other's form: to each token
what its windows got, to each entry a sum over a window. All four are gathers of rows: the same bits each time.

`entries` [B, S, G] int32 has the window in each place, -1 for none, and `slots` [B, P, G] int32 the place of each
window of the `Pyramid`, -1 for none. With `axis`, each device of that mesh axis has a run of whole tiles: the windows
that end where a run ends reach into the next one, and their L - 1 rows are all that is exchanged.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.lighthouse.method import Pyramid
from hisa_jax.lighthouse.sums import total
from hisa_jax.xla.causal import wide_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather(x: Array, entries: Array, slots: Array, pyramid: Pyramid) -> Array:
    """Means over windows: tokens [B, T, G, E] -> entries [B, S, G, E] in the same dtype, 0 where there is none."""
    return _rows(x, [_mean(x, width) for width in pyramid.widths[1:]], entries)


def _gather_forward(x: Array, entries: Array, slots: Array, pyramid: Pyramid) -> tuple[Array, tuple[Array, Array]]:
    return gather(x, entries, slots, pyramid), (slots, entries)


def _gather_backward(pyramid: Pyramid, saved: tuple[Array, Array], d: Array) -> tuple[Array, None, None]:
    parts = (
        (jnp.repeat(slots, width, axis=1), 1 / width)
        for slots, width in zip(by_level(saved[0], pyramid), pyramid.widths, strict=True)
    )
    return _sum_of_rows(d, parts, d.dtype), None, None


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def spread(out: Array, entries: Array, slots: Array, pyramid: Pyramid, axis: str | None) -> Array:
    """Entries' outputs [B, S, G, E] -> [B, T, G, E]: to each position those of the last complete window a level."""
    levels, S, dtype = by_level(slots, pyramid), out.shape[1], out.dtype
    if axis is not None and pyramid.levels > 1:
        # Of the devices before: float32, as the sum that they are terms of.
        last = jnp.concatenate([level[:, -1:] for level in levels[1:]], axis=1)
        out = jnp.concatenate([_wide(out), _from_previous(_taken(_wide(out), last), axis)], axis=1)

    def parts() -> Iterator[tuple[Array, float]]:
        for level, (at, width) in enumerate(zip(levels, pyramid.widths, strict=True)):
            before = jnp.full_like(at[:, :1], -1 if axis is None else S + level - 1)
            shifted = jnp.concatenate([jnp.repeat(before, width - 1, axis=1), jnp.repeat(at, width, axis=1)], axis=1)
            yield shifted[:, : pyramid.n_tokens], 1.0

    return _sum_of_rows(out, parts(), dtype)


def _spread_forward(
    out: Array, entries: Array, slots: Array, pyramid: Pyramid, axis: str | None
) -> tuple[Array, Array]:
    return spread(out, entries, slots, pyramid, axis), entries


def _spread_backward(pyramid: Pyramid, axis: str | None, entries: Array, d: Array) -> tuple[Array, None, None]:
    B, _, G, E = d.shape
    lasts, rests = [], []
    for width in pyramid.widths[1:]:
        # A window reaches from its last token through all but the last of the next window.
        cut = _wide(d).reshape(B, -1, width, G, E)
        lasts.append(cut[:, :, -1])
        rests.append(total(cut[:, :, :-1], 2))
    after = [jnp.zeros_like(rest[:, :1]) for rest in rests]
    if axis is not None and rests:
        firsts = jnp.concatenate([rest[:, :1] for rest in rests], axis=1)
        after = jnp.split(_from_next(firsts, axis), len(rests), axis=1)
    sums = [
        last + jnp.concatenate([rest[:, 1:], end], axis=1) for last, rest, end in zip(lasts, rests, after, strict=True)
    ]
    return _rows(d, [x.astype(d.dtype) for x in sums], entries), None, None


spread.defvjp(_spread_forward, _spread_backward)


def by_level(slots: Array, pyramid: Pyramid) -> list[Array]:
    """[B, P, G] -> [B, n, G] of each level."""
    return [slots[:, start : start + size] for start, size in zip(pyramid.starts, pyramid.sizes, strict=True)]


def _mean(x: Array, width: int) -> Array:
    B, T, G, E = x.shape
    # From the tokens, not from the means of the level below: one pass makes all levels.
    return (total(_wide(x).reshape(B, T // width, width, G, E), 2) / width).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(wide_dtype(x.dtype))


def _rows(x: Array, upper: Sequence[Array], entries: Array) -> Array:
    """The entries' rows of tokens x [B, T, G, E] and of the levels above them; no copy is made of x."""
    T = x.shape[1]
    found = _taken(x, jnp.where(entries < T, entries, -1))
    if not upper:
        return found
    return jnp.where((entries >= T)[..., None], _taken(jnp.concatenate(upper, axis=1), entries - T), found)


def _taken(x: Array, at: Array) -> Array:
    """[B, n, G, E] at [B, m, G] -> [B, m, G, E], 0 where `at` is negative."""
    rows = jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1, mode="clip")
    return jnp.where((at >= 0)[..., None], rows, jnp.zeros((), x.dtype))


def _sum_of_rows(x: Array, parts: Iterable[tuple[Array, float]], dtype: np.dtype) -> Array:
    """Sum of factor * x[at] over the pairs of `at` [B, n, G] and a factor: in float32, in the order given."""
    terms = [_wide(_taken(x, at)) * factor for at, factor in parts]
    return functools.reduce(jnp.add, terms).astype(dtype)


def _from_previous(x: Array, axis: str) -> Array:
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, i + 1) for i in range(n - 1)])


def _from_next(x: Array, axis: str) -> Array:
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i + 1, i) for i in range(n - 1)])
