"""The reference: plain NumPy float64, written from the contract (docs/contract.md), importing no JAX.

Slow and simple on purpose. Everything that JAX computes is compared with this and judged by `assert_same_selection`.
"""

from .compare import assert_same_selection
from .methods import OracleSelection, select, select_packed
from .quantize import dequantize, quantize_keys, quantize_queries
from .scores import block_means, token_scores
from .sparse_attention import sparse_attention
from .sparse_mla import sparse_mla

__all__ = [
    "OracleSelection",
    "assert_same_selection",
    "block_means",
    "dequantize",
    "quantize_keys",
    "quantize_queries",
    "select",
    "select_packed",
    "sparse_attention",
    "sparse_mla",
    "token_scores",
]
