"""Values that find faults: ties, cuts one bit apart, clustered blocks, extremes, NaN and infinity; edges of lengths."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bench.fuzz.scene import Array, Scene
from bench.fuzz.setups import Setup
from hisa_jax.methods import Dsa, least_blocks
from tests import oracle

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
}
# One unit in the last place of numbers from 1 on, of 100 in int8.
_ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float8_e4m3fn": 2.0**-3, "int8": 0.01}
Rng = np.random.Generator


class Values(NamedTuple):
    """float64 [R, T, H, D], [R, S, D], [R, T, H]; whether scores of tokens and of whole blocks are exact in float32."""

    q: Array
    k: Array
    w: Array
    exact_tokens: bool = False
    exact_blocks: bool = False


def scene(setup: Setup, seed: int) -> Scene:
    """The same for the same setup and seed."""
    rng = np.random.default_rng(seed)
    data = str(rng.choice(list(KINDS)))
    values = KINDS[data](setup, rng)
    if rng.random() < 0.2:
        values, data = values._replace(w=-np.abs(values.w)), data + ", weights negative"
    q, k = _cast(values.q, setup.q_dtype), values.k
    w, scales = values.w.astype(np.float32), None
    exact_tokens, exact_blocks = values.exact_tokens, values.exact_blocks
    if setup.scale is None:
        k = _cast(k, setup.k_dtype)
    elif exact_tokens and rng.random() < 0.7:
        k, scales = _cast(k, setup.k_dtype), (2.0 ** rng.integers(-1, 2, k.shape[:2])).astype(np.float32)
    else:
        k, scales = oracle.quantize_keys(k, setup.k_dtype, setup.scale)
        exact_tokens = exact_blocks = False
    block_size = getattr(setup.method, "block_size", 1)
    exact_blocks &= block_size & (block_size - 1) == 0 and block_size <= 32
    # Infinity times what float32 may take for 0 is not promised.
    if rng.random() < 0.3 and data.split(",")[0] != "denormals":
        what = str(rng.choice(["k", "k", "k", "q", "w", "scales"]))
        array = {"q": q, "k": k, "w": w, "scales": scales}[what]
        if array is not None and array.dtype != np.int8:
            _sprinkle(array, rng)
            if what == "scales" and setup.implementation != "xla":
                array[np.isinf(array)] = np.nan  # of means of e4m3, which kernels keep, none is infinite
            data += f", NaN and infinity in {what}"
    n_k = np.array([_length(setup, rng) for _ in range(setup.R)], np.int32)
    n_q = np.minimum([_some(setup.T, rng) for _ in n_k], setup.T).astype(np.int32)
    positions = None
    if rng.random() < 0.2:
        positions = rng.integers(-1, setup.S + 3, (setup.R, setup.T)).astype(np.int32)
        positions[rng.random(positions.shape) < 0.1] = rng.choice([-(2**31), -5, -1, 2**31 - 1])
        n_k[rng.random(setup.R) < 0.1] = rng.choice([-3, setup.S + 7, 2**31 - 1])
    return Scene(
        setup=setup, seed=int(rng.integers(2**31)), data=data, q=q, k=k, scales=scales, w=w, n_q=n_q, n_k=n_k,
        positions=positions, exact_tokens=exact_tokens, exact_blocks=exact_blocks,
    )  # fmt: skip


def _cast(x: Array, dtype: str) -> Array:
    if dtype == "int8":
        whole = np.all(x == np.rint(x))
        return np.rint(x if whole else x * 100).clip(-127, 127).astype(np.int8)
    limit = 448 if dtype == "float8_e4m3fn" else np.inf
    return x.clip(-limit, limit).astype(DTYPES[dtype])


def _shapes(setup: Setup) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    R, T, S, H, D = setup.R, setup.T, setup.S, setup.H, setup.D
    return (R, T, H, D), (R, S, D), (R, T, H)


def normal(setup: Setup, rng: Rng) -> Values:
    q, k, w = (rng.normal(size=shape) for shape in _shapes(setup))
    return Values(q, k, w)


def few_values(setup: Setup, rng: Rng) -> Values:
    """Small whole numbers: most scores tie with many others, exactly in every dtype."""
    q, k, w = _shapes(setup)
    high = int(rng.integers(1, 3))
    # Few features that are not 0 make few scores.
    is_there = rng.random(setup.D) < rng.choice([1.0, 0.3])
    return Values(
        rng.integers(-1, 2, q) * is_there, rng.integers(-high, high + 1, k), rng.integers(-2, 3, w), True, True
    )


def equal_keys(setup: Setup, rng: Rng) -> Values:
    q, k, w = normal(setup, rng)[:3]
    return Values(q, np.broadcast_to(k[:, :1], k.shape).copy(), w)


def zeros(setup: Setup, rng: Rng) -> Values:
    """All of the keys, queries or weights 0: every score is 0 or -0."""
    q, k, w = few_values(setup, rng)[:3]
    which = rng.integers(3)
    return Values(q * (which != 0), k * (which != 1), w * (which != 2), True, True)


def closed(setup: Setup, rng: Rng) -> Values:
    """Nearly all products negative: scores 0 and -0, a few others on either side of them."""
    q, k, w = _shapes(setup)
    keys = -rng.integers(0, 2, k)
    open_ones = rng.random(k[:2]) < 0.05
    keys[open_ones] = 1
    return Values(rng.integers(0, 2, q), keys, rng.choice([-1, 1], w), True, True)


def repeated_keys(setup: Setup, rng: Rng) -> Values:
    """A few keys again and again: ties of scores that are not whole numbers."""
    q, k, w = normal(setup, rng)[:3]
    which = rng.integers(0, rng.integers(2, 12), k.shape[:2])
    return Values(q, np.take_along_axis(k, which[..., None], axis=1), w)


def repeated_blocks(setup: Setup, rng: Rng) -> Values:
    """Blocks that are copies of a few: their means tie."""
    q, k, w = normal(setup, rng)[:3]
    n = -(-setup.S // setup.unit)
    which = rng.integers(0, min(n, 4), (setup.R, n))
    rows = (which[..., None] * setup.unit + np.arange(setup.unit)).reshape(setup.R, -1)[:, : setup.S]
    return Values(q, np.take_along_axis(k, np.minimum(rows, setup.S - 1)[..., None], axis=1), w)


def one_bit_apart(setup: Setup, rng: Rng) -> Values:
    """One head and feature count, whose scores are neighbours in the keys' dtype: the threshold is one bit wide."""
    q, k, w = (np.zeros(shape) for shape in _shapes(setup))
    head, feature = rng.integers(setup.H), rng.integers(setup.D)
    q[:, :, head, feature] = 1
    w[:, :, head] = rng.choice([-1, 1])
    steps = rng.integers(0, rng.integers(2, 6), k.shape[:2])
    k = rng.integers(-1, 2, k.shape).astype(float)
    k[:, :, feature] = 1 + steps * _ULP[setup.k_dtype]
    if setup.k_dtype == "int8":
        k[:, :, feature] = 100 + steps
    return Values(q, k, w, exact_tokens=True)


def clustered(setup: Setup, rng: Rng) -> Values:
    """Blocks of like keys, the best of them near each other."""
    q, k, w = normal(setup, rng)[:3]
    n = -(-setup.S // setup.unit)
    centres = rng.normal(size=(setup.R, n, setup.D))
    return Values(q, centres.repeat(setup.unit, axis=1)[:, : setup.S] + rng.choice([0.01, 0.3]) * k, np.abs(w))


def magnitudes(setup: Setup, rng: Rng) -> Values:
    """Keys, queries and weights that are huge and tiny beside each other."""
    q, k, w = normal(setup, rng)[:3]
    low, high = (-5, 7) if setup.scale or setup.k_dtype in ("float32", "bfloat16") else (-2, 2)
    return Values(
        q * 10.0 ** rng.integers(-2, 3, (*q.shape[:2], 1, 1)),
        k * 10.0 ** rng.integers(low, high, (*k.shape[:2], 1)),
        w * 10.0 ** rng.integers(-3, 4, (*w.shape[:2], 1)),
    )


def denormals(setup: Setup, rng: Rng) -> Values:
    """Some keys so small that float32 has fewer digits for them, or none."""
    q, k, w = normal(setup, rng)[:3]
    tiny = rng.random(k.shape[:2]) < 0.5
    return Values(q, np.where(tiny[..., None], k * 1e-40, k), w)


KINDS: dict[str, Callable[[Setup, Rng], Values]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        normal, few_values, equal_keys, zeros, closed, repeated_keys, repeated_blocks, one_bit_apart, clustered,
        magnitudes, denormals,
    )
}  # fmt: skip


def _sprinkle(array: Any, rng: Rng) -> None:
    """NaN and infinity in a few or in many rows, whole rows or single numbers; in place."""
    rows = rng.random(array.shape[:2]) < rng.choice([0.01, 0.1, 0.9])
    value = np.asarray(rng.choice([np.nan, np.inf, -np.inf])).astype(array.dtype)
    if array.ndim > 2 and rng.random() < 0.5:
        array[rows, ..., int(rng.integers(array.shape[-1]))] = value
    else:
        array[rows] = value


def _length(setup: Setup, rng: Rng) -> int:
    """Keys of a request: nothing, one, edges of blocks, pages and budgets and their neighbours, or any number."""
    method, S = setup.method, setup.S
    edges = [
        0,
        1,
        S,
        S - 1,
        method.topk,
        (setup.page_size or 16) * int(rng.integers(1, 5)),
        setup.unit * int(rng.integers(1, 7)),
    ]
    edges.append(setup.unit if isinstance(method, Dsa) else least_blocks(method) * method.block_size)
    length = int(rng.choice(edges)) + int(rng.integers(-1, 2)) if rng.random() < 0.6 else int(rng.integers(S + 1))
    return min(max(length, 0), S)


def _some(T: int, rng: Rng) -> int:
    return int(rng.choice([0, 1, 2, T, T, T, int(rng.integers(T + 1))]))
