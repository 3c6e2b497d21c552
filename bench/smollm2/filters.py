"""Ways to find the candidates of each query, as values, and what each ranks tokens by.

All of them come down to a score a token and a number of tokens: the tokens of a unit or block have one score, and those
that are always kept have the highest. So one loop compares any number of methods. What is scored and how is taken from
the library's stages, which tokens that leaves is written again, as masks of [queries, keys]; a test compares those of
the library's methods with `hisa_jax.select`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import hisa_jax as hj
from bench.smollm2.indexers import index_scores
from hisa_jax.layout import Keys
from hisa_jax.xla import scan, stages
from hisa_jax.xla.rounding import widened
from hisa_jax.xla.sketch import int4
from hisa_jax.xla.topk import FORCED, INVISIBLE, chosen_mask, sort_key_of

_MOST = 64  # of the scan's samples: the best that slopes may be taken at


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """What some queries of one layer have to choose by.

    Attributes:
        q, w, k: [t, H, D], [t, H] float32, [S, D].
        visible: [t] int32.
        sketches: by name, [S, D] float32.
        products: dtype of the exact scores' products.
    """

    q: Array
    w: Array
    k: Array
    visible: Array
    sketches: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    products: Any = jnp.float32

    @functools.cached_property
    def queries(self) -> stages.Queries:
        """As the library's stages take them."""
        return stages.Queries(self.q, self.w, self.visible)

    @functools.cached_property
    def exact(self) -> Array:
        """[t, S] int32: the indexer's scores as `topk.sort_key_of` orders them, INVISIBLE where not seen."""
        return jnp.where(self.seen, sort_key_of(index_scores(self.q, self.k, self.w, self.products)), INVISIBLE)

    @functools.cached_property
    def seen(self) -> Array:
        """[t, S] bool."""
        return jnp.arange(self.k.shape[0])[None, :] < self.visible[:, None]

    @functools.cached_property
    def samples(self) -> tuple[Array, Array]:
        """[t, 64] positions of the best of some strided tokens, best first; [t, 64] bool, whether there is one."""
        positions = scan.sample_positions(self.visible)
        inside = jnp.maximum(positions, 0)
        sort_key = jnp.take_along_axis(self.exact, inside, axis=1)
        values, order = lax.top_k(jnp.where(positions >= 0, sort_key, INVISIBLE), _MOST)
        return jnp.take_along_axis(inside, order, axis=1), values > INVISIBLE

    @functools.cached_property
    def open_samples(self) -> Array:
        """[t, H, 64] bool: which heads are open at the samples."""
        return open_heads(self, self.samples[0])

    def slopes(self, n_best: int = scan.N_BEST) -> Array:
        """[t, H] float32: at what share of the best samples each head is open."""
        return _share(self.open_samples[:, :, :n_best], self.samples[1][:, :n_best])


class Ranking(NamedTuple):
    """`sort_key` [t, S] int32 as `View.exact`, FORCED what is always kept; `budget` [t] int32, tokens that are kept."""

    sort_key: Array
    budget: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Varied:
    """The scan with something else than `hisa_jax.Scan` has.

    Attributes:
        exact_heads: so many heads that keep their relu.
        by: which: "size", of greatest |w| * |q|, as in the library; "bend", those that slopes miss most at the samples.
        n_best: samples that the slopes of the others are taken at, at most 64.
        sketch: what is scanned, by its name in `sketches`; None: the keys.
        first: tokens that pass by the sketch before the keys choose among them; 0: the sketch alone chooses.
    """

    topk: int
    candidates: int
    exact_heads: int = 0
    by: Literal["size", "bend"] = "size"
    n_best: int = 32
    unit: int = 1
    sketch: str | None = None
    first: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """The scan, of tokens above the score that has the right rank among evenly strided ones."""

    topk: int
    candidates: int
    exact_heads: int = 4
    n_best: int = 32
    n_samples: int = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misa:
    """MISA's two stages (arXiv 2605.07363): the heads that score block means highest score all tokens."""

    topk: int
    candidates: int
    n_heads: int = 8
    block_size: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubBlocks:
    """Blocks by the highest score among their sub-blocks' means (LongCat's hierarchical indexing, arXiv 2608.01662)."""

    topk: int
    block_size: int
    block_topk: int
    sub: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoHeads:
    """The higher of two virtual heads: with weights above 0 each is a lower bound of the indexer's score."""

    topk: int
    candidates: int


Method = hj.Method | Varied | Threshold | Misa | SubBlocks | TwoHeads


def kept(sort_key: Array, budget: Array) -> Array:
    """[t, S] int32, [t] int32 -> [t, S] bool: the best `budget` of each row, of equal ones the first."""
    return chosen_mask(sort_key, jnp.clip(budget, 1, sort_key.shape[1]))


def chosen(method: Method, view: View) -> Array:
    """[t, S] bool: the tokens that a method selects."""
    ranking = rank(method, view)
    candidates = kept(ranking.sort_key, ranking.budget)
    if takes_all(method):
        return candidates
    return kept(jnp.where(candidates, view.exact, INVISIBLE), jnp.full_like(view.visible, method.topk))


def takes_all(method: Method) -> bool:
    """Whether the candidates themselves are the selection."""
    return isinstance(method, hj.BlockSparse)


def rank(method: Method, view: View) -> Ranking:
    """What a method ranks the tokens of some queries by, and how many it keeps."""
    t, S = view.exact.shape
    match method:
        case hj.Dsa():
            return Ranking(view.exact, jnp.full((t,), S, jnp.int32))
        case hj.Hisa() | hj.BlockSparse():
            scores = index_scores(view.q, means(view.k, method.block_size), view.w)
            return of_units(scores, method.block_size, method.block_topk, view, method.keep_first, method.keep_last)
        case SubBlocks():
            scores = index_scores(view.q, means(view.k, method.sub), view.w)
            n = method.block_size // method.sub
            # Sub-blocks with future tokens may decide of no block but the query's own, which is kept anyway.
            whole = (jnp.arange(scores.shape[1])[None, :] + 1) * method.sub <= view.visible[:, None]
            scores = jnp.where(whole, scores, -jnp.inf)
            return of_units(best_of(scores, n), method.block_size, method.block_topk, view)
        case hj.Scan():
            slopes = jnp.ones_like(view.w) if method.slopes == "plain" else view.slopes()
            keys = view.k if method.sketch is None else int4(view.k)
            units = best_of(scan_scores(view, slopes, keys, largest(view, method.exact_heads)), method.unit)
            return of_units(units, method.unit, method.block_topk, view, method.keep_first, method.keep_last)
        case Varied():
            slopes = view.slopes(method.n_best)
            heads = (
                largest(view, method.exact_heads) if method.by == "size" else _bent(view, slopes, method.exact_heads)
            )
            keys = view.k if method.sketch is None else view.sketches[method.sketch]
            units = best_of(scan_scores(view, slopes, keys, heads), method.unit)
            found = of_units(units, method.unit, (method.first or method.candidates) // method.unit, view)
            if not method.first:
                return found
            again = sort_key_of(scan_scores(view, slopes, view.k, heads))
            passed = jnp.where(kept(found.sort_key, found.budget), again, INVISIBLE)
            sort_key = jnp.where(found.sort_key == FORCED, FORCED, passed)
            return Ranking(sort_key, jnp.full((t,), method.candidates, jnp.int32))
        case Threshold():
            return _above_threshold(method, view)
        case Misa():
            scores = jnp.where(view.seen, index_scores(view.q, view.k, _routed(method, view)), -jnp.inf)
        case TwoHeads():
            none = largest(view, 0)
            first, second = (scan_scores(view, slopes, view.k, none) for slopes in _two_slopes(view))
            scores = jnp.maximum(first, second)
    return of_units(scores, 1, method.candidates, view)


def of_units(scores: Array, unit: int, m: int, view: View, keep_first: int = 1, keep_last: int = 1) -> Ranking:
    """The best `m` units by scores [t, n], the first and last ones that a query sees always among them."""
    S = view.k.shape[0]
    units = jnp.arange(scores.shape[1])[None, :]
    eligible = -(-view.visible // unit)[:, None]
    forced = (units < keep_first) | (units >= eligible - keep_last)
    sort_key = jnp.where(units < eligible, jnp.where(forced, FORCED, sort_key_of(scores)), INVISIBLE)
    sort_key = jnp.repeat(sort_key, unit, axis=1)[:, :S]
    # The query's own unit counts whole, whatever it lacks.
    lacking = eligible[:, 0] * unit - view.visible
    return Ranking(jnp.where(view.seen, sort_key, INVISIBLE), m * unit - lacking)


def means(k: Array, size: int) -> Array:
    """[S, D] -> [S / size, D] in the same dtype; the last one of what there is."""
    starts = jnp.arange(0, k.shape[0], size, dtype=jnp.int32)
    counts = jnp.minimum(size, k.shape[0] - starts)
    return stages.pool(Keys(k, None), starts, counts, size, starts.shape[0]).astype(k.dtype)


def best_of(scores: Array, n: int) -> Array:
    """[t, S] -> [t, S / n]: the highest of each `n`."""
    t, S = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, -S % n)), constant_values=-jnp.inf)
    return jnp.max(padded.reshape(t, -1, n), axis=2)


def scan_scores(view: View, slopes: Array, keys: Array, heads: Array) -> Array:
    """[t, H], [S, D], [t, n] -> [t, S] float32: scan scores with some heads exact, -inf where a query does not see."""
    virtual = scan.virtual_head(view.queries, slopes, heads)
    if view.k.dtype != jnp.float32:  # rounded as for the keys, also where a sketch of them is in float32
        virtual = widened(virtual.astype(jnp.bfloat16))
    scores = scan.scores(scan.scan_heads(view.queries, virtual, heads), Keys(keys.astype(jnp.float32), None))
    return jnp.where(view.seen, scores, -jnp.inf)


def largest(view: View, n: int) -> Array:
    """[t, n] int32: the heads of greatest |w| * |q|, of equal ones the lower."""
    return scan.exact_heads(view.queries, hj.Scan(exact_heads=n))


def _bent(view: View, slopes: Array, n: int) -> Array:
    """[t, H] -> [t, n] int32: the heads that their slopes miss most at the sampled tokens."""
    positions = scan.sample_positions(view.visible)
    products = jnp.einsum("thd,tnd->thn", view.q, view.k[jnp.maximum(positions, 0)]).astype(jnp.float32)
    missed = jnp.abs(jax.nn.relu(products) - slopes[:, :, None] * products)
    missed = jnp.sum(jnp.where(positions[:, None, :] >= 0, missed, 0), axis=2)
    return lax.top_k(jnp.abs(view.w) * missed, n)[1]


def open_heads(view: View, positions: Array) -> Array:
    """[t, n] -> [t, H, n] bool: which heads are open at some tokens."""
    return jnp.einsum("thd,tnd->thn", view.q, view.k[positions]) > 0


def _share(is_open: Array, of: Array) -> Array:
    """[t, H, n], [t, n] bool -> [t, H]."""
    n = jnp.maximum(jnp.sum(of, axis=1), 1).astype(jnp.float32)
    return jnp.sum(is_open & of[:, None, :], axis=2).astype(jnp.float32) / n[:, None]


def _two_slopes(view: View) -> tuple[Array, Array]:
    """Slopes of the best samples in two groups: like the best one, and like the one least like it."""
    is_open, there = view.open_samples[:, :, :16], view.samples[1][:, :16]
    size = jnp.abs(view.w)[:, :, None]

    def distance(to: Array) -> Array:
        return jnp.sum(jnp.where(is_open != to, size, 0), axis=1)

    from_best = distance(is_open[:, :, :1])
    farthest = jnp.argmax(jnp.where(there, from_best, -1), axis=1)[:, None, None]
    near = from_best <= distance(jnp.take_along_axis(is_open, farthest, axis=2))
    return _share(is_open, there & near), _share(is_open, there & ~near)


def _routed(method: Misa, view: View) -> Array:
    """[t, H]: the weights of the routed heads, 0 elsewhere."""
    pooled = means(view.k, method.block_size)
    products = jax.nn.relu(jnp.einsum("thd,nd->thn", view.q, pooled)).astype(jnp.float32)
    seen = jnp.arange(pooled.shape[0])[None, :] * method.block_size < view.visible[:, None]
    weight = jnp.abs(view.w) * jnp.sum(jnp.where(seen[:, None, :], products, 0), axis=2)
    heads = lax.top_k(weight, min(method.n_heads, weight.shape[1]))[1]
    is_routed = jnp.any(heads[:, :, None] == jnp.arange(weight.shape[1])[None, None, :], axis=1)
    return jnp.where(is_routed, view.w, 0)


def _above_threshold(method: Threshold, view: View) -> Ranking:
    t, S = view.exact.shape
    scores = scan_scores(view, view.slopes(method.n_best), view.k, largest(view, method.exact_heads))
    positions = scan.sample_positions(view.visible, method.n_samples)
    there = positions >= 0
    sample = jnp.take_along_axis(scores, jnp.maximum(positions, 0), axis=1)
    ordered = -jnp.sort(-jnp.where(there, sample, -jnp.inf), axis=1)
    n = jnp.sum(there, axis=1).astype(jnp.float32)
    rank_of = jnp.round(n * method.candidates / view.visible.astype(jnp.float32)).astype(jnp.int32)
    threshold = jnp.take_along_axis(ordered, jnp.clip(rank_of, 1, method.n_samples)[:, None] - 1, axis=1)
    token = jnp.arange(S)[None, :]
    own, few = token == view.visible[:, None] - 1, view.visible[:, None] <= method.candidates
    passed = ((scores >= threshold) | own | (token == 0) | few) & (view.exact > INVISIBLE)
    return Ranking(jnp.where(passed, FORCED, INVISIBLE), jnp.full((t,), S, jnp.int32))
