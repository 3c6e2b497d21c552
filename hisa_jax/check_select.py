"""What every selection checks of its arguments, once for all its forms: batches, packed, in pages, on a mesh.

Each function raises TypeError or ValueError that name the call, the argument, what was given and what is wanted. None
looks at a value, but under `checked`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from hisa_jax import checks
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.entries import most_tokens
from hisa_jax.index_cache import IndexCache, check_cache, check_table
from hisa_jax.layout import Keys
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan, is_by_best_token
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.xla.select import Tiles


def check_batch(
    call: str,
    q: Array,
    k: Array | QuantizedKeys,
    w: Array | None,
    method: Method,
    query_positions: Array | None,
    lengths: Array | None,
) -> Keys:
    """The keys of `select` and of what splits them over devices."""
    keys = _queries_and_keys(call, q, k, w, ("B", "T"), "S", method)
    B, T, _, _ = q.shape
    S, most = keys.values.shape[1], most_tokens(keys.values.shape[1], method)
    if lengths is not None:
        checks.int32(call, "lengths", lengths, (B,), "one length a sequence")
        checks.value(
            (lengths >= 0) & (lengths <= most),
            f"{call}: lengths is {{lengths}}, wanted 0 to {most}, the {_tokens_of(method)} there are",
            lengths=lengths,
        )
    if query_positions is not None:
        checks.int32(call, "query_positions", query_positions, (B, T), "one position a query")
        checks.value(
            query_positions >= -1,
            f"{call}: query_positions holds {{least}}, wanted -1 (padding) or more",
            least=jnp.min(query_positions, initial=0),
        )
    elif (most if lengths is not None else S * method.entry_size) < T:
        raise ValueError(
            f"{call}: q has T = {T} queries but k has only S = {S} keys: by default the queries are the last T of the "
            "S tokens; give query_positions"
        )
    return keys


def check_packed(
    call: str,
    q: Array,
    k: Array | QuantizedKeys,
    w: Array | None,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    method: Method,
    lengths: Array | None,
) -> Keys:
    """The keys of `select_packed`."""
    keys = _queries_and_keys(call, q, k, w, ("T",), "N", method)
    checks.offsets(call, "cu_seqlens_q", cu_seqlens_q, ("R + 1",), q.shape[0])
    checks.offsets(call, "cu_seqlens_k", cu_seqlens_k, ("R + 1",), keys.values.shape[0])
    checks.shape(call, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "as many sequences as cu_seqlens_q has")
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"{call}: cu_seqlens_q is [0], wanted [R + 1]: it starts with a 0")
    if lengths is not None:
        checks.int32(call, "lengths", lengths, (cu_seqlens_q.shape[0] - 1,), "one length a sequence")
        most = most_tokens(jnp.diff(cu_seqlens_k), method)
        checks.value(
            (lengths >= 0) & (lengths <= most),
            f"{call}: lengths is {{lengths}}, wanted 0 to {{most}}, the {_tokens_of(method)} there are",
            lengths=lengths,
            most=most,
        )
    return keys


def check_paged(
    call: str,
    q: Array,
    w: Array | None,
    cache: IndexCache,
    block_tables: Array,
    cu_seqlens_q: Array,
    lengths: Array,
    method: Method,
    n_groups: int = 1,
) -> None:
    """The arguments of `select_paged`, on one device and on several, of one group of them or more."""
    check_cache(call, cache)
    check_method(call, method)
    _queries(call, q, w, ("T",), cache.keys.shape[-1], method, "its last axis must equal the cache's D")
    R = check_table(call, cache, block_tables, lengths)
    _positions(call, "block_tables", block_tables.shape[-1] * cache.page_size, method)
    why = "a start for each request, and the end" + (" of each group" if n_groups > 1 else "")
    checks.offsets(call, "cu_seqlens_q", cu_seqlens_q, (R + n_groups,), q.shape[0], why, n_groups)
    if method.entry_size != cache.entry_size:
        raise ValueError(
            f"{call}: {method} with a cache of entry_size={cache.entry_size}, wanted entries of as many tokens"
        )
    size = cache.page_size
    has_means = not is_by_best_token(method)
    if isinstance(method, Hisa | BlockSparse) and has_means and method.block_size % size:
        raise ValueError(
            f"{call}: {method} with pages of {size} {_keys_of(method)}, wanted a block_size that is a multiple of them"
        )


def check_stripe(
    call: str,
    method: Method,
    cache: IndexCache,
    stripe: int | None,
    context_axis: str | None,
    candidates: CandidateBlocks | None,
) -> int:
    """Tokens in a row that one device has, by default a block or a page; raises unless they are whole ones."""
    unit = math.lcm(unit_of(method, candidates), cache.page_size) * method.entry_size
    if stripe is None:
        return unit
    if context_axis is None:
        raise ValueError(f"{call}: stripe={stripe} with context_axis=None, wanted the mesh axis that splits the pages")
    checks.integer(call, "stripe", stripe, 1)
    if stripe % unit:
        raise ValueError(f"{call}: stripe={stripe}, wanted a multiple of {unit}, of whole blocks or pages of {method}")
    return stripe


def check_question(call: str, q: Any, k: Any, method: Method) -> Keys:
    """The keys of a call that is only asked about: [B, T, H, D] and [B, S, D], or packed; shapes and dtypes do."""
    keys = keys_of(k)
    rows = ("T",) if len(getattr(q, "shape", ())) == 3 else ("B", "T")
    _axes_of_queries(call, q, rows, "D", or_abstract=True)
    _keys(call, q, keys, "N" if len(rows) == 1 else "S", or_abstract=True)
    check_method(call, method)
    return keys


def check_options(call: str, method: Method, return_scores: bool, return_blocks: bool, tiles: Tiles | None) -> None:
    """What is no array, in every form."""
    check_method(call, method)
    checks.flags(call, return_scores=return_scores, return_blocks=return_blocks)
    if return_blocks and isinstance(method, Dsa):
        raise ValueError(f"{call}: return_blocks=True with {method}: the flat indexer keeps no blocks")
    if tiles is not None:
        checks.instance(call, "tiles", tiles, Tiles, "Tiles")


def check_limits(
    call: str,
    q: Array,
    method: Method,
    candidates: CandidateBlocks | None,
    budget: Array | None,
    budget_of_all: tuple[int, ...],
) -> tuple[CandidateBlocks | None, Array | None]:
    """Candidates and budgets of queries [*rows, H, D], a row a query; `budget_of_all`: the shape of one for several."""
    rows, H = q.shape[:-2], q.shape[-2]
    if candidates is not None:
        checks.instance(call, "candidates", candidates, CandidateBlocks, "CandidateBlocks")
        checks.integer(call, "candidates.block_size", candidates.block_size, 1)
        if not isinstance(method, Dsa):
            raise ValueError(
                f"{call}: candidates with {method}, wanted a Dsa: they are found already, which is what a "
                f"{type(method).__name__} would do"
            )
        checks.dtype(call, "candidates.ids", candidates.ids, ("int32",))
        of_heads = (H,) if method.per_head and len(candidates.ids.shape) == len(rows) + 2 else ()
        checks.shape(call, "candidates.ids", candidates.ids, (*rows, *of_heads, "m"), "a list a query")
        if not candidates.ids.shape[-1]:
            raise ValueError(f"{call}: candidates.ids is {checks.axes_of(candidates.ids)}, wanted m of at least 1")
    if budget is not None:
        checks.dtype(call, "budget", budget, ("int32",))
        if budget.shape != budget_of_all:
            checks.shape(call, "budget", budget, rows, f"one a query, or {list(budget_of_all)} for all")
        budget = jnp.broadcast_to(budget, rows)
    return candidates, budget


def unit_of(method: Method, candidates: CandidateBlocks | None) -> int:
    """Keys that must lie on one device together."""
    if candidates is not None:
        return candidates.block_size
    return 1 if isinstance(method, Dsa) else method.block_size


def weights(q: Array, w: Array | None) -> Array:
    """Head weights, ones if there are none."""
    return jnp.ones(q.shape[:-1], jnp.float32) if w is None else w


def check_plain(call: str, method: Method) -> None:
    """Raises unless it is a method whose keys are tokens, for all heads together, as other programs have them."""
    check_method(call, method)
    if method.entry_size > 1 or method.per_head:
        raise ValueError(f"{call}: {method}, wanted one whose keys are tokens, for all heads together")


def check_method(call: str, method: Method) -> None:
    if not isinstance(method, Hisa | Dsa | BlockSparse | Scan):
        raise TypeError(f"{call}: method is {method!r}, wanted a Hisa, Dsa, BlockSparse or Scan")


def keys_of(k: Array | QuantizedKeys) -> Keys:
    return Keys(k.values, k.scales) if isinstance(k, QuantizedKeys) else Keys(k, None)


def _tokens_of(method: Method) -> str:
    return "keys" if method.entry_size == 1 else "tokens that entries"


def _keys_of(method: Method) -> str:
    return "tokens" if method.entry_size == 1 else "entries"


def _queries_and_keys(
    call: str, q: Array, k: Array | QuantizedKeys, w: Array | None, rows: Sequence[str], n_keys: str, method: Method
) -> Keys:
    keys = keys_of(k)
    _queries(call, q, w, rows, "D", method)
    _keys(call, q, keys, n_keys)
    _positions(call, "k", keys.values.shape[-2], method)
    return keys


def _positions(call: str, name: str, n_keys: int, method: Method) -> None:
    """Raises unless the positions of as many keys are int32."""
    if most_tokens(n_keys, method) > checks.INT32:
        raise ValueError(
            f"{call}: {name} has room for {n_keys} keys of {method.entry_size} tokens each, wanted at most "
            f"{checks.INT32} tokens, as positions are int32"
        )


def _queries(
    call: str, q: Array, w: Array | None, rows: Sequence[str], D: int | str, method: Method, why: str = ""
) -> None:
    """q [*rows, H, D] and w [*rows, H]."""
    if w is not None:
        checks.dtype(call, "w", w, ("float32",))
    _axes_of_queries(call, q, rows, D, why)
    if w is None:
        return
    if method.per_head:
        raise ValueError(f"{call}: w with {method}, wanted None: each head chooses by its own scores, without weights")
    checks.shape(call, "w", w, q.shape[:-1], f"one weight a query and head (q is {checks.axes_of(q)})")


def _axes_of_queries(
    call: str, q: Array, rows: Sequence[str], D: int | str, why: str = "", or_abstract: bool = False
) -> None:
    checks.dtype(call, "q", q, checks.KEY_DTYPES, or_abstract=or_abstract)
    checks.shape(call, "q", q, (*rows, "H", D), why)
    if 0 in q.shape[-2:]:
        raise ValueError(f"{call}: q is {checks.axes_of(q)}, wanted at least one head and one feature")


def _keys(call: str, q: Array, keys: Keys, n_keys: str, or_abstract: bool = False) -> None:
    """Keys [B, n_keys, D], or packed [n_keys, D], for queries of that B and D."""
    *sizes, _, _, D = q.shape
    if keys.scales is None:
        checks.dtype(call, "k", keys.values, checks.KEY_DTYPES, or_abstract=or_abstract)
    else:
        checks.dtype(call, "k.values", keys.values, ("float8_e4m3fn", "int8"), or_abstract=or_abstract)
        checks.dtype(call, "k.scales", keys.scales, ("float32",), or_abstract=or_abstract)
    must = "its first and last axes must equal q's B and D" if sizes else "its last axis must equal q's D"
    checks.shape(call, "k", keys.values, (*sizes, n_keys, D), f"{must} (q is {checks.axes_of(q)})")
    if keys.scales is not None:
        checks.shape(call, "k.scales", keys.scales, keys.values.shape[:-1], "one scale a key")
