"""A dump of what some framework selected, judged: does it follow from its q, k and w, and if not, what would fit."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hisa_jax.methods import Dsa, Method, Scan
from hisa_jax.testing import oracle
from hisa_jax.testing.oracle.compare import judge

NEEDED = {"q": 3, "k": 2, "w": 2, "indices": 2}  # axes without that of the batch
OPTIONAL = {"k_scale": 1, "positions": 1, "lengths": 0}
_BITS = {2: ml_dtypes.bfloat16, 1: ml_dtypes.float8_e4m3fn}  # what NumPy saves as bytes of no type


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dump:
    """What was dumped, with an axis for the batch.

    Attributes:
        q, k, w: [B, T, H, D], [B, S, D], [B, T, H]; k_scale: [B, S], ones if there was none.
        indices: [B, T, topk], in any order; what is outside of [0, S) fills up.
        positions: [B, T], -1 for padding; lengths: [B].
    """

    q: np.ndarray
    k: np.ndarray
    w: np.ndarray
    k_scale: np.ndarray
    indices: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        """[B, T]: how many tokens each query sees."""
        return np.minimum(np.maximum(self.positions, -1) + 1, self.lengths[:, None])


def read_dump(path: Path) -> Dump:
    """Reads a dump.

    Args:
        path: .npz with q [T, H, D], k [S, D], w [T, H], indices [T, topk] and, if they are there, k_scale [S],
            positions [T] and lengths [], all with an axis for the batch before or none. Default: the queries are the
            last tokens of all. bfloat16 and float8_e4m3fn as `np.save` writes them, or as float32.

    Raises: ValueError: no .npz, an array is missing, of another shape or dtype. FileNotFoundError: no such file.
    """
    arrays = _arrays(path)
    batch = arrays["q"].ndim - NEEDED["q"]
    if batch not in (0, 1):
        raise ValueError(f"{path}: q is {list(arrays['q'].shape)}, wanted [T, H, D] or [B, T, H, D]")
    for name, axes in (NEEDED | OPTIONAL).items():
        if name in arrays:
            if arrays[name].ndim != axes + batch:
                raise ValueError(f"{path}: {name} is {list(arrays[name].shape)}, wanted {axes + batch} axes, as q has")
            arrays[name] = arrays[name] if batch else arrays[name][None]
    (B, T, H, D), S = arrays["q"].shape, arrays["k"].shape[1]
    shapes = {"k": (B, S, D), "w": (B, T, H), "k_scale": (B, S), "positions": (B, T), "lengths": (B,)}
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(
                f"{path}: {name} is {list(arrays[name].shape)}, wanted {list(shape)} (q is {[B, T, H, D]})"
            )
    if arrays["indices"].shape[:2] != (B, T) or not arrays["indices"].shape[2]:
        raise ValueError(f"{path}: indices is {list(arrays['indices'].shape)}, wanted {[B, T]} and topk")
    lengths = np.clip(arrays.get("lengths", np.full(B, S)).astype(np.int64), 0, S)
    return Dump(
        q=arrays["q"], k=arrays["k"], w=arrays["w"], k_scale=arrays.get("k_scale", np.ones((B, S), np.float32)),
        indices=arrays["indices"].astype(np.int64), lengths=lengths,
        positions=arrays.get("positions", lengths[:, None] - T + np.arange(T)).astype(np.int64),
    )  # fmt: skip


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, TypeError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: wanted a .npz of arrays ({error})") from error
    missing, known = [name for name in NEEDED if name not in arrays], [*NEEDED, *OPTIONAL]
    if missing:
        raise ValueError(
            f"{path}: has no {missing[0]}, wanted {', '.join(NEEDED)}; it has {', '.join(arrays) or 'nothing'}"
        )
    if unknown := [name for name in arrays if name not in known]:
        raise ValueError(f"{path}: {unknown[0]} is not known, wanted only {', '.join(known)}")
    for name, array in arrays.items():
        kind = array.dtype.kind
        if kind == "V" and array.dtype.itemsize in _BITS:
            arrays[name] = array.view(_BITS[array.dtype.itemsize])
        elif name in ("indices", "positions", "lengths"):
            if kind not in "iu":
                raise ValueError(f"{path}: {name} is {array.dtype}, wanted integers")
        elif kind not in "fi":
            raise ValueError(f"{path}: {name} is {array.dtype}, wanted floats, or int8 with its k_scale")
    return arrays


class Query(NamedTuple):
    """One judged query.

    Attributes:
        b, t, position, visible: which it is, and how many tokens it sees.
        why: None, or what is wrong with what it selected.
        recall: share of the tokens it should have selected that it did.
        needs: the tolerance at which it would pass, infinity if at none; of the flat indexer.
    """

    b: int
    t: int
    position: int
    visible: int
    why: str | None
    recall: float
    needs: float


def sampled(dump: Dump, topk: int, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """Up to n queries that have to choose and n / 4 that see no more than topk, at random, in order."""
    rng = np.random.default_rng(seed)
    at = []
    for chooses, limit in ((dump.visible > topk, n), ((dump.visible <= topk) & (dump.positions >= 0), -(-n // 4))):
        found = np.argwhere(chooses)
        at += [tuple(found[i]) for i in rng.permutation(len(found))[:limit]]
    return sorted((int(b), int(t)) for b, t in at)


def judged(dump: Dump, queries: list[tuple[int, int]], method: Method, tolerance: float) -> Iterator[Query]:
    """Each of the queries, held against the reference in float64."""
    S = dump.k.shape[1]
    for b, t in queries:
        keys = _Keys(dump.k[b : b + 1], dump.k_scale[b : b + 1])
        one = dict(query_positions=dump.positions[b : b + 1, t : t + 1], lengths=dump.lengths[b : b + 1])
        reference = oracle.select(dump.q[b : b + 1, t : t + 1], keys, dump.w[b : b + 1, t : t + 1], method, **one)
        ids = dump.indices[b, t]
        real = np.sort(ids[(ids >= 0) & (ids < S)])
        row, count = np.full((1, 1, method.topk), -1, np.int32), np.array([[min(len(real), method.topk)]], np.int32)
        row[0, 0, : count[0, 0]] = real[: method.topk]
        why = next(judge(reference, tolerance, indices=row, count=count, may_keep_more=isinstance(method, Scan)))
        wanted = reference.indices[0, 0][: reference.count[0, 0]]
        recall = float(np.isin(wanted, real).mean()) if len(wanted) else 1.0
        needs = _needed(reference, real, wanted)
        why = why and why.splitlines()[-1]
        if len(real) > method.topk:
            why = f"{len(real)} tokens were chosen, and topk is {method.topk}"
        yield Query(b, t, int(dump.positions[b, t]), int(dump.visible[b, t]), why, recall, needs)


def _needed(reference: oracle.OracleSelection, given: np.ndarray, wanted: np.ndarray) -> float:
    """How far beyond the threshold the worst difference is, relative to the scale of the query's scores."""
    scores, scale = reference.token_scores[0, 0], float(reference.token_scale[0, 0])
    if np.array_equal(given, wanted):
        return 0.0
    if not isinstance(reference.method, Dsa) or len(given) != len(wanted) or len(np.unique(given)) < len(given):
        return np.inf
    if given[-1] >= len(scores):
        return np.inf
    extra, missing = np.setdiff1d(given, wanted), np.setdiff1d(wanted, given)
    threshold = scores[wanted].min()
    with np.errstate(invalid="ignore"):
        needs = max(threshold - scores[extra].min(), scores[missing].max() - threshold) / (scale or 1.0)
    return float(np.nan_to_num(needs, nan=np.inf))


class _Keys(NamedTuple):
    values: np.ndarray
    scales: np.ndarray


# What a wrong selection may follow from. Each gives the scores [visible] of one query, the best of which are chosen.
Scores = Callable[[Dump, int, int], np.ndarray]


def _scores(q: np.ndarray, k: np.ndarray, w: np.ndarray, scale: np.ndarray, *, relu: bool = True) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        products = q.astype(np.float64) @ k.astype(np.float64).T
        scores = scale.astype(np.float64) * (w.astype(np.float64) @ (np.maximum(products, 0) if relu else products))
    return np.where(np.isnan(scores), -np.inf, scores)


def _of_query(
    dump: Dump, b: int, t: int, *, shift: int = 0, sees: int | None = None, w: Callable[..., Any] | None = None,
    with_scale: bool = True, relu: bool = True, keys: int = 0,
) -> np.ndarray:  # fmt: skip
    n = int(min(max(dump.visible[b, t] + shift, 0), dump.k.shape[1])) if sees is None else sees
    k, scale = (np.roll(x[b], keys, axis=0)[:n] for x in (dump.k, dump.k_scale))
    weights = dump.w[b, t] if w is None else w(dump.w[b, t])
    return _scores(dump.q[b, t], k, weights, scale if with_scale else np.ones_like(scale), relu=relu)


CONTRACT = "the flat indexer"
GUESSES: Mapping[str, Scores] = {
    CONTRACT: _of_query,
    "no relu": lambda d, b, t: _of_query(d, b, t, relu=False),
    "no head weights, all 1": lambda d, b, t: _of_query(d, b, t, w=np.ones_like),
    "head weights without their sign": lambda d, b, t: _of_query(d, b, t, w=np.abs),
    "head weights through a softmax": lambda d, b, t: _of_query(d, b, t, w=_softmax),
    "k_scale left out": lambda d, b, t: _of_query(d, b, t, with_scale=False),
    "the query itself not visible": lambda d, b, t: _of_query(d, b, t, shift=-1),
    "one token too many visible": lambda d, b, t: _of_query(d, b, t, shift=1),
    "all tokens of the sequence visible": lambda d, b, t: _of_query(d, b, t, sees=int(d.lengths[b])),
    "all keys visible, beyond the length too": lambda d, b, t: _of_query(d, b, t, sees=d.k.shape[1]),
    "keys one place late": lambda d, b, t: _of_query(d, b, t, keys=1),
    "keys one place early": lambda d, b, t: _of_query(d, b, t, keys=-1),
    "the lowest scores": lambda d, b, t: -_of_query(d, b, t),
    "the last tokens": lambda d, b, t: np.arange(d.visible[b, t], dtype=np.float64),
    "the first tokens": lambda d, b, t: -np.arange(d.visible[b, t], dtype=np.float64),
    "the query before": lambda d, b, t: _of_other(d, b, t, -1),
    "the query after": lambda d, b, t: _of_other(d, b, t, 1),
    "the next sequence of the batch": lambda d, b, t: _of_next_sequence(d, b, t),
}


def _softmax(w: np.ndarray) -> np.ndarray:
    e = np.exp(w.astype(np.float64) - w.max())
    return e / e.sum()


def _of_other(dump: Dump, b: int, t: int, step: int) -> np.ndarray:
    """The scores of a neighbouring query over what this one sees."""
    n, other = int(dump.visible[b, t]), min(max(t + step, 0), dump.q.shape[1] - 1)
    return _scores(dump.q[b, other], dump.k[b, :n], dump.w[b, other], dump.k_scale[b, :n])


def _of_next_sequence(dump: Dump, b: int, t: int) -> np.ndarray:
    n, other = int(dump.visible[b, t]), (b + 1) % len(dump.q)
    return _scores(dump.q[b, t], dump.k[other, :n], dump.w[b, t], dump.k_scale[other, :n])


def guessed(dump: Dump, queries: list[Query], topk: int) -> list[tuple[float, str]]:
    """What each guess explains of what these queries selected: mean share and guess, the best first."""
    shares: dict[str, list[float]] = {name: [] for name in GUESSES}
    shifts: list[tuple[float, int]] = []
    for query in queries:
        ids = dump.indices[query.b, query.t]
        given = np.unique(ids[(ids >= 0) & (ids < dump.k.shape[1])])
        for name, scores in GUESSES.items():
            best = np.sort(np.argsort(-scores(dump, query.b, query.t), kind="stable")[:topk])
            shares[name].append(float(np.isin(given, best).mean()) if len(given) else 0.0)
            if name == CONTRACT and len(best) == len(ids):
                values, times = np.unique(np.sort(ids) - best, return_counts=True)
                shifts.append((float(times.max() / len(ids)), int(values[times.argmax()])))
    found = [(float(np.mean(of)), name) for name, of in shares.items()]
    if any(shift for _, shift in shifts):
        share = float(np.mean([share if shift else 0.0 for share, shift in shifts]))
        example = next(shift for _, shift in shifts if shift)
        found.append((share, f"positions counted from elsewhere, as ids of a packed batch or pool are: {example:+d}"))
    return sorted(found, key=lambda pair: -pair[0])
