"""Inputs for the tests, drawn with NumPy from fixed seeds so that the oracle and JAX get the same bits."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import hisa_jax as hj

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    w: np.ndarray


class Shape(NamedTuple):
    """B sequences, T queries each, S keys, H heads of D features."""

    B: int
    T: int
    S: int
    H: int
    D: int


# Why each is there.
SHAPES = {
    "one_token": Shape(1, 1, 1, 4, 32),  # the least there can be
    "one_query": Shape(2, 1, 300, 8, 64),  # decode
    "block_edge": Shape(1, 9, 256, 4, 32),  # S is a multiple of every block size used
    "ragged_tail": Shape(2, 13, 333, 3, 48),  # nothing divides anything
    "more_queries_than_a_tile": Shape(1, 37, 201, 2, 16),  # several tiles of queries, the last one partial
    "more_keys_than_a_tile": Shape(1, 3, 4500, 2, 16),  # two tiles of keys at the default size, the last one moved back
}
# Beside them, the head counts and sizes of real indexers and their edges, with few tokens.
HEADS = {"1": 1, "16": 16, "32": 32, "64": 64, "128": 128}
SIZES = {"16": 16, "64": 64, "128": 128, "256": 256}


def named(*names: str) -> list[tuple]:
    """For parameterized.named_parameters: each shape with its name."""
    return [(name, *SHAPES[name]) for name in names or SHAPES]


def inputs(B, T, S, H, D, *, dtype="float32", seed=0) -> Inputs:
    """Normal queries and keys; weights of both signs."""
    rng = np.random.default_rng(seed)
    q, k = (cast(rng.normal(size=shape), dtype) for shape in ((B, T, H, D), (B, S, D)))
    return Inputs(q, k, rng.normal(size=(B, T, H)).astype(np.float32))


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.round(x * 30).clip(-127, 127).astype(np.int8) if dtype == "int8" else x.astype(DTYPES[dtype])


def equal_scores(B, T, S, H, D) -> Inputs:
    """Every key the same, so that every token and every block ties with every other."""
    q, k, w = inputs(B, T, S, H, D)
    return Inputs(q, np.broadcast_to(k[:, :1], k.shape).copy(), w)


def few_scores(B, T, S, H, D, *, seed=0) -> Inputs:
    """Small whole numbers: scores are exact in every format, and most of them tie with many others."""
    rng = np.random.default_rng(seed)
    q, k = rng.integers(-1, 2, (B, T, H, D)), rng.integers(-1, 2, (B, S, D))
    return Inputs(*(x.astype(np.float32) for x in (q, k, rng.integers(-2, 3, (B, T, H)))))


def quantized(k: np.ndarray, dtype: str, scale: str) -> hj.QuantizedKeys:
    return hj.quantize_keys(jnp.asarray(k), jnp.dtype(dtype), scale)
