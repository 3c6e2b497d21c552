"""The methods: which tokens a query may attend to, as values.

A method is a frozen, hashable dataclass, so it is static under `jax.jit` and needs no state.
"""

import dataclasses
from typing import ClassVar


def at_least(method: object, name: str, least: int, why: str = "") -> None:
    """Raises unless an attribute is an int and not below `least`."""
    value = getattr(method, name)
    call = f"{type(method).__name__}({name}={value!r})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{call}: must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{call}: must be at least {least}{why}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dsa:
    """The flat, exact indexer: scores every visible token and keeps the best `topk`.

    Attributes:
        topk: tokens chosen for each query, k in the papers.

    Raises: TypeError: an attribute that is not an int. ValueError: an attribute out of range.
    Source: DeepSeek-V3.2's lightning indexer.
    """

    has_blocks: ClassVar[bool] = False
    topk: int = 2048

    def __post_init__(self) -> None:
        at_least(self, "topk", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
    """What the two methods that choose blocks share."""

    has_blocks: ClassVar[bool] = True
    topk: int = 2048
    block_size: int = 128
    keep_first: int = 1
    keep_last: int = 1

    def __post_init__(self) -> None:
        at_least(self, "topk", 1)
        at_least(self, "block_size", 1)
        at_least(self, "keep_first", 0)
        at_least(self, "keep_last", 1, ": the block of the query itself holds future tokens, its mean may not decide")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hisa(_Blocks):
    """The hierarchical indexer: keeps the best blocks by their mean key, then the best tokens inside them.

    Attributes:
        topk: tokens chosen for each query, k in the paper.
        block_size: tokens a block, B in the paper.
        block_topk: blocks kept for each query, m in the paper.
        keep_first: eligible blocks at the start that are always kept; they count towards `block_topk`.
        keep_last: eligible blocks at the end that are always kept, the query's own one among them.

    Raises: TypeError: an attribute that is not an int. ValueError: an attribute out of range, more blocks always
        kept than `block_topk`, or kept blocks that hold fewer tokens than `topk`.
    Source: HISA, arXiv 2603.28458, section 3.
    """

    block_topk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "block_topk", 1)
        forced = self.keep_first + self.keep_last
        if self.block_topk < forced:
            raise ValueError(
                f"Hisa(block_topk={self.block_topk}): must be at least keep_first + keep_last = {forced}, "
                "since those blocks are always kept"
            )
        if self.block_topk * self.block_size < self.topk:
            raise ValueError(
                f"Hisa(topk={self.topk}): must be at most block_topk * block_size = "
                f"{self.block_topk} * {self.block_size} = {self.block_topk * self.block_size}, "
                "the tokens in the kept blocks"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse(_Blocks):
    """The block-sparse baseline: all visible tokens of the best topk / block_size blocks.

    Attributes: those of `Hisa`; `block_topk` follows from `topk`.

    Raises: TypeError: an attribute that is not an int. ValueError: an attribute out of range, a `topk` that is not a
        multiple of `block_size`, or more blocks always kept than topk / block_size.
    Source: the baseline of HISA, arXiv 2603.28458, section 4.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk % self.block_size:
            raise ValueError(f"BlockSparse(topk={self.topk}): must be a multiple of block_size = {self.block_size}")
        forced = self.keep_first + self.keep_last
        if self.block_topk < forced:
            raise ValueError(
                f"BlockSparse(topk={self.topk}): keeps topk / block_size = {self.block_topk} blocks, must be at least "
                f"keep_first + keep_last = {forced}, since those blocks are always kept"
            )

    @property
    def block_topk(self) -> int:
        """Blocks kept for each query."""
        return self.topk // self.block_size


Method = Hisa | Dsa | BlockSparse
