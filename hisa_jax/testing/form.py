"""What a function under test takes and gives: its inputs, its order, its padding."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from hisa_jax.methods import Method

Order = Literal["ascending", "any"]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
KEYWORDS = ("query_positions", "lengths")
AXES = "BTSHD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a function differs in form from `select`, so that it can be judged by what it selects.

    Attributes:
        takes: which of the keywords `query_positions` [B, T] and `lengths` [B] it has, int32 both. Without positions
            the queries are the last T tokens; without lengths all S keys are of the sequence.
        order: "ascending", or "any".
        padding: the number that fills up a row. "masked": what the query does not see fills up, as where scores are
            masked before a top-k, and is left out before judging.
        dtype: of q and k, "float32", "bfloat16" or "float8_e4m3fn". Head weights are float32.
        tolerance: of scores, relative to the largest of a query: 1e-5 is for sums in float32, 1e-2 for bfloat16.
        sizes: numbers that it takes on an axis, as `{"D": (128,), "S": (64, 128, 256)}`, of B sequences, T queries, S
            keys, H heads and D features. Any on an axis that is not named.

    Raises: TypeError or ValueError: an attribute of another type or out of range.
    """

    takes: Sequence[str] = KEYWORDS
    order: Order = "ascending"
    padding: int | Literal["masked"] = -1
    dtype: str = "float32"
    tolerance: float = 1e-5
    sizes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.takes, str) or not set(self.takes) <= set(KEYWORDS):
            raise ValueError(f"Form(takes={self.takes!r}): wanted a tuple of {', '.join(KEYWORDS)}")
        if self.order not in get_args(Order):
            raise ValueError(f"Form(order={self.order!r}): wanted one of {', '.join(get_args(Order))}")
        is_number = isinstance(self.padding, int) and not isinstance(self.padding, bool)
        if not is_number and self.padding != "masked":
            raise ValueError(f"Form(padding={self.padding!r}): wanted an int or 'masked'")
        if self.dtype not in DTYPES:
            raise ValueError(f"Form(dtype={self.dtype!r}): wanted one of {', '.join(DTYPES)}")
        if not self.tolerance > 0:
            raise ValueError(f"Form(tolerance={self.tolerance}): wanted above 0")
        for axis, sizes in self.sizes.items():
            if axis not in AXES or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
                raise ValueError(f"Form(sizes={dict(self.sizes)}): wanted positive ints for any of {', '.join(AXES)}")

    def size(self, axis: str, wanted: int) -> int:
        """The least size of an axis that it takes and that is not below `wanted`, or the largest there is."""
        sizes = sorted(self.sizes.get(axis, (wanted,)))
        return next((size for size in sizes if size >= wanted), sizes[-1])

    def takes_size(self, axis: str, size: int) -> bool:
        """Whether an axis may have this size."""
        return size in self.sizes.get(axis, (size,))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One call of the function under test.

    Attributes:
        q, k, w: [B, T, H, D], [B, S, D], [B, T, H], in NumPy.
        query_positions: [B, T] int32, or None: the queries are the last tokens.
        lengths: [B] int32, or None: all keys are of the sequence.
    """

    q: np.ndarray
    k: np.ndarray
    w: np.ndarray
    query_positions: np.ndarray | None = None
    lengths: np.ndarray | None = None

    @property
    def keywords(self) -> dict[str, np.ndarray]:
        """The keywords that are given."""
        return {name: value for name in KEYWORDS if (value := getattr(self, name)) is not None}

    @property
    def bounds(self) -> np.ndarray:
        """[B]: how many keys each sequence has."""
        B, S = self.k.shape[:2]
        return np.full(B, S) if self.lengths is None else np.clip(self.lengths, 0, S)

    @property
    def positions(self) -> np.ndarray:
        """[B, T]: of each query, -1 for padding."""
        if self.query_positions is not None:
            return np.maximum(self.query_positions, -1).astype(np.int64)
        T = self.q.shape[1]
        return np.maximum(self.bounds[:, None] - T + np.arange(T), -1)

    @property
    def visible(self) -> np.ndarray:
        """[B, T]: how many tokens each query sees."""
        return np.minimum(self.positions + 1, self.bounds[:, None])

    def __str__(self) -> str:
        """All of it where it is small, else its shapes."""
        arrays = {name: getattr(self, name) for name in ("q", "k", "w")} | self.keywords
        return "\n".join(f"    {name} {list(array.shape)}{_shown(array)}" for name, array in arrays.items())


def _shown(array: np.ndarray) -> str:
    if array.size > 64:
        return f" {array.dtype}"
    text = np.array2string(
        np.asarray(array, array.dtype if array.dtype.kind == "i" else np.float64), max_line_width=100
    )
    return " = " + text.replace("\n", "\n        ")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the function under test gave: `indices` [B, T, topk] as they came, `count` [B, T] if it gave one."""

    indices: np.ndarray
    count: np.ndarray | None

    def at(self, b: slice = slice(None), t: slice = slice(None)) -> "Answer":
        """That of some of the sequences and queries."""
        return Answer(self.indices[b, t], None if self.count is None else self.count[b, t])


class WrongForm(AssertionError):
    """The function gave what is no selection at all."""


class Raised(Exception):
    """The function raised; why it did is the cause."""


def ask(function: Callable[..., Any], case: Case, method: Method) -> Answer:
    """Calls the function under test.

    Returns: what it gave: of a `Selection`, of a pair (indices, count), or of indices alone.
    Raises: WrongForm: neither of these, or another shape. Raised: it raised.
    """
    try:
        given = function(case.q, case.k, case.w, **case.keywords)
    except Exception as error:  # whatever somebody's function raises is its answer
        raise Raised(f"it raised {type(error).__name__}: {(str(error) or '-').splitlines()[0]}") from error
    if hasattr(given, "indices"):
        indices, count = given.indices, getattr(given, "count", None)
        count = None if callable(count) else count  # a tuple's own method
    elif isinstance(given, tuple | list) and len(given) == 2:
        indices, count = given
    elif isinstance(given, tuple | list | dict) or given is None:
        raise WrongForm(f"it returned {type(given).__name__}, wanted indices, (indices, count) or a Selection")
    else:
        indices, count = given, None
    rows = case.q.shape[:2]
    indices = _integers("indices", indices, (*rows, method.topk))
    return Answer(indices, None if count is None else _integers("count", count, rows))


def _integers(name: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(given)
    if array.dtype.kind not in "iu":
        raise WrongForm(f"{name} is {array.dtype}, wanted int32")
    if array.shape != shape:
        raise WrongForm(f"{name} is {list(array.shape)}, wanted {list(shape)}")
    return array


def chosen(form: Form, row: np.ndarray, visible: int) -> np.ndarray:
    """The tokens of one row [topk], in the order in which they came, without what fills up."""
    if form.padding == "masked":
        return row[(row >= 0) & (row < visible)]
    return row[row != form.padding]
