"""What the rows of `python -m bench gpu` run on: drawn queries and keys, in one piece or in pages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from bench import shapes
from hisa_jax.layout import IndexCache
from hisa_jax.quantize import QuantizedKeys

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
DTYPES: dict[str, DTypeLike] = {"e4m3": E4M3, "bf16": BF16}


class Inputs(NamedTuple):
    """[B, T, H, D], [B, S, D], [B, S] (None for bfloat16), [B, T, H], [B, T]: the last T queries of S tokens."""

    q: Array
    k: Array
    k_scale: Any
    w: Array
    visible: Array


def draw(model: shapes.Model, B: int, T: int, S: int, dtype: DTypeLike = E4M3, clustered: bool = False) -> Inputs:
    """Normal data, or data around topics."""
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (B, T, model.H, model.D))
    k = jax.random.normal(keys[1], (B, S, model.D))
    if clustered:
        # Passages of 512 tokens share a topic, queries of a passage ask for a few topics: neighbours keep like blocks.
        topics = 2 * jax.random.normal(keys[4], (S // 512, model.D))
        k = k + jnp.repeat(topics, 512, axis=0)
        asked = jax.random.randint(keys[5], (T // 512 + 1, model.H), 0, S // 512)
        q = q + 0.5 * topics[jnp.repeat(asked, 512, axis=0)[:T]]
    w = 0.01 * jax.random.normal(keys[2], (B, T, model.H)) if model.weighs else jnp.ones((B, T, model.H))
    k_scale = jnp.exp(0.1 * jax.random.normal(keys[3], (B, S))) if dtype == E4M3 else None
    visible = jnp.broadcast_to(jnp.arange(S - T + 1, S + 1, dtype=jnp.int32), (B, T))
    return Inputs(q.astype(dtype), k.astype(dtype), k_scale, w, visible)


def paged(
    inputs: Inputs,
    page_size: int,
    *,
    has_sketch: bool = False,
    block_size: int | None = None,
    entry_size: int = 1,
) -> tuple[IndexCache, Array]:
    """The keys in pages of random order, and their table [B, P]; `block_size` and `entry_size` as for `init_cache`."""
    B, S, D = inputs.k.shape
    n_pages = B * S // page_size
    table = jax.random.permutation(jax.random.key(7), n_pages).astype(jnp.int32)
    order = jnp.argsort(table)  # which piece of the sequences is in each page
    k = inputs.k.reshape(n_pages, page_size, D)[order]
    scales = None if inputs.k_scale is None else inputs.k_scale.reshape(n_pages, page_size)[order]
    table = table.reshape(B, -1)

    @jax.jit
    def cache_of(k: Array, scales: Array | None) -> IndexCache:
        keys = k if scales is None else QuantizedKeys(k, scales)
        options: Any = dict(sketch="int4" if has_sketch else None, block_size=block_size, entry_size=entry_size)
        return IndexCache.from_pages(keys, table, jnp.full((B,), S * entry_size, jnp.int32), **options)

    return cache_of(k, scales), table
