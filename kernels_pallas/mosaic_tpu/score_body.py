"""Device code that the kernels share: a product of one query's heads with keys, and what becomes of it.

    o[r, s] = scale[s] * sum_h w[r, h] * relu(q[r, h] . k[s])

The heads of a query are the rows of its product, so their sum is additions of registers, but for the last eight rows.
Those go to a scratch of [score registers * 8, 128], from which a load with stride 8 brings the same row of eight
queries at once: seven more additions for eight queries, where a sum over sublanes is three rotations for each.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref


def spread_weights(w_ref: Ref, w_vmem: Ref) -> None:
    """[tile, H] -> [tile, H, LANES]: heads along sublanes, as in the products."""
    for r in range(w_ref.shape[0]):
        w_vmem[r] = column(w_ref[pl.ds(r, 1)], LANES)


def column(row: Array, width: int) -> Array:
    """[1, n] -> [n, width], every lane alike."""
    return jnp.broadcast_to(row, (width, row.shape[1])).T


def row_of(ref: Ref, first: Array | int, n: int) -> Array:
    """Rows `first` to first + n of [..., width] side by side: [1, n * width]."""
    return jnp.concatenate([ref[pl.ds(first + i, 1)] for i in range(n)], axis=1)


def lanes_of(ref: Ref, first: Array, i: int) -> Array:
    """[1, 128]: of tokens in rows of a page each, [n, page_size], the 128 number first + i; `first` is even."""
    page_size = ref.shape[1]
    if page_size < LANES:
        n = LANES // page_size
        return row_of(ref, (first + i) * n, n)
    n = page_size // LANES
    return ref[pl.ds(lax.div(first, n) + i // n, 1), i % n * LANES : (i % n + 1) * LANES]


def products(q: Array, keys: Array, is_transposed: bool = False) -> Array:
    """[rows, D], [n, D] (or [D, n]) -> [rows, n] float32, relu(q . k)."""
    dimensions = (((1,), (0 if is_transposed else 1,)), ((), ()))
    exact = jnp.int32 if q.dtype == jnp.int8 else jnp.float32
    x = lax.dot_general(q, keys, dimensions, preferred_element_type=exact)
    return jnp.maximum(x.astype(jnp.float32), 0.0)  # the integer maximum would be two instructions


def sum_to_sublanes(x: Array, w: Array) -> Array:
    """[H, LANES], [H, LANES] -> [8, LANES]: the weighted sum over heads but for its last eight terms."""
    return jnp.sum((x * w).reshape(-1, SUBLANES, LANES), axis=0)


def scores_of_rows(partial_vmem: Ref, first: int) -> Array:
    """The scores [8, LANES] of eight queries, whose partial sums are `partial_vmem`'s rows from `first` on."""
    total = partial_vmem[pl.ds(first, SUBLANES, stride=SUBLANES)]
    for i in range(1, SUBLANES):
        total = total + partial_vmem[pl.ds(first + i, SUBLANES, stride=SUBLANES)]
    return total


def sort_keys_of_rows(partial_vmem: Ref, first: int) -> Array:
    """Their sort keys."""
    return sort_key_of(scores_of_rows(partial_vmem, first))


def splat(column_ref: Ref) -> Array:
    """[tiles, 8, 1] -> [tiles, 8, LANES]."""
    return jnp.broadcast_to(column_ref[...], (*column_ref.shape[:2], LANES))


def fill(sort_keys_vmem: Ref, visible: Array) -> None:
    """Sort keys before any is scored: what is visible and never scored is chosen whatever it is."""
    tiles, sublanes, _ = sort_keys_vmem.shape
    lane = lax.broadcasted_iota(jnp.int32, (tiles, SUBLANES, LANES), 2)

    def one_group(i: Array, _: None) -> None:
        sort_key = jnp.where(i * LANES + lane < visible, 0, INVISIBLE)
        sort_keys_vmem[:, pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)] = sort_key

    lax.fori_loop(0, sublanes // SUBLANES, one_group, None)
