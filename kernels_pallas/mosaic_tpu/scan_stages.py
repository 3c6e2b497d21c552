"""The scan put together, for batches: heads, units that eight queries keep, exact top-k in them."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu import flat, refine_shared, scan
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice, chip
from hisa_jax.kernels_pallas.mosaic_tpu.scan_heads import scan_heads
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Queries
from hisa_jax.methods import Scan

LEAST_UNIT, MOST_UNIT = 2, 16  # a row of 32 bits holds two tokens, a unit is copied as eight rows
_MOST_KEYS = 131072  # of a sequence: those that VMEM has room for


def why_not(D: int, dtype: str, method: Scan, n_keys: int, is_batch: bool) -> str | None:
    """None, or why these kernels take no such scan, of those that `limits.why_not` lets pass."""
    if not is_batch:
        return "has a Scan of batches alone, not of packed queries or pages"
    if method.sketch is not None:
        return f"has a Scan of the keys alone, not of a sketch={method.sketch!r}"
    if method.unit > MOST_UNIT:
        return f"needs units of up to {MOST_UNIT} tokens, not {method.unit}"
    if dtype != "bfloat16" or D != 128:
        return f"needs bfloat16 queries and keys of size 128 for a Scan, not {dtype} of {D}"
    if n_keys > _MOST_KEYS:
        return f"needs at most {_MOST_KEYS} keys for a Scan, not {n_keys}"
    return None


@functools.partial(jax.jit, static_argnames=("method", "interpret"))
def select_scan(call: Call, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
    """The scan: [T, topk] int32 positions, ascending, then -1; [T] int32 count; a row for each of `call.queries`.

    Eight queries side by side choose from what all of them want. Units of one token are kept in pairs.
    """
    with jax.enable_x64(False):  # see bits.py
        assert call.k is not None
        queries, k = Queries(call.q, call.w, jnp.clip(call.visible, 0, call.max_keys)), call.k.values
        unit = max(method.unit, LEAST_UNIT)
        times = unit // method.unit
        choice = Choice(
            k=method.block_topk,  # as many units of another size hold those, whatever they have in common
            keep_first=-(-method.keep_first // times),
            keep_last=method.keep_last if times == 1 else method.keep_last // times + 1,
            interpret=interpret,
        )
        lists, counts = scan.scan(
            scan_heads(call, method, interpret), -(-queries.visible // unit), k, unit, choice=choice
        )
        best = Choice(k=method.topk, interpret=interpret)

        def of_lists() -> Array:
            config = refine_shared.heuristic(chip(), call.shape[1])
            return refine_shared.refine_shared(queries, k, lists, counts, unit, choice=best, config=config)

        def of_all() -> Array:
            # Half of all units in one list: to score the others, too, takes less than to leave them out.
            assert call.k is not None
            return flat.flat(queries, call.k, choice=best)[0]

        chosen = lax.cond(jnp.any(counts > lists.shape[2]), of_all, of_lists)
        n = queries.visible.reshape(-1)
        return chosen.reshape(-1, method.topk), jnp.minimum(n, method.topk)
