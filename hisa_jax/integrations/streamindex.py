"""streamindex_topk, the call by which tpu-inference and sglang-jax choose tokens, on their pages.

tpu-inference: tpu_inference/kernels/experimental/deepseek_v4/indexer/streamindex_topk.py. sglang-jax has taken it over
as sgl_jax/srt/kernels/dsa/streamindex_topk.py, with pages of bfloat16 besides. Neither is imported here.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax import checks, dispatch
from hisa_jax.check_select import check_paged, check_plain
from hisa_jax.index_cache import MAX_PAGE_SIZE, IndexCache, has_all_pages
from hisa_jax.integrations import records
from hisa_jax.layout import Call, ascending, sequence_of_rows
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.select_paged import check_pages
from hisa_jax.selection import Selection, nothing
from hisa_jax.sharded import varying

_TILE_SIZES = ("num_kv_pages_per_block", "num_queries_per_block", "vmem_limit_bytes", "decode_req_batch_size")


@functools.partial(jax.jit, static_argnames=("k", "compression_ratio", "method", "implementation", *_TILE_SIZES))
def streamindex_topk(
    q: Array,
    indexer_weights: Array,
    cache_kv: Array | IndexCache,
    seq_lens: Array,
    page_indices: Array,
    cu_q_lens: Array,
    distribution: Array | Sequence[int],
    *,
    k: int,
    compression_ratio: int,
    num_kv_pages_per_block: Any = None,
    num_queries_per_block: Any = None,
    vmem_limit_bytes: Any = None,
    decode_req_batch_size: Any = None,
    method: Method | None = None,
    implementation: str = "auto",
) -> Array:
    """Chooses entries for a batch of requests, as the function of this name in tpu-inference and sglang-jax does.

    An entry is a key in the pages; it stands for `compression_ratio` tokens. Query t at position p of a request sees
    entry s if s * compression_ratio <= p and s < its tokens // compression_ratio.

    Args:
        q: [T, H, D] index queries of all requests, one request's after the other's, float32, bfloat16 or float8_e4m3fn.
        indexer_weights: [T, H] float32 or bfloat16, every scale factor in them, that of quantised queries too.
        cache_kv: all pages, uint8 or bfloat16 (records.py has the layouts); or an `IndexCache`, which need not be made
            anew in each call.
        seq_lens: [S] int32, tokens of each request, those of its queries among them.
        page_indices: [S * P] int32, the pages of each request in order, P of each.
        cu_q_lens: [S + 1] int32, where each request's queries begin.
        distribution: [3] int32; the last is how many requests there are, the others are ignored.
        k: entries chosen for each query.
        compression_ratio: tokens of an entry.
        num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, decode_req_batch_size: tile sizes of the hosts'
            kernel, taken so that the call is the same, and not used.
        method: `Hisa`, `Scan`, `BlockSparse` or `Dsa` of topk = k; None: `Dsa(topk=k)`, which chooses what they do.
        implementation: as for `select`.

    Returns: [T, k] int32, entries of the request in ascending order, then -1.
    Raises: TypeError, ValueError: arguments that are not these.
    Example: docs/integrations.md.
    """
    batch = Batch(seq_lens, page_indices, cu_q_lens, distribution, compression_ratio)
    return select("streamindex_topk", q, indexer_weights, cache_kv, batch, k, method, implementation).indices


class Batch(NamedTuple):
    """The requests of a call: its arguments of these names, and `ratio` for its compression_ratio."""

    seq_lens: Array
    page_indices: Array
    cu_q_lens: Array
    distribution: Array | Sequence[int]
    ratio: int

    def check(self, call: str) -> None:
        """Raises TypeError, ValueError unless the arrays fit each other."""
        checks.int32(call, "seq_lens", self.seq_lens, ("S",))
        (S,) = self.seq_lens.shape
        checks.int32(call, "page_indices", self.page_indices, ("S * P",), "a flat table, P pages a request")
        if not S:
            raise ValueError(f"{call}: seq_lens is [0], wanted one request or more")
        if self.page_indices.shape[0] % S:
            n = self.page_indices.shape[0]
            raise ValueError(f"{call}: page_indices is [{n}], wanted a multiple of the {S} requests of seq_lens")
        checks.int32(call, "cu_q_lens", self.cu_q_lens, (S + 1,), "a start for each request of seq_lens, and the end")
        checks.integer(call, "compression_ratio", self.ratio, 1)
        if not isinstance(self.distribution, list | tuple):
            checks.int32(call, "distribution", self.distribution, (3,))
        elif len(self.distribution) != 3:
            raise ValueError(f"{call}: distribution has {len(self.distribution)} numbers, wanted 3")

    @property
    def table(self) -> Array:
        """[S, P] int32."""
        return self.page_indices.reshape(self.seq_lens.shape[0], -1)

    @property
    def n_requests(self) -> Array:
        return jnp.clip(jnp.asarray(self.distribution[2], jnp.int32), 0, self.seq_lens.shape[0])

    @property
    def lengths(self) -> Array:
        """[S] int32, entries of each request; of what comes after the last request none."""
        is_real = jnp.arange(self.seq_lens.shape[0], dtype=jnp.int32) < self.n_requests
        return jnp.where(is_real, self.seq_lens // self.ratio, 0)

    def offsets(self, T: int) -> Array:
        """[S + 1] int32, where queries of requests begin, ascending; those after the last request have none."""
        index = jnp.arange(self.cu_q_lens.shape[0], dtype=jnp.int32)
        return ascending(self.cu_q_lens[jnp.minimum(index, self.n_requests)], T)

    def visible(self, T: int) -> Array:
        """[T] int32, entries that each query sees."""
        offsets = self.offsets(T)
        r, is_real = sequence_of_rows(offsets, T)
        positions = self.seq_lens[r] - (offsets[r + 1] - jnp.arange(T, dtype=jnp.int32))
        seen = jnp.minimum(positions // self.ratio + 1, self.lengths[r])
        return jnp.where(is_real, jnp.maximum(seen, 0), 0)


def index_cache(
    cache_kv: Array,
    block_tables: Array,
    lengths: Array,
    *,
    D: int,
    method: Method | None = None,
    dtype: str | None = None,
    kv_layout: str = "head_along_sublane",
) -> tuple[IndexCache, Array]:
    """Reads a host's pages into an `IndexCache`: what every call with such pages does, for a server to do once.

    Args:
        cache_kv: all pages, in one of the layouts of records.py.
        block_tables: [S, P] int32, the pages of each request in order; `lengths`: [S] int32, entries in them.
        D: numbers of a key.
        method: pages are cut so that its blocks are whole pages; None: as for `Dsa`.
        dtype: of the keys. None: as they lie there, e4m3 with scales or bfloat16. "bfloat16": e4m3 times its scale,
            exactly unless it is below 2**-126.
        kv_layout: "head_along_sublane" or "seq_along_lane".

    Returns: the cache; [S, P * n] int32, the tables of its pages: one of more than 256 entries, or of more than a
        block, is n pages.
    Raises: TypeError, ValueError: as `IndexCache.from_pages`; pages that are not of this layout; a D that is no int of
        at least 1; no method.
    """
    checks.integer("index_cache", "D", D, 1)
    if method is not None:
        check_plain("index_cache", method)
    return _index_cache("index_cache", cache_kv, block_tables, lengths, D, method, dtype, kv_layout)


def _index_cache(
    call: str, cache_kv: Array, block_tables: Array, lengths: Array, D: int, method: Method | None, dtype: str | None,
    kv_layout: str,
) -> tuple[IndexCache, Array]:  # fmt: skip
    layout = records.check_layout(call, kv_layout)
    size = records.page_size(call, cache_kv, D, layout)
    checks.int32(call, "block_tables", block_tables, ("S", "P"), "a flat table is block_tables.reshape(S, -1)")
    values, scales = records.read(cache_kv, D, layout)
    if dtype is not None:
        checks.one_dtype(call, "dtype", dtype, ("bfloat16",))
        if scales is not None:
            values, scales = values.astype(jnp.bfloat16) * scales.astype(jnp.bfloat16)[..., None], None
    block = method.block_size if isinstance(method, Hisa | BlockSparse) else MAX_PAGE_SIZE
    new_size = math.gcd(size, block, MAX_PAGE_SIZE)
    n = size // new_size
    parts = jnp.arange(n, dtype=jnp.int32)[None, None]
    # A number that is no page stays one.
    is_page = (block_tables >= 0) & (block_tables < values.shape[0])
    table = jnp.where(is_page[..., None], block_tables[..., None] * n + parts, -1).reshape(block_tables.shape[0], -1)
    values = values.reshape(-1, new_size, D)
    keys = values if scales is None else QuantizedKeys(values, scales.reshape(-1, new_size))
    return IndexCache.from_pages(keys, table, lengths), table


def select(
    call: str,
    q: Array,
    weights: Array,
    cache_kv: Array | IndexCache,
    batch: Batch,
    k: int,
    method: Method | None,
    implementation: str,
    *,
    kv_layout: str = "head_along_sublane",
    own: Callable[[Array], Array] = lambda n: n,
    return_scores: bool = False,
) -> Selection:
    """The selection by a host's call of this name, whose arguments are checked here.

    Args:
        own: of the first n entries of a request, how many this device has; they are its first ones there.
    """
    checks.dtype(call, "indexer_weights", weights, ("float32", "bfloat16"))
    checks.dtype(call, "q", q, checks.KEY_DTYPES)
    checks.shape(call, "q", q, ("T", "H", "D"))
    (T, _, D) = q.shape
    checks.shape(call, "indexer_weights", weights, q.shape[:2], f"one a query and head (q is {checks.axes_of(q)})")
    batch.check(call)
    checks.integer(call, "k", k, 1)
    method = Dsa(topk=k) if method is None else method
    check_plain(call, method)
    if method.topk != k:
        raise ValueError(f"{call}: k={k} with {method}, wanted a method of topk={k}")

    table, lengths, offsets = batch.table, own(batch.lengths), batch.offsets(T)
    if isinstance(cache_kv, IndexCache):
        cache = cache_kv
    else:
        # Kernels take queries and keys of one dtype.
        dtype = "bfloat16" if q.dtype == jnp.bfloat16 else None
        cache, table = _index_cache(call, cache_kv, table, lengths, D, method, dtype, kv_layout)
    operands = q, weights.astype(jnp.float32), cache, table, offsets, lengths
    check_paged(call, *operands, method)
    problem = dispatch.Problem.of_pages(q, cache, table, method, is_split=False)
    options: Any = dict(return_scores=return_scores, return_blocks=False)
    name = dispatch.choose_select(call, problem, implementation, None, **options)
    if 0 in (T, *table.shape):
        return nothing((T,), method, return_scores, False)
    has_pages = has_all_pages(cache, table, lengths)
    check_pages(call, has_pages, cache.n_pages)
    offsets = ascending(offsets, T)
    # It may not fall from one query of a request to the next: kernels read as far as the last one sees.
    r, is_real = sequence_of_rows(offsets, T)
    visible = jnp.where(is_real & has_pages[r], own(batch.visible(T)), 0)
    paged = Call(q=q, w=operands[1], visible=visible, query_offsets=offsets, table=table, cache=cache)
    run = dispatch.IMPLEMENTATIONS[name].select
    return run(varying.constants(paged), method, dispatch.default_tiles(), **options)
