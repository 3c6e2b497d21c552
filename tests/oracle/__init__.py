"""Tests of the reference that the library ships, `hisa_jax.testing.oracle`; tests call it by this name."""

from hisa_jax.testing.oracle import (
    OracleSelection,
    assert_same_selection,
    block_means,
    dequantize,
    quantize_keys,
    quantize_queries,
    select,
    select_packed,
    sparse_mla,
    token_scores,
)

__all__ = [
    "OracleSelection",
    "assert_same_selection",
    "block_means",
    "dequantize",
    "quantize_keys",
    "quantize_queries",
    "select",
    "select_packed",
    "sparse_mla",
    "token_scores",
]
