"""Hierarchical indexing for sparse attention in JAX. These are the public names; README.md shows how to use them."""

from hisa_jax.append import append
from hisa_jax.attention import sparse_mla
from hisa_jax.cache import IndexCache, copy_pages, init_cache, truncate
from hisa_jax.checks import checked
from hisa_jax.compare import Comparison, compare
from hisa_jax.indexer_loss import indexer_kl
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.quantize import QuantizedKeys, quantize_keys, quantize_queries
from hisa_jax.select import implementations, select
from hisa_jax.select_packed import select_packed
from hisa_jax.select_paged import select_paged, sparse_mla_paged
from hisa_jax.selection import Selection
from hisa_jax.sharded.attention import sparse_mla_sharded
from hisa_jax.sharded.cache import append_sharded, copy_pages_sharded, truncate_sharded
from hisa_jax.sharded.processes import check_processes
from hisa_jax.sharded.select import select_sharded
from hisa_jax.sharded.select_paged import select_paged_sharded, sparse_mla_paged_sharded
from hisa_jax.xla.select import Tiles

__all__ = [
    "BlockSparse",
    "Comparison",
    "Dsa",
    "Hisa",
    "IndexCache",
    "Method",
    "QuantizedKeys",
    "Scan",
    "Selection",
    "Tiles",
    "append",
    "append_sharded",
    "check_processes",
    "checked",
    "compare",
    "copy_pages",
    "copy_pages_sharded",
    "implementations",
    "indexer_kl",
    "init_cache",
    "quantize_keys",
    "quantize_queries",
    "select",
    "select_packed",
    "select_paged",
    "select_paged_sharded",
    "select_sharded",
    "sparse_mla",
    "sparse_mla_paged",
    "sparse_mla_paged_sharded",
    "sparse_mla_sharded",
    "truncate",
    "truncate_sharded",
]
__version__ = "0.1.0"
