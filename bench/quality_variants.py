"""What the quality report compares: selections that replace the flat indexer's in a trained model, as values."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

import hisa_jax as hj

KeyDtype = Literal["float8_e4m3fn", "int8"]
FLAT, HISA, BLOCK_SPARSE = "flat", "HISA", "block-sparse"


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
        method = hj.Dsa(topk=self.method.topk) if layer in self.flat_layers else self.method
        return dataclasses.replace(self, name="", method=method, flat_layers=())

    def select(self, q: Array, k: Array, w: Array, **options: Any) -> hj.Selection:
        """[B, T, H, D], [B, S, D], [B, T, H] -> the selection of one layer, `flat_last` left aside.

        Options are those of `hj.select`.
        """
        keys: Array | hj.QuantizedKeys = k
        if self.key_dtype is not None:
            dtype = jnp.dtype(self.key_dtype)
            keys, (q, w) = hj.quantize_keys(k, dtype), hj.quantize_queries(q, w, dtype)
        return hj.select(q, keys, w, self.method, **options)


def hisa(topk: int, block_size: int, block_topk: int, **changes: int) -> hj.Hisa:
    return hj.Hisa(topk=topk, block_size=block_size, block_topk=block_topk, **changes)


def main_variants(topk: int, block_size: int, block_topk: int) -> tuple[Variant, ...]:
    """Flat, HISA and block-sparse at the same number of selected tokens, the flat one first."""
    return (
        Variant(name=FLAT, method=hj.Dsa(topk=topk)),
        Variant(name=HISA, method=hisa(topk, block_size, block_topk)),
        Variant(name=BLOCK_SPARSE, method=hj.BlockSparse(topk=topk, block_size=block_size)),
    )


def ablations(topk: int, block_size: int, block_topk: int) -> tuple[Variant, ...]:
    """HISA with one thing changed at a time, plain HISA first.

    Block sizes change at the same number of candidates, block_size * block_topk, numbers of blocks at the same block
    size. Those that cannot hold `topk` tokens or the blocks always kept are left out.
    """
    made: dict[str, Variant] = {}

    def add(name: str, size: int, kept: int, **changes: object) -> None:
        fields = {key: changes.pop(key) for key in ("keep_first",) if key in changes}
        if size < 1 or kept < 2 or size * kept < topk:
            return
        method = hisa(topk, size, kept, **fields)  # type: ignore[arg-type]
        made.setdefault(name, Variant(name=name, method=method, **changes))  # type: ignore[arg-type]

    add(HISA, block_size, block_topk)
    for factor in (0.5, 2, 4):
        size = int(block_size * factor)
        add(f"B={size}, m={block_size * block_topk // size}", size, block_size * block_topk // size)
    for factor in (0.5, 2, 4):
        kept = int(block_topk * factor)
        add(f"B={block_size}, m={kept}", block_size, kept)
    add("first block not always kept", block_size, block_topk, keep_first=0)
    add("last 512 queries flat", block_size, block_topk, flat_last=512)
    add("layer 0 flat", block_size, block_topk, flat_layers=(0,))
    add("e4m3 keys, pooled from them", block_size, block_topk, key_dtype="float8_e4m3fn")
    add("int8 keys, pooled from them", block_size, block_topk, key_dtype="int8")
    return tuple(made.values())
