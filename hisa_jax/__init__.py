"""Hierarchical indexing for sparse attention in JAX. These are the public names; README.md shows how to use them."""

from hisa_jax.checks import checked
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method
from hisa_jax.quality import Comparison, compare
from hisa_jax.quantize import QuantizedKeys, quantize_keys, quantize_queries
from hisa_jax.select import implementations, select, select_packed
from hisa_jax.selection import Selection
from hisa_jax.sparse_mla import sparse_mla
from hisa_jax.xla import Tiles

__all__ = [
    "BlockSparse",
    "Comparison",
    "Dsa",
    "Hisa",
    "Method",
    "QuantizedKeys",
    "Selection",
    "Tiles",
    "checked",
    "compare",
    "implementations",
    "quantize_keys",
    "quantize_queries",
    "select",
    "select_packed",
    "sparse_mla",
]
__version__ = "0.1.0"
