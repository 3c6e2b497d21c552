"""Writing new tokens to the pages of a cache."""

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks, dispatch
from hisa_jax.cache import IndexCache, check_table, write
from hisa_jax.quantize import QuantizedKeys


def append(
    cache: IndexCache,
    k: Array | QuantizedKeys,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
    *,
    latents: Array | None = None,
    implementation: str = "auto",
) -> IndexCache:
    """Writes new tokens behind those of their requests.

    What stood at their places before is replaced, so tokens that were rejected need not be removed first. Tokens that
    have no page (their entry of the table lies outside of [0, n_pages)) are dropped. Under `jax.jit` give the cache's
    buffers to the result: `jax.jit(hj.append, donate_argnums=0)`.

    Args:
        cache: the pages of all requests.
        k: [T, D] new index keys of all requests, one request's behind the other's, in the cache's dtype;
            `QuantizedKeys` for 8 bits.
        block_tables: [R, P] int32, the pages of each request in order. Pages written to must be no one else's.
        cu_seqlens: [R + 1] int32, where each request's new tokens begin in `k`, from 0, ascending.
        lengths: [R] int32, tokens of each request before.
        latents: [T, Dk], the new tokens' keys for `sparse_mla`, if the cache keeps them.
        implementation: "auto", "triton" (one kernel, on NVIDIA GPUs) or "xla"; the same bits, but for the last of a
            partial page's mean.

    Returns: the cache with lengths + diff(cu_seqlens) tokens a request.
    Raises: TypeError, ValueError: arrays that do not fit the cache or each other; an implementation that cannot run.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2, 0]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((20, 8)), table, jnp.array([0, 20]), jnp.array([0]))
        >>> cache.counts.tolist()
        [4, 0, 16, 0]
    """
    call = "append"
    checks.unsplit(
        call, cache=cache, k=k, block_tables=block_tables, cu_seqlens=cu_seqlens, lengths=lengths, latents=latents
    )
    R = check_append(call, cache, k, block_tables, cu_seqlens, lengths, latents)
    values, scales = (k.values, k.scales) if isinstance(k, QuantizedKeys) else (k, None)
    T, (n_pages, size, D) = values.shape[0], cache.keys.shape
    problem = dispatch.AppendProblem(n_requests=R, n_pages=n_pages, page_size=size, D=D, dtype=cache.keys.dtype.name)
    name = dispatch.choose(call, implementation, dispatch.append_reasons(dispatch.Device.default(), problem))
    if 0 in (T, R, block_tables.shape[1]):
        return cache
    if name == "xla":
        # Bad offsets can make a request's share empty, never reach outside.
        cu_seqlens = lax.cummax(jnp.clip(cu_seqlens, 0, T))
        return write(cache, values, scales, latents, block_tables, cu_seqlens, lengths)
    return dispatch.appender(name)(cache, (values, scales, latents), block_tables, cu_seqlens, lengths)


def check_append(
    call: str,
    cache: IndexCache,
    k: Array | QuantizedKeys,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
    latents: Array | None,
) -> int:
    """Raises unless the arguments of `append` fit each other; returns R."""
    R = check_table(call, cache, block_tables, lengths)
    values, scales = (k.values, k.scales) if isinstance(k, QuantizedKeys) else (k, None)
    checks.dtype(call, "k", values, (cache.keys.dtype.name,))
    checks.shape(call, "k", values, ("T", cache.keys.shape[2]), "its last axis must equal the cache's D")
    T = values.shape[0]
    if (scales is None) != (cache.scales is None):
        wanted = "QuantizedKeys" if scales is None else "an array"
        raise TypeError(f"{call}: k is {type(k).__name__}, wanted {wanted}, as the cache holds {cache.keys.dtype.name}")
    if scales is not None:
        checks.dtype(call, "k.scales", scales, ("float32",))
        checks.shape(call, "k.scales", scales, (T,), "one scale a key")
    if (latents is None) != (cache.latents is None):
        has = "None: the cache keeps none" if cache.latents is None else "an array: the cache keeps them"
        raise ValueError(f"{call}: latents is {'None' if latents is None else 'given'}, wanted {has}")
    if latents is not None and cache.latents is not None:
        checks.dtype(call, "latents", latents, (cache.latents.dtype.name,))
        checks.shape(call, "latents", latents, (T, cache.latents.shape[2]), "a row for each of k's")
    checks.offsets(call, "cu_seqlens", cu_seqlens, (R + 1,), T, "a start for each request, and the end")
    return R
