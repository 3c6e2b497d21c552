"""What each query of a batch scans with, mostly by XLA: the slopes, the virtual head and the exact heads.

Queries side by side sample the same tokens wherever the steps between those are the same, which is nearly everywhere:
then 256 keys are gathered for all of a tile, and scored by one product. XLA's searches for the best are loops of small
operations: the best samples are found by the kernel `topk`, the few exact heads one by one.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu.topk import topk
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Keys, Queries, Sequence
from hisa_jax.methods import Scan
from hisa_jax.xla import scan, stages
from hisa_jax.xla.scan import Samples, ScanHeads

_TILE = 256  # queries: their products with 256 keys are 16 MiB


def scan_heads(call: Call, method: Scan, interpret: Interpret = False) -> ScanHeads:
    """Of a batch: [B, T, ...] each, as `xla.scan.heads_of` gives them."""
    B, T = call.shape
    t = min(_TILE, T)
    n = -(-T // t)

    def tiled(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, n * t - T), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B * n, t, *x.shape[2:])

    def one(tile: tuple[Array, Queries]) -> ScanHeads:
        b, queries = tile
        return heads_of_tile(queries, call.sequence(b), method, interpret)

    sequences = jnp.repeat(jnp.arange(B, dtype=jnp.int32), n)
    heads = lax.map(one, (sequences, jax.tree.map(tiled, Queries(call.q, call.w, call.visible))))
    return jax.tree.map(lambda x: x.reshape(B, n * t, *x.shape[2:])[:, :T], heads)


def heads_of_tile(queries: Queries, sequence: Sequence, method: Scan, interpret: Interpret = False) -> ScanHeads:
    """Of t queries of one sequence: [t, ...] each."""
    exact = _exact_heads(queries, method.exact_heads)
    slopes = jnp.ones_like(queries.w)
    if method.slopes == "sampled":
        slopes = _sampled_slopes(queries, sequence, interpret)
    return scan.scan_heads(queries, scan.virtual_head(queries, slopes, exact), exact)


def _exact_heads(queries: Queries, n: int) -> Array:
    """[t, n] int32, or of all heads if they are fewer: what `xla.scan.exact_heads` gives."""
    q, heads = queries.q.astype(jnp.float32), jnp.arange(queries.w.shape[1], dtype=jnp.int32)
    sizes = sort_key_of(jnp.abs(queries.w) * jnp.sqrt(jnp.sum(q * q, axis=2)))
    found = []
    for _ in range(min(n, len(heads))):
        best = jnp.argmax(sizes, axis=1).astype(jnp.int32)  # of equal ones the lowest
        sizes = jnp.where(heads == best[:, None], INVISIBLE, sizes)
        found.append(best)
    return jnp.sort(jnp.stack(found, axis=1), axis=1) if found else jnp.zeros((len(queries.w), 0), jnp.int32)


def _sampled_slopes(queries: Queries, sequence: Sequence, interpret: Interpret) -> Array:
    """[t, H] float32: the share of the best sampled tokens at which each head is open."""
    positions = scan.sample_positions(queries.visible)
    most = jnp.max(positions, axis=0)  # of a query that sees the most
    is_shared = jnp.all((positions < 0) | (positions == most))

    def shared() -> Samples:
        keys = sequence.rows(most)
        products = _products(queries, keys)
        scores = jnp.einsum("ths,th->ts", jnp.maximum(products, 0), queries.w, precision=lax.Precision.HIGHEST)
        scores = scores if keys.scales is None else scores * keys.scales
        return Samples(products, jnp.where(positions >= 0, sort_key_of(scores), INVISIBLE))

    samples = lax.cond(is_shared, shared, lambda: scan.sample(queries, sequence, positions))
    n = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    columns, n_best = topk(samples.sort_key, n, scan.N_BEST, interpret=interpret)
    is_best = jnp.any(columns[:, :, None] == jnp.arange(scan.N_SAMPLES, dtype=jnp.int32), axis=1)
    return scan.slopes_of(scan.open_heads(samples.products, is_best), n_best)


def _products(queries: Queries, keys: Keys) -> Array:
    """[t, H, s] float32 of each head with the same s keys."""
    wide = stages.product_dtype(queries.q.dtype, keys.values.dtype)
    q, k = queries.q.astype(wide), keys.values.astype(wide)
    return jnp.einsum("thd,sd->ths", q, k, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
