"""What the GPU kernels that score take: queries, keys, and which of them go together."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.kernels_pallas.pages import Pages

_STATIC = {"static": True}


class Operands(NamedTuple):
    """Queries and keys of all sequences, in flat arrays.

    Attributes:
        q: [T, H, D] in the dtype of the keys.
        w: [T, H] float32 head weights.
        k: [S, D], or [S, parts, D] where a key is the sum of several parts (block means).
        k_scale: [S] float32; None where every scale is 1.
        pages: where the rows of all sequences are in k; None: one sequence after the other.
    """

    q: Array
    w: Array
    k: Array
    k_scale: Array | None
    pages: Pages | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which keys of its sequence each query is scored against: the columns of the result.

    Attributes:
        limit: [T] int32, candidates of each query. Columns at or beyond are `INVISIBLE` or, beyond its whole tile, not
            written.
        n: how many columns are wanted; a kernel may add some.
        tiles: [n_tiles, 4] int32, which queries and keys go together: see `Sequences.query_tiles`.
        first: [1] int32: column c of the result is candidate first + c. Default: 0.
        keep_first, keep_last: that many first and last candidates of each query are `FORCED`.
        threshold: [T] int32; None: every sort key is written. Otherwise only those above it are.
    """

    limit: Array
    n: int = dataclasses.field(metadata=_STATIC)
    tiles: Array | None = None
    first: Array = dataclasses.field(default_factory=lambda: jnp.zeros((1,), jnp.int32))
    keep_first: int = dataclasses.field(default=0, metadata=_STATIC)
    keep_last: int = dataclasses.field(default=0, metadata=_STATIC)
    threshold: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyBlocks:
    """The block means of all sequences, not yet taken.

    Attributes:
        k: [S, D]; k_scale: [S] float32, or None where every scale is 1. Sequences begin with a block.
        counts: [S // size] int32, tokens present in each block, the first ones.
        size: tokens of a block.
    """

    k: Array
    k_scale: Array | None
    counts: Array | np.ndarray
    size: int = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptBlocks:
    """The blocks whose tokens each query is scored against.

    Attributes:
        ids: [T, m] int32, blocks of the query's sequence, ascending, then -1.
        visible: [T] int32, tokens of its sequence that the query sees.
        first: [T] int32, where the query's sequence begins among the rows of all, in blocks.
        size: tokens of a block.
        count: [T] int32, how many of them are real, where that is known without looking.
        sequence: [T] int32 or None, which sequence each query is of, of padding any number. If it is there, `first` is
            min(sequence, n_sequences - 1) * apart, which a kernel can work out by itself.
        n_sequences, apart: how many sequences, and how many blocks from one to the next.
    """

    ids: Array
    visible: Array
    first: Array
    size: int = dataclasses.field(metadata=_STATIC)
    count: Array | None = None
    sequence: Array | None = None
    n_sequences: int = dataclasses.field(default=1, metadata=_STATIC)
    apart: int = dataclasses.field(default=1, metadata=_STATIC)

    @property
    def n_real(self) -> Array:
        """[T] int32."""
        return jnp.sum(self.ids >= 0, axis=1, dtype=jnp.int32) if self.count is None else self.count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanHeads:
    """What each query scans with: the scan score of a key is k_scale * sum_r w[t, r] * f_r(q[t, r] . k).

    Attributes:
        q: [T, R, D] in the dtype of the keys; R is 2, 4, 8 or 16.
        w: [T, R] float32.
        n_linear: f_r of the first so many rows, which are the virtual head, is the identity; of the others relu.
        n: rows that count. Those from here on are zeros and are left out, since 0 times infinity is NaN.
    """

    q: Array
    w: Array
    n_linear: int = dataclasses.field(metadata=_STATIC)
    n: int = dataclasses.field(metadata=_STATIC)
