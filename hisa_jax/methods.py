"""The methods: which tokens a query may attend to, as values.

A method is a frozen, hashable dataclass and needs no state. To JAX it is a pytree without leaves: static under
`jax.jit`, `jax.vmap` and `jax.grad`, whether or not it is named in `static_argnames`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import numpy as np
from jax import Array

Score = Callable[[Array, Array, Array], Array]
Pool = Callable[[Array], Array]


def at_least(method: object, name: str, least: int, why: str = "") -> None:
    """Raises unless an attribute is an int and not below `least`; one of NumPy's becomes Python's."""
    value = getattr(method, name)
    call = f"{type(method).__name__}({name}={value!r})"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{call}: must be an int, not {type(value).__name__}")
    object.__setattr__(method, name, int(value))
    if value < least:
        raise ValueError(f"{call}: must be at least {least}{why}")


def name_of(function: Any) -> str:
    """How messages call a function."""
    return getattr(function, "__name__", type(function).__name__)


class _Functions:
    """What methods share that take functions of the caller's own in place of formulas."""

    functions: ClassVar[tuple[str, ...]] = ()  # the attributes that are such functions, or None

    def given(self) -> dict[str, Callable[..., Array]]:
        """The functions that there are."""
        return {name: function for name in self.functions if (function := getattr(self, name)) is not None}

    def check_functions(self) -> None:
        """Raises TypeError unless they can be called, and hashed, since methods are static under jit."""
        for name, function in self.given().items():
            call = f"{type(self).__name__}({name}={name_of(function) if callable(function) else repr(function)})"
            if not callable(function):
                raise TypeError(f"{call}: must be a function or None, not {type(function).__name__}")
            try:
                hash(function)
            except TypeError:
                raise TypeError(f"{call}: must be hashable, since methods are static under jit") from None

    def __repr__(self) -> str:
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = {field.name: repr(getattr(self, field.name)) for field in fields if field.name not in self.functions}
        shown |= {name: name_of(function) for name, function in self.given().items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Dsa(_Functions):
    """The flat, exact indexer: scores every visible token and keeps the best `topk`.

    Attributes:
        topk: tokens chosen for each query, k in the papers.
        token_score: a function of one's own in place of the indexer's score: q [H, D], keys [s, D] and w [H], all
            float32, -> [s] floats, each of its own key alone. None: the indexer's. docs/research.md has the rules.

    Raises: TypeError: an attribute that is not an int, a function that is none. ValueError: an attribute out of range.
    Source: DeepSeek-V3.2's lightning indexer.
    """

    has_blocks: ClassVar[bool] = False
    functions: ClassVar[tuple[str, ...]] = ("token_score",)
    topk: int = 2048
    token_score: Score | None = None

    def __post_init__(self) -> None:
        at_least(self, "topk", 1)
        self.check_functions()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Blocks(_Functions):
    """What the two methods that choose blocks share."""

    has_blocks: ClassVar[bool] = True
    functions: ClassVar[tuple[str, ...]] = ("pool", "block_score")
    topk: int = 2048
    block_size: int = 128
    keep_first: int = 1
    keep_last: int = 1
    pool: Pool | None = None
    block_score: Score | None = None

    def __post_init__(self) -> None:
        self.check_functions()
        at_least(self, "topk", 1)
        at_least(self, "block_size", 1)
        at_least(self, "keep_first", 0)
        at_least(self, "keep_last", 1, ": the block of the query itself holds future tokens, its mean may not decide")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Hisa(_Blocks):
    """The hierarchical indexer: keeps the best blocks by their mean key, then the best tokens inside them.

    Attributes:
        topk: tokens chosen for each query, k in the paper.
        block_size: tokens a block, B in the paper.
        block_topk: most blocks kept for each query, m in the paper; all of them of a query that sees no more.
        block_ratio: a query that sees n blocks keeps n / block_ratio of them, rounded up, up to `block_topk`: M : m in
            the paper, whose ratio mode is 4. But not fewer than are always kept, nor than hold `topk` tokens if the
            last one holds a single token. 1: `block_topk` of any number.
        keep_first: eligible blocks at the start that are always kept; they count towards `block_topk`.
        keep_last: eligible blocks at the end that are always kept, the query's own one among them.
        pool: a function of one's own for what stands for a block: its keys [block_size, D] float32 -> [E] floats, with
            E = D unless `block_score` is given, too. None: their mean.
        block_score: one's own score of blocks: q [H, D], what stands for them [s, E] and w [H], all float32, -> [s]
            floats, each of its own block alone. None: the indexer's. docs/research.md has the rules of all three.
        token_score: the same of tokens, as `Dsa` has it.

    Raises: TypeError: an attribute that is not an int, a function that is none. ValueError: an attribute out of range,
        more blocks always kept than `block_topk`, or kept blocks that hold fewer tokens than `topk`.
    Source: HISA, arXiv 2603.28458, section 3.
    """

    functions: ClassVar[tuple[str, ...]] = ("pool", "block_score", "token_score")
    block_topk: int = 64
    block_ratio: int = 1
    token_score: Score | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "block_topk", 1)
        at_least(self, "block_ratio", 1)
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class BlockSparse(_Blocks):
    """The block-sparse baseline: all visible tokens of the best topk / block_size blocks.

    Attributes: those of `Hisa`, but for `block_ratio` and `token_score`; `block_topk` follows from `topk`.

    Raises: TypeError: an attribute that is not an int, a function that is none. ValueError: an attribute out of range,
        a `topk` that is not a multiple of `block_size`, or more blocks always kept than topk / block_size.
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


Slopes = Literal["sampled", "plain"]
Sketch = Literal["int4"]
_MAX_UNIT = 128  # tiles of keys are whole units


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """The scan: a few heads score every token, then the exact indexer chooses among the best by them.

    The scan score of token s for query t is the indexer's with a few of its heads, those in E, as they are, and the
    others as one virtual head v:

        k_scale[s] * (v[t] . k[s] + sum_{h in E[t]} w[t, h] * relu(q[t, h] . k[s]))
        v[t] = sum_{h not in E[t]} w[t, h] * a[t, h] * q[t, h]

    so relu is replaced by the slopes a where it matters least. v is rounded to bfloat16, unless the keys are float32.
    The recommended numbers, those of `Scan()`, are from docs/quality.md.

    Attributes:
        topk: tokens chosen for each query.
        candidates: tokens that are scored exactly for each query, at least: as many as these are the best by scan
            score, and kernels may score others too, so that a selection can only be nearer to the flat indexer's. None:
            four times `topk`.
        exact_heads: how many heads are in E: those of greatest |w[t, h]| * |q[t, h]|, a tie to the lower head. 0: the
            virtual head alone.
        unit: adjacent tokens that become candidates together, from a multiple of `unit` on: a power of two up to 128. A
            unit scores what the best of its visible tokens does.
        slopes: "sampled": of up to 256 visible tokens, at positions 0, step, 2 step, ... with the least power of two
            that leaves so few, the 32 of highest exact score are taken; a[t, h] is the share of them at which head h
            is open, q[t, h] . k > 0. "plain": 1, which costs nothing and finds less.
        sketch: what is scanned in place of the keys, of which the exact scores stay. "int4": 4 bits a number, with a
            scale for each 32 (sketch.py); None: the keys.
        keep_first: units at the start that are always kept; they count towards `candidates`.
        keep_last: units at the end of what a query sees that are always kept, its own one among them.

    Raises: TypeError: an attribute of another type. ValueError: an attribute out of range, `candidates` that are no
        whole units or fewer than `topk`, or more units always kept than there are candidates.
    """

    has_blocks: ClassVar[bool] = True
    topk: int = 2048
    candidates: int | None = None
    exact_heads: int = 4
    unit: int = 1
    slopes: Slopes = "sampled"
    sketch: Sketch | None = None
    keep_first: int = 1
    keep_last: int = 1

    def __post_init__(self) -> None:
        at_least(self, "topk", 1)
        at_least(self, "exact_heads", 0)
        at_least(self, "unit", 1)
        at_least(self, "keep_first", 0)
        at_least(self, "keep_last", 1, ": a query's own unit may be partial, so that it must always count")
        if self.unit & (self.unit - 1) or self.unit > _MAX_UNIT:
            raise ValueError(f"Scan(unit={self.unit}): must be a power of two up to {_MAX_UNIT}")
        if self.slopes not in get_args(Slopes):
            raise ValueError(f"Scan(slopes={self.slopes!r}): must be one of {', '.join(get_args(Slopes))}")
        if self.sketch is not None and self.sketch not in get_args(Sketch):
            raise ValueError(f"Scan(sketch={self.sketch!r}): must be None or one of {', '.join(get_args(Sketch))}")
        if self.candidates is None:
            # The value that stands for None, so that methods which mean the same are equal.
            object.__setattr__(self, "candidates", -(-4 * self.topk // self.unit) * self.unit)
        at_least(self, "candidates", self.topk, ", its topk")
        if self.block_topk * self.unit != self.candidates:
            raise ValueError(f"Scan(candidates={self.candidates}): must be a multiple of unit = {self.unit}")
        forced = self.keep_first + self.keep_last
        if self.block_topk < forced:
            raise ValueError(
                f"Scan(candidates={self.candidates}): are {self.block_topk} units of {self.unit}, must be at least "
                f"keep_first + keep_last = {forced}, since those units are always kept"
            )

    @property
    def block_size(self) -> int:
        """Tokens of a block: a unit is one."""
        return self.unit

    @property
    def block_topk(self) -> int:
        """Units kept for each query."""
        assert self.candidates is not None
        return self.candidates // self.unit


Method = Hisa | Dsa | BlockSparse | Scan
NAMES = {"dsa": Dsa, "hisa": Hisa, "scan": Scan, "block-sparse": BlockSparse}  # on command lines and in files


def least_blocks(method: Hisa | BlockSparse | Scan) -> int:
    """Up to how many blocks a query keeps all that it sees; beyond it keeps at least so many."""
    if not isinstance(method, Hisa) or method.block_ratio == 1:
        return method.block_topk
    # The last block may hold a single token; the others are full.
    holding_topk = -(-(method.topk - 1) // method.block_size) + 1
    return min(max(method.keep_first + method.keep_last, holding_topk), method.block_topk)
