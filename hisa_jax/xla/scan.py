"""The scan, in plain JAX: which units of tokens each query keeps by the score of a few heads in place of all.

    exact_heads   the heads of greatest |weight| * |query|: they are scanned as they are
    sample        exact scores of up to 256 tokens, evenly strided over what a query sees
    open_heads    which heads are open at the 32 best of them: the slopes
    virtual_head  v = sum over the other heads of weight * slope * query
    best_units    the units whose best visible token has the highest score by v and the exact heads

What is left, the exact top-k inside the kept units, is `stages.refine`. The stages are apart where several devices that
share a sequence's keys exchange what they have found (sharded/select_xla.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import Keys, Paged, Queries, Sequence
from hisa_jax.methods import Scan, Sketch
from hisa_jax.xla import stages, topk, units
from hisa_jax.xla.rounding import widened
from hisa_jax.xla.sketch import int4
from hisa_jax.xla.stages import Candidates

N_SAMPLES = 256
N_BEST = 32
_KEYS = 4  # tiles of the other stages make one of these: a product with one head is cheaper than what surrounds it


class Samples(NamedTuple):
    """Some tokens of each query: `products` [t, H, n] float32 of heads and keys, `sort_key` [t, n] int32 of scores."""

    products: Array
    sort_key: Array


class ScanHeads(NamedTuple):
    """What a tile of queries scans with.

    Attributes: `virtual` [t, D] float32; `exact` [t, n, D] and their weights `w` [t, n] float32.
    """

    virtual: Array
    exact: Array
    w: Array


def sample_positions(visible: Array, n: int = N_SAMPLES) -> Array:
    """[t] int32 -> [t, n] int32: 0, step, 2 step, ... as far as visible, then -1."""
    positions = jnp.arange(n, dtype=jnp.int32)[None, :] << sample_steps(visible, n)[:, None]
    return jnp.where(positions < visible[:, None], positions, -1)


def sample_steps(visible: Array, n: int = N_SAMPLES) -> Array:
    """Int32 of any shape -> the logarithm of the step, the least power of two that leaves at most n samples."""
    return 32 - lax.clz(jnp.maximum(visible - 1, 0) // n)  # the bit length


def sample(queries: Queries, sequence: Sequence, positions: Array) -> Samples:
    """The products and exact scores of tokens at positions [t, n] int32, -1: none."""

    def one(row: Array) -> tuple[Array, Array]:
        keys = sequence.rows(positions[row])
        products = stages.head_products(queries.q[row], keys)
        return products, stages.head_sum(products, keys, queries.w[row])

    products, scores = stages.each_row(one, queries.q.shape[0])
    return Samples(products, jnp.where(positions >= 0, topk.sort_key_of(scores), topk.INVISIBLE))


def open_heads(products: Array, is_best: Array) -> Array:
    """[t, H, n] float32, [t, n] bool -> [t, H] int32: at how many of the best tokens each head is open."""
    return jnp.sum((products > 0) & is_best[:, None, :], axis=2, dtype=jnp.int32)


def best_samples(sort_key: Array) -> tuple[Array, Array]:
    """[t, 256] int32 -> [t, 256] bool, the 32 of highest score; [t] int32, how many they are."""
    is_best = topk.chosen_mask(sort_key, N_BEST)
    return is_best, jnp.sum(is_best, axis=1, dtype=jnp.int32)


def exact_heads(queries: Queries, method: Scan) -> Array:
    """[t, n] int32: the heads of greatest |w| * |q|, ascending, `method.exact_heads` of them or all there are."""
    n = min(method.exact_heads, queries.w.shape[1])
    if n == 0:
        return jnp.zeros((queries.w.shape[0], 0), jnp.int32)
    q = widened(queries.q)
    sizes = jnp.abs(queries.w) * jnp.sqrt(jnp.sum(q * q, axis=2))
    return topk.topk_in_order(topk.sort_key_of(sizes), None, n)[1]


def virtual_head(queries: Queries, slopes: Array, exact: Array) -> Array:
    """[t, H] float32 slopes -> [t, D] float32: the heads that are not `exact`, [t, n] int32, in one."""
    heads = jnp.arange(slopes.shape[1], dtype=jnp.int32)
    is_exact = jnp.any(exact[:, :, None] == heads[None, None, :], axis=1)
    # Neither weight nor query of an exact head: 0 times infinity is NaN.
    q = jnp.where(is_exact[:, :, None], 0.0, widened(queries.q))
    return jnp.einsum("th,thd->td", jnp.where(is_exact, 0.0, queries.w * slopes), q, precision=lax.Precision.HIGHEST)


def scan_heads(queries: Queries, virtual: Array, exact: Array) -> ScanHeads:
    """`virtual` [t, D], as `virtual_head` gives it, and beside it the `exact` heads, [t, n] int32."""
    q = jnp.take_along_axis(queries.q, exact[:, :, None], axis=1)
    return ScanHeads(virtual, q, jnp.take_along_axis(queries.w, exact, axis=1))


def slopes_of(n_open: Array, n_best: Array) -> Array:
    """[t, H], [t] int32 -> [t, H] float32."""
    return n_open.astype(jnp.float32) / jnp.maximum(n_best, 1).astype(jnp.float32)[:, None]


def heads_of(queries: Queries, sequence: Sequence, method: Scan) -> ScanHeads:
    """What each query of a sequence in one place scans with."""
    if method.slopes == "plain":
        slopes = jnp.ones_like(queries.w)
    else:
        samples = sample(queries, sequence, sample_positions(queries.visible))
        is_best, n_best = best_samples(samples.sort_key)
        slopes = slopes_of(open_heads(samples.products, is_best), n_best)
    exact = exact_heads(queries, method)
    return scan_heads(queries, virtual_head(queries, slopes, exact), exact)


def best_units(
    heads: ScanHeads,
    visible: Array,
    eligible: Array,
    sequence: Sequence,
    method: Scan,
    m: int,
    tile_s: int,
    place: Callable[[Array], Array] = lambda units: units,
) -> Candidates:
    """The `m` best units of each query, ascending.

    Args:
        heads: what each query scans with.
        visible: [t] int32, tokens of `sequence` that each query sees.
        eligible: [t] int32, units that each query sees, also elsewhere than in `sequence`.
        place: maps units of `sequence` to their places among all, where it is a part.
    """
    tile_s = min(_KEYS * tile_s, -(-sequence.max_keys // stages.LANES) * stages.LANES)
    is_forced = stages.forced_blocks(eligible, method)

    def scored(start: Array, size: int) -> tuple[Array, Array]:
        keys, positions = scanned_tile(sequence, method.sketch, start, size)
        return topk.sort_key_of(scores(heads, keys)), positions

    return units.best(scored, visible, sequence.max_keys, method.unit, m, tile_s, lambda ids: is_forced(place(ids)))


def scanned_tile(sequence: Sequence, sketch: Sketch | None, start: Array, size: int) -> tuple[Keys, Array]:
    """`sequence.tile` of what is multiplied: the keys, or what is left of them in a sketch, by the tokens' scales.

    Pages that keep the sketch are read instead of the keys; of others it is made here.
    """
    if sketch is not None and isinstance(sequence, Paged) and sequence.sketch is not None:
        return sequence._replace(keys=sequence.sketch).tile(start, size)
    keys, positions = sequence.tile(start, size)
    return (keys if sketch is None else keys._replace(values=int4(keys.values))), positions


def scores(heads: ScanHeads, keys: Keys) -> Array:
    """t queries, s keys -> [t, s] float32: k_scale[s] * (v[t] . k[s] + sum over exact heads of w * relu(q . k[s])).

    v is rounded to bfloat16, unless the keys are float32.
    """
    virtual = heads.virtual.astype(stages.product_dtype(jnp.bfloat16, keys.values.dtype))
    total = stages.head_products(virtual, keys)
    t, n, D = heads.exact.shape
    if n:
        products = stages.head_products(heads.exact.reshape(t * n, D), keys).reshape(t, n, -1)
        for i in range(n):  # one after the other: a reduction's order would depend on its size
            total = total + heads.w[:, i, None] * jnp.maximum(products[:, i], 0)
    return total if keys.scales is None else total * keys.scales[None, :]


def scan(queries: Queries, sequence: Sequence, method: Scan, tile_s: int) -> Array:
    """The units each query keeps, of a sequence in one place: [t, candidates / unit] int32, ascending, then -1."""
    eligible = -(-queries.visible // method.unit)
    m = min(method.block_topk, -(-sequence.max_keys // method.unit))

    def scanned() -> Array:
        heads = heads_of(queries, sequence, method)
        return best_units(heads, queries.visible, eligible, sequence, method, m, tile_s).positions

    kept = lax.cond(jnp.all(eligible <= m), lambda: stages.first_positions(eligible, m), scanned)
    return jnp.pad(kept, ((0, 0), (0, method.block_topk - m)), constant_values=-1)
