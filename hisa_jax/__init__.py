"""Choosing tokens for sparse attention, in JAX. These are the public names; README.md shows how to use them."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  before what older ones cannot read: they would speak of syntax
    raise ImportError(
        f"hisa_jax needs Python 3.12 or newer, this is {sys.version.split()[0]}: make a virtual environment with one, "
        "python3.12 -m venv .venv"
    )

from hisa_jax.attention import sparse_mla, sparse_mla_paged
from hisa_jax.cache import append, copy_pages, init_cache, truncate
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.checks import checked
from hisa_jax.compare import Comparison, compare
from hisa_jax.index_cache import IndexCache
from hisa_jax.indexer_loss import indexer_kl
from hisa_jax.latents import QuantizedLatents, quantize_latents
from hisa_jax.lighthouse.attention import lighthouse_attention, lighthouse_select
from hisa_jax.lighthouse.method import Lighthouse
from hisa_jax.lighthouse.selection import LighthouseSelection
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.quantize import QuantizedKeys, quantize_keys, quantize_queries
from hisa_jax.select import implementations, select, select_packed
from hisa_jax.select_paged import select_paged
from hisa_jax.selection import Selection
from hisa_jax.sharded.processes import check_processes
from hisa_jax.sparse_attention import sparse_attention, sparse_attention_paged
from hisa_jax.xla.select import Tiles

__all__ = [
    "BlockSparse",
    "CandidateBlocks",
    "Comparison",
    "Dsa",
    "Hisa",
    "IndexCache",
    "Lighthouse",
    "LighthouseSelection",
    "Method",
    "QuantizedKeys",
    "QuantizedLatents",
    "Scan",
    "Selection",
    "Tiles",
    "append",
    "check_processes",
    "checked",
    "compare",
    "copy_pages",
    "implementations",
    "indexer_kl",
    "init_cache",
    "lighthouse_attention",
    "lighthouse_select",
    "quantize_keys",
    "quantize_latents",
    "quantize_queries",
    "select",
    "select_packed",
    "select_paged",
    "sparse_attention",
    "sparse_attention_paged",
    "sparse_mla",
    "sparse_mla_paged",
    "truncate",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """The public names alone: folders and what files import stay out of completion."""
    return __all__
