"""Index queries, keys and head weights made from a text itself, for as long as there is no trained model.

The task has a right answer: the earlier places after the same last n tokens, n as large as there are any. With g_n(s)
the n tokens that end at s,

    c_n(s) = normed sum over j < 128 of 0.9^j * r(g_n(s - j))        context vector of order n
    k[s] = normed sum over orders n of n^-1/2 * c_n(s)
    q[t, (n, v)] = c_n(t) on the half of the dimensions that view v sees, normed
    w[t, (n, v)] = (n D H)^-1/2 * rarity(g_n(t)), times -1/4 for the last view

r(g) is a vector of D signs, fixed by a hash of g. The rarity of an n-gram is the mean surprisal of its tokens over that
of the text. H = 64 heads are 8 orders times 8 views, of which one counts against, as some of a trained model's do.

Why a sum over recent n-grams: the keys of a trained model mix their neighbourhood. If each key held its own n-gram
alone, a match would be 1 in a mean of 128 keys whose noise is as large, and no mean could ever find it. The decay and
n^-1/2 let the flat indexer find all places at 128K tokens (with a decay of 0.95 it finds 90 %).
"""

import hashlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bench import shapes

ORDERS = (1, 2, 3, 4, 5, 6, 8, 12)
H, D = shapes.DSV32.H, shapes.DSV32.D
VIEWS = H // len(ORDERS)
_DECAY = 0.9
_VIEW_SIGNS = np.array([1] * (VIEWS - 1) + [-0.25])
_WINDOW_LOG2 = 7
_TILE = 8192  # tokens whose context vectors are made at a time: they stay in the cache
_ODD = 0x9E3779B97F4A7C15  # splitmix64's step, 2^64 over the golden ratio, here the base of the hashes, too
_ANSWER_ORDERS = (4, 5, 6, 8, 12)  # what is found by fewer tokens is found by chance
_MAX_PLACES = 8


class Inputs(NamedTuple):
    """What `hj.select` takes, for one sequence: q [1, T, H, D] and k [1, S, D] bfloat16, w [1, T, H] float32."""

    q: np.ndarray
    k: np.ndarray
    w: np.ndarray


class Ngrams:
    """The n-grams that end at each token of a text: their hashes and rarities, [S] each, by order."""

    def __init__(self, tokens: list[str], seed: int = 0) -> None:
        ids, surprisals = _of_tokens(tokens)
        sums = np.cumsum(np.concatenate([[0.0], surprisals]))
        mean = sums[-1] / len(tokens)
        # A text of one single word has no surprise at all.
        self.rarities = {n: _window_means(sums, n) / mean if mean else np.ones(len(tokens)) for n in ORDERS}
        self.hashes = _rolling_hashes(ids)
        self.seed = seed

    def contexts(self, n: int, first: int, end: int) -> np.ndarray:
        """Context vectors of order n of the tokens first .. end - 1: [end - first, D] float32, of norm 1."""
        start = max(first - (1 << _WINDOW_LOG2) + 1, 0)
        total = self._signs(n, start, end)
        for step in (1 << i for i in range(_WINDOW_LOG2)):
            # Doubling: after this each row holds the decayed sum of the last 2 * step rows.
            total[step:] += np.float32(_DECAY**step) * total[:-step]
        return _normed(total[first - start :])

    def inputs(self, n_keys: int, query_positions: np.ndarray) -> Inputs:
        """Keys of the first `n_keys` tokens, queries and weights at some positions [T] among them."""
        q, w = self._queries(query_positions)
        return Inputs(q[None], self._keys(n_keys)[None], w[None])

    def _keys(self, n_keys: int) -> np.ndarray:
        keys = np.empty((n_keys, D), ml_dtypes.bfloat16)
        for first in range(0, n_keys, _TILE):
            end = min(first + _TILE, n_keys)
            keys[first:end] = _normed(sum(n**-0.5 * self.contexts(n, first, end) for n in ORDERS))
        return keys

    def _queries(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        views = np.random.default_rng(self.seed).permuted(np.tile(np.arange(D) < D // 2, (VIEWS, 1)), axis=1)
        q = np.empty((len(positions), len(ORDERS), VIEWS, D), np.float32)
        w = np.empty((len(positions), len(ORDERS), VIEWS), np.float32)
        for i, n in enumerate(ORDERS):
            contexts = np.concatenate([self.contexts(n, t, t + 1) for t in positions.tolist()])
            q[:, i] = _normed(contexts[:, None] * views)
            w[:, i] = (n * D * H) ** -0.5 * self.rarities[n][positions, None] * _VIEW_SIGNS
        return q.reshape(-1, H, D).astype(ml_dtypes.bfloat16), w.reshape(-1, H)

    def _signs(self, n: int, first: int, end: int) -> np.ndarray:
        """[end - first, D] float32 of +-1: D bits of splitmix64 from each hash on."""
        key = np.random.default_rng((self.seed, n)).integers(1 << 63, dtype=np.uint64)
        steps = np.arange(1, D // 64 + 1, dtype=np.uint64) * np.uint64(_ODD)
        words = _mixed((self.hashes[n][first:end, None] ^ key) + steps)
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1)
        return bits.astype(np.float32) * 2 - 1


class Task(NamedTuple):
    """Queries with their right answers.

    Attributes:
        positions: [T] int64, ascending, where the queries stand.
        places: of each query, the earlier positions with the same n-gram, ascending; empty where there is none.
        orders: of each query, the n of that n-gram, the longest that has a place; 0 where there is none.
    """

    positions: np.ndarray
    places: list[np.ndarray]
    orders: list[int]


def task(ngrams: Ngrams, context: int, n_queries: int, recent: int) -> Task:
    """Takes queries from the last 4096 positions of a context: longest n-grams first, spread evenly among equals.

    Args:
        recent: places among so many tokens before the query do not count: they are too easy.
    """
    candidates = np.arange(max(context - shapes.PREFILL.T, 0), context)
    n_queries = min(n_queries, len(candidates))
    found: dict[int, tuple[int, np.ndarray]] = {}  # position -> order, places
    chosen: list[int] = []
    for n in (*reversed(_ANSWER_ORDERS), 0):
        rest = [t for t in candidates.tolist() if t not in found]
        new = _places(ngrams.hashes[n][:context], rest, recent) if n else dict.fromkeys(rest, np.empty(0, np.int64))
        found |= {t: (n, places) for t, places in new.items()}
        # What stands everywhere has no right answer that a selection could miss.
        usable = [t for t, places in new.items() if len(places) <= _MAX_PLACES]
        chosen += spread(usable, n_queries - len(chosen))
    chosen.sort()
    return Task(np.array(chosen), [found[t][1] for t in chosen], [found[t][0] for t in chosen])


def _places(hashes: np.ndarray, positions: list[int], recent: int) -> dict[int, np.ndarray]:
    """Of each position that has any: the positions with the same hash before its `recent` last tokens, ascending."""
    order = np.argsort(hashes, kind="stable")
    first, end = (np.searchsorted(hashes[order], hashes[positions], side=side) for side in ("left", "right"))
    equal = {t: order[a:b] for t, a, b in zip(positions, first, end, strict=True)}
    far = {t: places[places <= t - recent] for t, places in equal.items()}
    return {t: places for t, places in far.items() if len(places)}


def spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced."""
    count = min(count, len(values))
    return [values[(2 * i + 1) * len(values) // (2 * count)] for i in range(count)]


def _of_tokens(tokens: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash, uint64, and surprisal, -log of the frequency in the text, of each token: [S] each."""
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(token, len(vocabulary)) for token in tokens])
    # Python's own hash of a str differs from run to run.
    digests = b"".join(hashlib.blake2b(token.encode(), digest_size=8).digest() for token in vocabulary)
    surprisals = -np.log(np.bincount(ids) / len(ids))
    return np.frombuffer(digests, "<u8").astype(np.uint64)[ids], surprisals[ids]


def _rolling_hashes(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Hash of the n tokens that end at each position, by order: a polynomial in the token hashes modulo 2^64."""
    total, hashes = np.zeros_like(ids), {}
    for j in range(ORDERS[-1]):
        total[j:] += ids[: len(ids) - j] * np.uint64(pow(_ODD, j, 1 << 64))
        hashes[j + 1] = _mixed(total)
    return {n: hashes[n] for n in ORDERS}


def _mixed(x: np.ndarray) -> np.ndarray:
    """Splitmix64's finaliser: each bit of the result depends on all bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _window_means(sums: np.ndarray, n: int) -> np.ndarray:
    """Mean of the last n values (fewer at the start) before each place of their running sums [S + 1]."""
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - n, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _normed(x: np.ndarray) -> np.ndarray:
    """Rows of norm 1; rows of zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
