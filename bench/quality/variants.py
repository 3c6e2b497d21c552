"""What the quality report compares: selections that replace the flat indexer's in a trained model, as values."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

import hisa_jax as hj
from hisa_jax.methods import flat_of

KeyDtype = Literal["float8_e4m3fn", "int8"]
_LAST = 512  # queries: a chunk of prefill
FLAT, HISA, SCAN, BLOCK_SPARSE = "flat", "HISA", "scan", "block-sparse"
HISA_AWARE = "HISA-aware indexer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How each layer of a model selects.

    Attributes:
        name: in tables.
        method: what selects.
        flat_layers: layers that keep the flat indexer.
        flat_last: queries at the end that keep the flat indexer.
        key_dtype: of index keys and queries, None for the model's own. Pooled keys are means of the quantised ones.
    """

    name: str
    method: hj.Method
    flat_layers: tuple[int, ...] = ()
    flat_last: int = 0
    key_dtype: KeyDtype | None = None

    def at(self, layer: int) -> "Variant":
        """The same for one layer, so that layers that select alike are compiled once."""
        method = flat_of(self.method) if layer in self.flat_layers else self.method
        return dataclasses.replace(self, name="", method=method, flat_layers=())

    def takes_all(self, n_tokens: int) -> bool:
        """Whether every query attends to all tokens up to its own: then nothing needs scoring."""
        return isinstance(self.method, hj.Dsa) and self.method.topk >= n_tokens

    def select(self, q: Array, k: Array, w: Array, **options: Any) -> hj.Selection:
        """[B, T, H, D], [B, S, D], [B, T, H] -> the selection of one layer, `flat_last` left aside.

        Options are those of `hj.select`.
        """
        keys: Array | hj.QuantizedKeys = k
        if self.key_dtype is not None:
            dtype = jnp.dtype(self.key_dtype)
            keys, (q, w) = hj.quantize_keys(k, dtype), hj.quantize_queries(q, w, dtype)
        return hj.select(q, keys, w, self.method, **options)


def main_variants(topk: int, block_size: int, block_topk: int) -> tuple[Variant, ...]:
    """Flat, HISA, scan and block-sparse at the same number of selected tokens, the flat one first."""
    return (
        Variant(name=FLAT, method=hj.Dsa(topk=topk)),
        Variant(name=HISA, method=hj.Hisa(topk=topk, block_size=block_size, block_topk=block_topk)),
        Variant(name=SCAN, method=hj.Scan(topk=topk)),
        Variant(name=BLOCK_SPARSE, method=hj.BlockSparse(topk=topk, block_size=block_size)),
    )


def scans(topk: int) -> tuple[Variant, ...]:
    """The scan with one thing changed at a time, as it is in `main_variants` first: `hj.Scan()` at this topk."""
    more = (
        Variant(name=f"{times:g} k candidates", method=hj.Scan(topk=topk, candidates=math.ceil(times * topk)))
        for times in (1.5, 2.0, 3.0)
    )
    return (
        Variant(name=SCAN, method=hj.Scan(topk=topk)),
        *more,
        Variant(name="one virtual head", method=hj.Scan(topk=topk, exact_heads=0)),
        Variant(name="one virtual head, 2 k candidates", method=hj.Scan(topk=topk, candidates=2 * topk, exact_heads=0)),
        Variant(name="plain slopes", method=hj.Scan(topk=topk, slopes="plain")),
        Variant(name="4 bits of each key", method=hj.Scan(topk=topk, sketch="int4")),
        *(
            Variant(
                name=f"units of {unit}, 4 k candidates",
                method=hj.Scan(topk=topk, candidates=-(-4 * topk // unit) * unit, unit=unit),
            )
            for unit in (8, 32)
        ),
    )


def ablations(topk: int, block_size: int, block_topk: int) -> tuple[Variant, ...]:
    """HISA with one thing changed at a time, plain HISA first.

    Block sizes change at the same number of candidates, block_size * block_topk, numbers of blocks at the same block
    size. Those that cannot hold `topk` tokens or the blocks always kept are left out.
    """
    candidates = block_size * block_topk
    by_size = [(size, candidates // size) for size in (block_size // 2, 2 * block_size, 4 * block_size) if size]
    by_number = [(block_size, kept) for kept in (block_topk // 2, 2 * block_topk, 4 * block_topk)]
    plain = hj.Hisa(topk=topk, block_size=block_size, block_topk=block_topk)
    return (
        Variant(name=HISA, method=plain),
        *(
            Variant(name=f"B={size}, m={kept}", method=hj.Hisa(topk=topk, block_size=size, block_topk=kept))
            for size, kept in (*by_size, *by_number)
            if kept >= 2 and size * kept >= topk
        ),
        Variant(name="first block not always kept", method=dataclasses.replace(plain, keep_first=0)),
        Variant(name=f"last {_LAST} queries flat", method=plain, flat_last=_LAST),
        Variant(name="layer 0 flat", method=plain, flat_layers=(0,)),
        Variant(name="e4m3 keys, pooled from them", method=plain, key_dtype="float8_e4m3fn"),
        Variant(name="int8 keys, pooled from them", method=plain, key_dtype="int8"),
    )
