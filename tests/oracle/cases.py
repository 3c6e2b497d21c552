"""What the tests of the oracle share: methods without JAX, and inputs whose answer can be seen."""

import dataclasses

import numpy as np


# The names and attributes of hisa_jax's methods, which the oracle reads without importing them.
@dataclasses.dataclass(frozen=True)
class Dsa:
    topk: int


@dataclasses.dataclass(frozen=True)
class Hisa:
    topk: int
    block_size: int = 128
    block_topk: int = 64
    keep_first: int = 1
    keep_last: int = 1
    block_ratio: int = 1


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    topk: int
    block_size: int = 128
    keep_first: int = 1
    keep_last: int = 1


@dataclasses.dataclass(frozen=True)
class Scan:
    topk: int
    candidates: int
    exact_heads: int = 0
    unit: int = 1
    slopes: str = "sampled"
    sketch: str | None = None
    keep_first: int = 1
    keep_last: int = 1


SCANS = [
    Scan(6, 12),
    Scan(6, 12, exact_heads=1),
    Scan(4, 8, unit=2),
    Scan(5, 8, unit=4, slopes="plain", keep_first=0, keep_last=2),
    Scan(6, 12, exact_heads=2, sketch="int4"),
]
RATIOS = [Hisa(3, 2, 5, block_ratio=3), Hisa(2, 1, 9, 2, 1, block_ratio=2)]
METHODS = [*SCANS, *RATIOS, Dsa(6), Hisa(6, 4, 3), Hisa(5, 2, 4, 0, 2), BlockSparse(12, 4), BlockSparse(8, 2, 2, 1)]


def draw(seed, B, T, S, H, D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(B, T, H, D)), rng.normal(size=(B, S, D)), rng.normal(size=(B, T, H))
    return [array.astype(dtype) for array in arrays]


def one_query(scores):
    """q, k, w of B = T = H = D = 1 whose token scores are `scores`, all at least 0."""
    return np.ones((1, 1, 1, 1)), np.array(scores, float).reshape(1, -1, 1), np.ones((1, 1, 1))


def chosen(selection, *at):
    return selection.indices[at][: selection.count[at]].tolist()
