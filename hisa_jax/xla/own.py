"""Functions of the caller's own in the place of formulas: what `Hisa(pool=, block_score=, token_score=)` names.

They stand at the three places where a method has a formula, and nowhere else: tiles, visibility, ties and the top-k
stay the library's. So whatever such a function returns, the contract holds, with its scores in the indexer's place.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import Keys, Sequence
from hisa_jax.methods import BlockSparse, Hisa, Method, name_of
from hisa_jax.sharded import varying
from hisa_jax.xla.rounding import widened

Score = Callable[..., Array]  # (query, keys, weights): [H, D], s keys, [H] -> [s] float32
_BLOCKS = 32  # pooled at a time: their keys are gathered


def score_of(method: Method, name: str, default: Score) -> Score:
    """The method's function of this name, as the stages call a score; if it has none, `default` by its activation."""
    function = getattr(method, name, None)
    if function is None:
        return default if method.activation else functools.partial(default, activation=None)

    def score(q: Array, keys: Keys, w: Array) -> Array:
        values = _values(keys)
        what = f"for q [{', '.join(map(str, q.shape))}] and keys [{', '.join(map(str, values.shape))}]"
        scores = function(widened(q), values, w)
        scores = _floats(method, name, scores, (values.shape[0],), f"{what}, wanted [{values.shape[0]}] floats")
        return varying.like(scores, q, values, w)

    return score


class Pooled(NamedTuple):
    """What stands for each block of a sequence by `method.pool`, made when it is read.

    A block that is not full, or not there, gives anything. None such is chosen for its score: a query's last block,
    which alone can be partial, is always kept.

    Attributes: `sequence`, the keys; `max_keys`, how many blocks there are at most.
    """

    sequence: Sequence
    method: Hisa | BlockSparse
    max_keys: int

    def rows(self, positions: Array) -> Keys:
        method, pool, block_size = self.method, self.method.pool, self.method.block_size
        assert pool is not None

        def one(block_id: Array) -> Array:
            keys = _values(self.sequence.rows(block_id * block_size + jnp.arange(block_size, dtype=jnp.int32)))
            # One's own score takes any number of features, the indexer's multiplies them with queries.
            E: Any = "E" if method.block_score else keys.shape[1]
            what = f"for keys [{block_size}, {keys.shape[1]}], wanted [{E}] floats"
            return _floats(method, "pool", pool(keys), (E,), what)

        block_ids = positions.reshape(-1)
        pooled = lax.map(one, block_ids, batch_size=min(_BLOCKS, block_ids.shape[0]))
        return Keys(pooled.reshape(*positions.shape, -1), None)

    def tile(self, start: Array, size: int) -> tuple[Keys, Array]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        return self.rows(positions), positions


def _values(keys: Keys) -> Array:
    """[s, D] float32, dequantised."""
    return keys.dequantised(jnp.ones(keys.values.shape[:-1], bool))


def _floats(method: Method, name: str, given: Any, wanted: tuple[int | str, ...], what: str) -> Array:
    """What a function gave, as float32. Raises ValueError unless it has the wanted shape, a str for any, and floats."""
    call = f"{type(method).__name__}({name}={name_of(getattr(method, name))})"
    if not hasattr(given, "dtype") and not isinstance(given, float):
        raise ValueError(f"{call}: gave {type(given).__name__} {what}")
    shape, dtype = jnp.shape(given), jnp.result_type(given)
    fits = len(shape) == len(wanted) and all(b in (a, "E") for a, b in zip(shape, wanted, strict=True))
    if not fits or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{call}: gave {dtype.name} {list(shape)} {what}")
    return jnp.asarray(given, jnp.float32)
