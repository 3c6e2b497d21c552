"""The scan put together from a backend's stages: candidates by a few heads, then the exact indexer among them.

    scan_heads       what each query scans with
    scan_sort_keys   every so many keys by it; `kth` of them is a threshold that about as many keys reach as are wanted
    scan_masks       every key by it: a bit, whether it reaches the threshold
    list_tokens      the tokens whose bits are set
    refine_tokens    their exact scores, and the best

A sample tells within a few percent how many keys reach a threshold. So a query has all that do if they are at least the
`candidates` it is to have and at most half as many more. Otherwise other thresholds are tried (`_search`).

A few queries have their scan scores of all keys written: then `list_best` samples these, and looks again where a sample
misleads. So few launches are left, and the host waits for none:

    scan_heads, scan_all, list_best, refine_tokens
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, halfway
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.methods import Scan

_MAX_EXACT = 14  # beside two rows of the virtual head
_LISTED = 512  # capacities are multiples of this: whole tiles of the refinement
_MAX_CAPACITY = 32768  # of the selection in lists
_MAX_SAMPLES = 32768  # of a query: what `kth` takes
_RANK = 512  # of the threshold among the samples, where there may be so many: counts then err by a twentieth
_DEVIATIONS = 5  # standard ones of a count, by which more are aimed at than are wanted
_BYTES = 2**30  # of what all queries at a time leave in memory
FEW = 132  # queries: of these each has a multiprocessor for its list
_FEW_KEYS = 2**19  # of a sequence: the bits of as many fit into shared memory twice
_FEW_BYTES = 2**29  # of their sort keys
_FEW_SAMPLES = 16384  # of each: what registers of a multiprocessor hold
_FEW_DEVIATIONS = 3.5  # one list in 4000 is looked for again, by its own program

# How a call is scanned: as the flat indexer does, which is faster; `select_few`; `select`.
Way = Literal["flat", "lists", "samples"]
Lists = tuple[Array, Array]  # [T, capacity] int32 tokens, ascending, then -1; [T] int32, how many


class ScanStages(Protocol):
    """What a backend brings for the scan."""

    def scan_heads(self, call: FlatCall, method: Scan, interpret: Interpret = False) -> ScanHeads:
        """What each query scans with."""
        ...

    def scan_sort_keys(self, call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False) -> Array:
        """Sort keys of the scan scores of every `step`-th key of its sequence: [T, n] int32; unseen ones: anything."""
        ...

    def scan_all(
        self, call: FlatCall, heads: ScanHeads, step: int, interpret: Interpret = False
    ) -> tuple[Array, Array | None]:
        """Of few queries, `scan_sort_keys` of every key, and maybe those of every `step`-th one apart."""
        ...

    def list_best(
        self,
        sort_keys: Array,
        samples: Array | None,
        visible: Array,
        ask: "Ask",
        method: Scan,
        interpret: Interpret = False,
    ) -> Lists:
        """Of what `scan_all` gives, the tokens of the best, and those that are always kept."""
        ...

    def kth(self, sort_keys: Array, limit: Array, rank: Array, interpret: Interpret = False) -> Array:
        """[T, n], [T], [T] int32 -> [T]: the rank-th largest of each row's first `limit`, or what so many reach."""
        ...

    def scan_masks(
        self, call: FlatCall, heads: ScanHeads, threshold: Array, method: Scan, interpret: Interpret = False
    ) -> Array:
        """[T, words] int32: bit c % 32 of word c // 32 says whether a query takes token c of its sequence.

        It takes visible ones whose sort key is at least `threshold` [T] int32, and those that are always kept. Words
        that hold none before `call.visible` may be anything.
        """
        ...

    def list_tokens(
        self,
        masks: Array,
        visible: Array,
        capacity: int,
        ties: tuple[Array, Array] | None = None,
        interpret: Interpret = False,
    ) -> Lists:
        """The tokens in masks; a longer list than `capacity` is counted, but no list.

        With `ties`, masks that hold these and [T] int32, also so many of the first tokens that they alone have.
        """
        ...

    def refine_tokens(
        self, call: FlatCall, tokens: Array, count: Array, topk: int, interpret: Interpret = False
    ) -> tuple[Array, Array]:
        """The best of the listed tokens, [T, capacity]: [T, topk], ascending, then -1; [T] count."""
        ...


def why_not(method: Scan, keeps_sketch: bool) -> str | None:
    """None, or why no backend can run a method on keys in pages that keep a sketch, or on others."""
    if method.unit != 1:
        return f"has no kernels for a Scan of unit={method.unit}"
    if method.sketch is not None and not keeps_sketch:
        return f'has no kernels for a Scan of sketch="{method.sketch}", but on pages that keep it'
    if method.exact_heads > _MAX_EXACT:
        return f"needs at most {_MAX_EXACT} exact heads of a Scan, not {method.exact_heads}"
    if capacity(method.block_topk) > _MAX_CAPACITY:
        return f"needs at most {_MAX_CAPACITY * 2 // 3} candidates, not {method.candidates}"
    return None


def capacity(candidates: int) -> int:
    """Room in a query's list: for half as many again as it is to have."""
    return -(-(candidates + candidates // 2) // _LISTED) * _LISTED


def sample_step(candidates: int, max_keys: int, max_samples: int = _MAX_SAMPLES) -> int:
    """Of how many keys one is sampled: a power of two."""
    least = -(-max_keys // max_samples)
    return max(1 << (max(candidates // _RANK, 1).bit_length() - 1), 1 << (least - 1).bit_length())


def queries_at_a_time(method: Scan, max_keys: int) -> int:
    """A power of two, so that masks, samples and lists with their sort keys stay within a GiB.

    Mosaic's masks and samples have rows for whole groups, which sequences of fewer queries do not fill: of one query
    each 8 times as many, with 8 rows a query.
    """
    samples = max_keys // sample_step(method.block_topk, max_keys)
    each = max_keys // 8 + 4 * samples + 2 * 4 * capacity(method.block_topk)
    return 1 << (max(_BYTES // each, 1).bit_length() - 1)


class Ask(NamedTuple):
    """How many tokens a query is to have: `least` at least, if it sees so many, and `most` at most.

    Attributes: the first threshold is the `rank`-th best of the sort keys of every `step`-th key.
    """

    least: int
    most: int
    rank: int
    step: int


def ask_of(method: Scan, max_keys: int, max_samples: int = _MAX_SAMPLES, deviations: float = _DEVIATIONS) -> Ask:
    m, most = method.block_topk, capacity(method.block_topk)
    step = sample_step(m, max_keys, max_samples)
    rank = min(math.ceil(m / step + deviations * math.sqrt(m / step)), (m + most) // (2 * step))
    return Ask(m, most, rank, step)


def way_of(call: FlatCall, topk: int) -> Way:
    """By lists from the sort keys of all keys, where queries are so few that these are written, or by samples."""
    del topk
    T, n = call.q.shape[0], call.sequences.max_keys
    return "lists" if T <= FEW and n <= _FEW_KEYS and 4 * T * n <= _FEW_BYTES else "samples"


def select_few(stages: ScanStages, call: FlatCall, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
    """`select` of queries so few that the sort keys of all keys are written."""
    heads = stages.scan_heads(call, method, interpret)
    ask = ask_of(method, call.sequences.max_keys, _FEW_SAMPLES, _FEW_DEVIATIONS)
    sort_keys, samples = stages.scan_all(call, heads, ask.step, interpret)
    lists = stages.list_best(sort_keys, samples, call.visible, ask, method, interpret)
    return stages.refine_tokens(call, *lists, method.topk, interpret)


def select(stages: ScanStages, call: FlatCall, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
    """The selection of a scan that is not the flat indexer: [T, topk] int32, ascending, then -1; [T] int32 count."""
    visible = call.visible
    m, most, rank, step = ask_of(method, call.sequences.max_keys)
    heads = stages.scan_heads(call, method, interpret)
    n_samples = -(-visible // step)
    samples = stages.scan_sort_keys(call, heads, step, interpret)

    def threshold_of(rank: Array) -> Array:
        return stages.kth(samples, n_samples, rank, interpret)

    def marked(call: FlatCall, threshold: Array) -> Array:
        return stages.scan_masks(call, heads, threshold, method, interpret)

    takes_all = (visible <= most) | (n_samples < rank)
    threshold = jnp.where(takes_all, INVISIBLE + 1, threshold_of(jnp.full_like(visible, rank)))
    lists = stages.list_tokens(marked(call, threshold), visible, most, interpret=interpret)

    def refined(lists: Lists) -> tuple[Array, Array]:
        return stages.refine_tokens(call, *lists, method.topk, interpret)

    def search() -> tuple[Array, Array]:
        above = lambda threshold: _count(samples, n_samples, threshold)  # noqa: E731
        return refined(
            _search(stages, call, _Search(m, most, threshold_of, above, marked), threshold, lists, interpret)
        )

    # Both branches refine: lists that left them would be copied, 0.1 ms of 4096 queries.
    return lax.cond(jnp.all(_is_good(lists[1], visible, m, most)), lambda: refined(lists), search)


class _Search(NamedTuple):
    """What a search asks: `least` tokens at least of a query that sees so many, and `most` at most.

    Attributes:
        threshold_of: rank among the samples -> threshold; `rank_of`: threshold -> how many samples reach it; [T] int32.
        marked: a call and its thresholds -> masks.
    """

    least: int
    most: int
    threshold_of: Callable[[Array], Array]
    rank_of: Callable[[Array], Array]
    marked: Callable[[FlatCall, Array], Array]


def _is_good(count: Array, visible: Array, least: int, most: int) -> Array:
    """[T] bool: whether so many tokens are neither too few nor too many."""
    return (count >= jnp.minimum(visible, least)) & (count <= most)


def _search(
    stages: ScanStages, call: FlatCall, search: _Search, threshold: Array, lists: Lists, interpret: Interpret
) -> Lists:
    """Lists of the right length for the queries that have none, by other thresholds than the first one.

    Too many tokens reach `low`, too few `high` + 1. In turn the samples say which threshold between to try, and the
    middle is tried: they may mislead, and halving ends. Where no sort key is left between, more tie at `low` than there
    is room for, and the first of them are taken.
    """
    visible, least, most = call.visible, search.least, search.most

    def is_open(state: tuple) -> Array:
        low, high, _, (_, count), _ = state
        return ~_is_good(count, visible, least, most) & (low < high)

    def narrow(state: tuple) -> tuple:
        low, high, threshold, (tokens, count), i = state
        goes_on = is_open(state)
        aim = search.rank_of(threshold).astype(jnp.float32) * ((least + most) / 2) / jnp.maximum(count, 1)
        by_samples = search.threshold_of(jnp.maximum(aim.astype(jnp.int32), 1))
        guess = jnp.where(i % 2 == 0, jnp.clip(by_samples, low + 1, high), halfway(low, high))
        threshold = jnp.where(goes_on, guess, threshold)
        again = dataclasses.replace(call, visible=jnp.where(goes_on, visible, 0))
        masks = search.marked(again, threshold)
        new_tokens, new_count = stages.list_tokens(masks, again.visible, most, interpret=interpret)
        count = jnp.where(goes_on, new_count, count)
        return (
            jnp.where(goes_on & (count > most), threshold, low),
            jnp.where(goes_on & (count < least), threshold - 1, high),
            threshold,
            (jnp.where(goes_on[:, None], new_tokens, tokens), count),
            i + 1,
        )

    count = lists[1]
    start = (
        jnp.where(count > most, threshold, INVISIBLE + 1),
        jnp.where(count > most, FORCED, threshold - 1),
        threshold,
        lists,
        jnp.int32(0),
    )
    low, _, _, lists, _ = lax.while_loop(lambda state: jnp.any(is_open(state)), narrow, start)
    is_tied = ~_is_good(lists[1], visible, least, most)

    def with_ties() -> Lists:
        tied = dataclasses.replace(call, visible=jnp.where(is_tied, visible, 0))
        at_least, above = search.marked(tied, low), search.marked(tied, low + 1)
        n_above = stages.list_tokens(above, tied.visible, most, interpret=interpret)[1]
        tokens, count = stages.list_tokens(above, tied.visible, most, (at_least, least - n_above), interpret=interpret)
        return jnp.where(is_tied[:, None], tokens, lists[0]), jnp.where(is_tied, count, lists[1])

    return lax.cond(jnp.any(is_tied), with_ties, lambda: lists)


def _count(samples: Array, n: Array, threshold: Array) -> Array:
    """[T, W] int32, [T], [T] -> [T] int32: how many of the first n of each row reach its threshold."""
    there = jnp.arange(samples.shape[1], dtype=jnp.int32)[None, :] < n[:, None]
    return jnp.sum(there & (samples >= threshold[:, None]), axis=1, dtype=jnp.int32)
