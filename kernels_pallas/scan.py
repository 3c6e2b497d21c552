"""The scan put together from a backend's stages: candidates by a few heads, then the exact indexer among them.

    scan_heads       what each query scans with
    scan_sort_keys   every so many keys by it; `kth` of them is a threshold that about as many keys reach as are wanted
    scan_masks       every key by it: a bit, whether it reaches the threshold
    list_tokens      the tokens whose bits are set
    refine_tokens    their exact scores, and the best

A sample tells within a few percent how many keys reach a threshold. So a query has all that do if they are at least the
`candidates` it is to have and at most half as many more. Otherwise other thresholds are tried (`_by_other_thresholds`).

A few queries have their scan scores of all keys written: then `list_best` samples these, and looks again where a sample
misleads. So few launches are left, and the host waits for none:

    scan_heads, scan_all, list_best, refine_tokens

Where several devices share the keys, all scan with the same heads, by samples that they exchange (scan_samples.py). The
threshold is that of the samples of all, and the number of candidates is the sum of what each has, which it scores by
itself. Each always has its own first and last tokens, and so more than would have to be.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.communicator import Communicator
from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.kernels_pallas.scan_samples import Samples, of_all_devices
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, KTH_SLACK, halfway
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
Found = tuple[Array, Array]  # as in select_shard.py


class ScanStages(Protocol):
    """What a backend brings for the scan."""

    def scan_heads(
        self, call: FlatCall, method: Scan, interpret: Interpret = False, samples: Samples | None = None
    ) -> ScanHeads:
        """What each query scans with; `samples`: of all devices that share the keys."""
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

    def best_samples(self, call: FlatCall, sort_keys: Array, n: Array, k: int, interpret: Interpret = False) -> Array:
        """[T, k]: the best of the first `n` [T] that `scan_sort_keys` gives of each query; of none anything."""
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
        """The best of the listed tokens, [T, capacity]: [T, topk], ascending, then -1; [T] count.

        Lists of fewer than topk are all that a query sees.
        """
        ...

    def best_listed(self, call: FlatCall, tokens: Array, count: Array, k: int, interpret: Interpret = False) -> Found:
        """The best k of the listed tokens and their sort keys; fewer may be listed. Of an empty list: anything."""
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
    """Room in a query's list, at least: for half as many again as it is to have."""
    return -(-(candidates + candidates // 2) // _LISTED) * _LISTED


def sample_step(candidates: int, max_keys: int, max_samples: int = _MAX_SAMPLES) -> int:
    """Of how many keys one is sampled: a power of two."""
    least = -(-max_keys // max_samples)
    return max(1 << (max(candidates // _RANK, 1).bit_length() - 1), 1 << (least - 1).bit_length())


def queries_at_a_time(method: Scan, max_keys: int, n_devices: int = 1) -> int:
    """A power of two, so that masks, samples and lists with their sort keys stay within a GiB.

    Mosaic's masks and samples have rows for whole groups, which sequences of fewer queries do not fill: of one query
    each 8 times as many, with 8 rows a query.
    """
    ask = ask_of(method, n_devices * max_keys)
    each = max_keys // 8 + 4 * (max_keys // ask.step) + 2 * 4 * ask.most
    return 1 << (max(_BYTES // each, 1).bit_length() - 1)


class Ask(NamedTuple):
    """How many tokens a query is to have: `least` at least, if it sees so many, and `most` at most.

    Attributes: the first threshold is the `rank`-th best of the sort keys of every `step`-th key.
    """

    least: int
    most: int
    rank: int
    step: int


def ask_of(method: Scan, max_keys: int, max_samples: int = _MAX_SAMPLES, deviations: float | None = None) -> Ask:
    """Of sequences so long that samples have to be far apart, more room: else a query of each thousand was unlucky."""
    m, away = method.block_topk, _DEVIATIONS if deviations is None else deviations
    step = sample_step(m, max_keys, max_samples)
    aim = m / step + away * math.sqrt(m / step)
    likely = step * (aim + aim / KTH_SLACK + away * math.sqrt(aim))
    most = max(capacity(m), min(-(-math.ceil(likely) // _LISTED) * _LISTED, _MAX_CAPACITY))
    return Ask(m, most, min(math.ceil(aim), (m + most) // (2 * step)), step)


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
    heads = stages.scan_heads(call, method, interpret)

    def refine(lists: Lists) -> tuple[Array, Array]:
        return stages.refine_tokens(call, *lists, method.topk, interpret)

    return _scan(_Scan(stages, call, heads, method, call.visible, None, interpret), refine)


def best_of_share(
    stages: ScanStages,
    call: FlatCall,
    seen: Array,
    method: Scan,
    k: int,
    devices: Communicator,
    interpret: Interpret = False,
) -> Found:
    """`select` on one of several devices that share the keys: the best k of this one's candidates, and their sort keys.

    The candidates of all devices hold those that one device with all keys would have to have.

    Args:
        call: the keys, or pages, that this device has, and what queries see of those.
        seen: [T] int32, tokens that each query sees on all devices.
    """
    samples = None if method.slopes == "plain" else of_all_devices(call, seen, devices)
    heads = stages.scan_heads(dataclasses.replace(call, visible=seen), method, interpret, samples)

    def refine(lists: Lists) -> Found:
        sort_keys, positions = stages.best_listed(call, *lists, k, interpret)
        return sort_keys, jnp.where((lists[1] > 0)[:, None], positions, -1)  # of an empty list there may be anything

    return _scan(_Scan(stages, call, heads, method, seen, devices, interpret), refine)


class _Scan(NamedTuple):
    """What is scanned, by what, for whom.

    Attributes:
        call: the keys that this device has, and what queries see of those; `seen`: [T] int32, the same on all devices.
        devices: those that share the keys; None: there is one.
    """

    stages: ScanStages
    call: FlatCall
    heads: ScanHeads
    method: Scan
    seen: Array
    devices: Communicator | None
    interpret: Interpret

    def total(self, x: Array) -> Array:
        """The sum over all devices."""
        return x if self.devices is None else self.devices.total(x)

    def lists(self, call: FlatCall, threshold: Array, most: int) -> Lists:
        """This device's tokens whose scan score reaches the threshold."""
        return self.stages.list_tokens(self.marked(call, threshold), call.visible, most, interpret=self.interpret)

    def marked(self, call: FlatCall, threshold: Array) -> Array:
        """Masks of them."""
        return self.stages.scan_masks(call, self.heads, threshold, self.method, self.interpret)


class _Search(NamedTuple):
    """What a search asks: `least` tokens at least of a query that sees so many, and `most` at most, of all devices.

    Attributes:
        threshold_of: rank among the samples -> threshold; `rank_of`: threshold -> how many samples reach it; [T] int32.
    """

    least: int
    most: int
    threshold_of: Callable[[Array], Array]
    rank_of: Callable[[Array], Array]

    def is_good(self, count: Array, seen: Array) -> Array:
        """[T] bool: whether so many tokens are neither too few nor too many."""
        return (count >= jnp.minimum(seen, self.least)) & (count <= self.most)


def _scan[Result](scan: _Scan, refine: Callable[[Lists], Result]) -> Result:
    """What `refine` makes of this device's lists of tokens."""
    call, seen, n_devices = scan.call, scan.seen, 1 if scan.devices is None else scan.devices.n
    m, most, rank, step = ask_of(scan.method, n_devices * call.sequences.max_keys)
    search = _Search(m, most, *_samples(scan, step, rank))
    # A query that sees more than it may have candidates sees more samples than `rank`.
    threshold = jnp.where(seen <= most, INVISIBLE + 1, search.threshold_of(jnp.full_like(seen, rank)))
    lists = scan.lists(call, threshold, most)
    count = scan.total(lists[1])
    # Both branches refine: lists that left them would be copied, 0.1 ms of 4096 queries.
    return lax.cond(
        jnp.all(search.is_good(count, seen)),
        lambda: refine(lists),
        lambda: refine(_by_other_thresholds(scan, search, threshold, lists, count)),
    )


def _samples(scan: _Scan, step: int, rank: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """`threshold_of` and `rank_of` of a search, by the scan scores of every `step`-th key that each device has.

    Of several devices each hands out the best of its own, as many as ranks may be that are asked for after `rank`: at
    1M these are 2 % of all. Where more are asked for, the answer is the last of them.
    """
    stages, interpret, n = scan.stages, scan.interpret, -(-scan.call.visible // step)
    samples = stages.scan_sort_keys(scan.call, scan.heads, step, interpret)

    def rank_of(threshold: Array) -> Array:
        return scan.total(_count(samples, n, threshold))

    if scan.devices is None:
        return lambda rank: stages.kth(samples, n, rank, interpret), rank_of
    width, most = -(-scan.call.sequences.max_keys // step), rank + rank // 2
    if width > most:
        best = stages.best_samples(scan.call, samples, n, most, interpret)
        own = jnp.where((n > 0)[:, None], best, INVISIBLE)
    else:
        own = jnp.where(jnp.arange(width, dtype=jnp.int32)[None, :] < n[:, None], samples[:, :width], INVISIBLE)
    of_all = scan.devices.map_rows(own, INVISIBLE)

    def kth(samples: Array, rank: Array) -> Array:
        return stages.kth(samples, jnp.full_like(rank, samples.shape[1]), rank, interpret)

    return lambda rank: of_all(kth, rank), rank_of


def _by_other_thresholds(scan: _Scan, search: _Search, threshold: Array, lists: Lists, count: Array) -> Lists:
    """Lists of the right length for the queries that have none, by other thresholds than the first one.

    Too many tokens reach `low`, too few `high` + 1. In turn the samples say which threshold between to try, and the
    middle is tried: they may mislead, and halving ends. Where no sort key is left between, more tie at `low` than there
    is room for, and the first of them are taken, on each of several devices.
    """
    call, seen, least, most = scan.call, scan.seen, search.least, search.most

    def is_open(state: tuple) -> Array:
        low, high, _, _, count, _ = state
        return ~search.is_good(count, seen) & (low < high)

    def narrow(state: tuple) -> tuple:
        low, high, threshold, lists, count, i = state
        goes_on = is_open(state)
        aim = search.rank_of(threshold).astype(jnp.float32) * ((least + most) / 2) / jnp.maximum(count, 1)
        by_samples = search.threshold_of(jnp.maximum(aim.astype(jnp.int32), 1))
        guess = jnp.where(i % 2 == 0, jnp.clip(by_samples, low + 1, high), halfway(low, high))
        threshold = jnp.where(goes_on, guess, threshold)
        again = scan.lists(dataclasses.replace(call, visible=jnp.where(goes_on, call.visible, 0)), threshold, most)
        count = jnp.where(goes_on, scan.total(again[1]), count)
        return (
            jnp.where(goes_on & (count > most), threshold, low),
            jnp.where(goes_on & (count < least), threshold - 1, high),
            threshold,
            _of_either(goes_on, again, lists),
            count,
            i + 1,
        )

    start = (
        jnp.where(count > most, threshold, INVISIBLE + 1),
        jnp.where(count > most, FORCED, threshold - 1),
        threshold,
        lists,
        count,
        jnp.int32(0),
    )
    low, _, _, lists, count, _ = lax.while_loop(lambda state: jnp.any(is_open(state)), narrow, start)
    is_tied = ~search.is_good(count, seen)

    def with_ties() -> Lists:
        tied = dataclasses.replace(call, visible=jnp.where(is_tied, call.visible, 0))
        at_least, above = scan.marked(tied, low), scan.marked(tied, low + 1)
        listed = functools.partial(scan.stages.list_tokens, above, tied.visible, most, interpret=scan.interpret)
        n_above = scan.total(listed()[1])
        return _of_either(is_tied, listed((at_least, least - n_above)), lists)

    return lax.cond(jnp.any(is_tied), with_ties, lambda: lists)


def _of_either(is_first: Array, first: Lists, second: Lists) -> Lists:
    """[T] bool: which lists are those of the first."""
    return jnp.where(is_first[:, None], first[0], second[0]), jnp.where(is_first, first[1], second[1])


def _count(samples: Array, n: Array, threshold: Array) -> Array:
    """[T, W] int32, [T], [T] -> [T] int32: how many of the first n of each row reach its threshold."""
    there = jnp.arange(samples.shape[1], dtype=jnp.int32)[None, :] < n[:, None]
    return jnp.sum(there & (samples >= threshold[:, None]), axis=1, dtype=jnp.int32)
