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

from hisa_jax.checks import INT32

Score = Callable[[Array, Array, Array], Array]
Pool = Callable[[Array], Array]


def at_least(method: object, name: str, least: int, why: str = "") -> None:
    """Raises unless an attribute is an int32 and not below `least`; one of NumPy's becomes Python's int."""
    value = getattr(method, name)
    call = f"{type(method).__name__}({name}={value!r})"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{call}: must be an int, not {type(value).__name__}")
    object.__setattr__(method, name, int(value))
    if value < least:
        raise ValueError(f"{call}: must be at least {least}{why}")
    if value > INT32:
        raise ValueError(f"{call}: must be at most {INT32}, the largest int32")


def name_of(function: Any) -> str:
    """How messages call a function."""
    return getattr(function, "__name__", type(function).__name__)


Activation = Literal["relu"]
Tail = Literal["open"]
Returns = Literal["tokens", "entries"]
ScoredBy = Literal["mean", "max"]


def one_of(method: object, name: str, choices: Any, or_none: bool = False) -> None:
    """Raises ValueError unless an attribute is one of a Literal's values, or None where that is one."""
    value, values = getattr(method, name), get_args(choices)
    if not (value is None and or_none) and not (isinstance(value, str) and value in values):
        wanted = f"{'None or ' if or_none else ''}one of {', '.join(values)}"
        raise ValueError(f"{type(method).__name__}({name}={value!r}): must be {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Indexer:
    """What a key stands for and how it is scored: what all methods share.

    Attributes:
        entry_size: tokens that a key stands for, its entry: r adjacent ones, from a multiple of r on. A query sees an
            entry if it sees all of its tokens. `topk` and every other number of a method count entries.
        tail: "open": the visible tokens after the last whole entry, up to r - 1 of them, follow the chosen in
            `indices`. None: they are left out.
        returns: "tokens": `indices` are the tokens of the chosen entries. "entries": the entries themselves.
        activation: "relu", or None: products of queries and keys are weighted and summed as they are.
        per_head: choose for each head by its own scores, without weights; a head is then an axis of the selection.
    """

    functions: ClassVar[tuple[str, ...]] = ()  # the attributes that are functions of the caller's own, or None
    entry_size: int = 1
    tail: Tail | None = None
    returns: Returns = "tokens"
    activation: Activation | None = "relu"
    per_head: bool = False

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

    def check_entries(self) -> None:
        """Raises unless what a key stands for, and how it is scored, go together."""
        kind = type(self).__name__
        at_least(self, "entry_size", 1)
        one_of(self, "tail", Tail, or_none=True)
        one_of(self, "returns", Returns)
        one_of(self, "activation", Activation, or_none=True)
        if not isinstance(self.per_head, bool | np.bool_):
            raise TypeError(f"{kind}(per_head={self.per_head!r}): must be a bool, not {type(self.per_head).__name__}")
        object.__setattr__(self, "per_head", bool(self.per_head))
        if self.tail and self.entry_size == 1:
            raise ValueError(f"{kind}(tail={self.tail!r}): wanted an entry_size above 1: one token leaves none open")
        if self.returns == "entries" and self.entry_size == 1:
            raise ValueError(f"{kind}(returns='entries'): wanted an entry_size above 1: of one token they are tokens")
        if self.returns == "entries" and self.tail:
            raise ValueError(f"{kind}(tail={self.tail!r}, returns='entries'): the tail's tokens are no entries")
        scores = [name for name in self.functions if name.endswith("score")]
        if self.activation is None and scores and set(scores) <= set(self.given()):
            raise ValueError(
                f"{kind}(activation=None) with functions for {' and '.join(scores)}: no score is left to have one"
            )

    def __repr__(self) -> str:
        fields: Any = dataclasses.fields(self)
        usual = {field.name: field.default for field in dataclasses.fields(_Indexer)} | dict.fromkeys(self.functions)
        values = {f.name: getattr(self, f.name) for f in sorted(fields, key=lambda field: field.name in usual)}
        shown = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
        shown = {name: name_of(value) if name in self.functions else repr(value) for name, value in shown.items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Dsa(_Indexer):
    """The flat, exact indexer: scores every visible token and keeps the best `topk`.

    Attributes:
        topk: tokens chosen for each query, k in the papers.
        token_score: a function of one's own in place of the indexer's score: q [H, D], keys [s, D] and w [H], all
            float32, -> [s] floats, each of its own key alone. None: the indexer's. docs/research.md has the rules.
        entry_size, tail, returns, activation, per_head: of every method; docs/contract.md has them.

    Raises: TypeError: an attribute that is not an int, a function that is none. ValueError: an attribute out of range,
        two that mean nothing together.
    Source: DeepSeek-V3.2's lightning indexer.
    """

    has_blocks: ClassVar[bool] = False
    functions: ClassVar[tuple[str, ...]] = ("token_score",)
    topk: int = 2048
    token_score: Score | None = None

    def __post_init__(self) -> None:
        at_least(self, "topk", 1)
        self.check_functions()
        self.check_entries()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Blocks(_Indexer):
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
        self.check_entries()
        at_least(self, "topk", 1)
        at_least(self, "block_size", 1)
        at_least(self, "keep_first", 0)
        self.check_keep_last()

    def check_keep_last(self) -> None:
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
        entry_size, tail, returns, activation, per_head: as for `Dsa`.

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
    """The block-sparse indexer: all visible tokens of the best topk / block_size blocks.

    Attributes: those of `Hisa`, but for `block_ratio` and `token_score`; `block_topk` follows from `topk`.
        scored_by: "mean": a block scores what the mean of its keys does. "max": what the best of its visible tokens
            does, so that `keep_last` may be 0.

    Raises: TypeError: an attribute that is not an int, a function that is none. ValueError: an attribute out of range,
        a `topk` that is not a multiple of `block_size`, or more blocks always kept than topk / block_size; `scored_by`
        "max" with `pool` or `block_score`.
    Source: the baseline of HISA, arXiv 2603.28458, section 4; by "max" MiniMax-M3's indexer.
    """

    scored_by: ScoredBy = "mean"

    def __post_init__(self) -> None:
        one_of(self, "scored_by", ScoredBy)
        super().__post_init__()
        for name in self.given() if self.scored_by == "max" else ():
            raise ValueError(f"BlockSparse(scored_by='max', {name}=...): the best token's score leaves {name} no use")
        if self.topk % self.block_size:
            raise ValueError(f"BlockSparse(topk={self.topk}): must be a multiple of block_size = {self.block_size}")
        forced = self.keep_first + self.keep_last
        if self.block_topk < forced:
            raise ValueError(
                f"BlockSparse(topk={self.topk}): keeps topk / block_size = {self.block_topk} blocks, must be at least "
                f"keep_first + keep_last = {forced}, since those blocks are always kept"
            )

    def check_keep_last(self) -> None:
        if self.scored_by == "mean":
            super().check_keep_last()
        at_least(self, "keep_last", 0)

    @property
    def block_topk(self) -> int:
        """Blocks kept for each query."""
        return self.topk // self.block_size


Slopes = Literal["sampled", "plain"]
Sketch = Literal["int4"]
_MAX_UNIT = 128  # tiles of keys are whole units


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Scan(_Indexer):
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
        entry_size, tail, returns: as for `Dsa`. There is no scan without an activation, nor of one head.

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
        self.check_entries()
        if self.activation is None:
            raise ValueError("Scan(activation=None): heads that are summed as they are scan as one: Dsa is as fast")
        if self.per_head:
            raise ValueError("Scan(per_head=True): a head by itself leaves no others to be scanned as one")
        at_least(self, "exact_heads", 0)
        at_least(self, "unit", 1)
        at_least(self, "keep_first", 0)
        at_least(self, "keep_last", 1, ": a query's own unit may be partial, so that it must always count")
        if self.unit & (self.unit - 1) or self.unit > _MAX_UNIT:
            raise ValueError(f"Scan(unit={self.unit}): must be a power of two up to {_MAX_UNIT}")
        one_of(self, "slopes", Slopes)
        one_of(self, "sketch", Sketch, or_none=True)
        if self.candidates is None:
            # The value that stands for None, so that methods which mean the same are equal.
            units = min(-(-4 * self.topk // self.unit), INT32 // self.unit)
            object.__setattr__(self, "candidates", units * self.unit)
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


def flat_of(method: Method) -> Dsa:
    """The flat indexer of the same entries and scores: what the method is measured against."""
    shared: Any = {field.name: getattr(method, field.name) for field in dataclasses.fields(_Indexer)}
    return Dsa(topk=method.topk, token_score=method.given().get("token_score"), **shared)


def has_ratio(method: Method) -> bool:
    """Whether how many blocks are kept depends on how many a query sees."""
    return isinstance(method, Hisa) and method.block_ratio > 1


def is_by_best_token(method: Method) -> bool:
    """Whether a block scores what the best of its visible tokens does."""
    return isinstance(method, BlockSparse) and method.scored_by == "max"


def least_blocks(method: Hisa | BlockSparse | Scan) -> int:
    """Up to how many blocks a query keeps all that it sees; beyond it keeps at least so many."""
    if not isinstance(method, Hisa) or not has_ratio(method):
        return method.block_topk
    # The last block may hold a single token; the others are full.
    holding_topk = -(-(method.topk - 1) // method.block_size) + 1
    return min(max(method.keep_first + method.keep_last, holding_topk), method.block_topk)
