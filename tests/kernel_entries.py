"""What indexers differ in, by kernels: in one piece, packed and in pages, against the oracle.

Keys that are entries, few heads, a choice a head, no activation, blocks by their best token, lists and budgets.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.pallas import Kernels
from tests import draw, oracle


class Case(NamedTuple):
    """A method and its heads; keys of a block that lists name, and whether there are budgets."""

    method: hj.Method
    H: int = 16
    listed: int = 0
    has_budget: bool = False


def entries(size):
    """Blocks of `size` entries."""
    return {
        "dsa": Case(hj.Dsa(topk=40, entry_size=4, tail="open")),
        "hisa": Case(hj.Hisa(topk=40, block_size=size, block_topk=3, entry_size=4, tail="open")),
        "block_sparse": Case(hj.BlockSparse(topk=3 * size, block_size=size, entry_size=4, returns="entries")),
    }


def heads(size):
    """Other heads than kernels have."""
    return {
        "four_heads_over_pools": Case(hj.Dsa(topk=40, entry_size=4, tail="open"), H=4),
        "each_head_without_activation": Case(hj.Dsa(topk=40, per_head=True, activation=None), H=2),
        "sixteen_without_activation": Case(hj.Hisa(topk=40, block_size=size, block_topk=3, activation=None)),
    }


def best_tokens(size):
    """Blocks by their best token: of a head by itself, and of several."""
    small = dict(topk=2 * size, keep_first=0, scored_by="max")
    return {
        "each_head_by_its_best_token": Case(
            hj.BlockSparse(block_size=size, activation=None, per_head=True, **small), H=2
        ),
        "small_blocks_by_their_best_token": Case(hj.BlockSparse(block_size=8, keep_last=0, **small)),
        "odd_blocks_of_one_head": Case(hj.BlockSparse(topk=60, block_size=12, scored_by="max"), H=1),
    }  # fmt: skip


def limits(size):
    """Published lists, budgets of tokens and of blocks, and a ratio of blocks."""
    return {
        "list_of_tokens": Case(hj.Dsa(topk=12), listed=1),
        "list_of_blocks_and_budget": Case(hj.Dsa(topk=40), listed=8, has_budget=True),
        "list_of_large_blocks": Case(hj.Dsa(topk=40), listed=size),
        "list_of_large_blocks_and_budget": Case(hj.Dsa(topk=3 * size), listed=size, has_budget=True),
        "list_of_large_blocks_a_head": Case(hj.Dsa(topk=10 * size, per_head=True), H=2, listed=size),
        "list_a_head": Case(hj.Dsa(topk=10, per_head=True), H=2, listed=4),
        "budget_of_tokens": Case(hj.Dsa(topk=40), has_budget=True),
        "budget_of_hisa": Case(hj.Hisa(topk=40, block_size=size, block_topk=3), has_budget=True),
        "budget_of_blocks": Case(hj.BlockSparse(topk=3 * size, block_size=size), has_budget=True),
        "budget_of_best_tokens": Case(
            hj.BlockSparse(topk=64, block_size=8, keep_first=0, keep_last=0, scored_by="max"), has_budget=True
        ),
        "ratio": Case(hj.Hisa(topk=2 * size, block_size=size, block_topk=4, block_ratio=2)),
    }  # fmt: skip


def check(monkeypatch, name, size, case, interpret):
    """Two sequences of which one ends with an entry's third token; pages of `size` keys."""
    kernels = Kernels(lambda: dispatch.backend(name), flat_if_all_kept=name == "mosaic_tpu", interpret=interpret)
    own = dispatch.Implementation(why_not=lambda device, problem: None, select=kernels.select)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, own)
    method, r, n = case.method, case.method.entry_size, np.array([3 * size + 8, 3 * size + 5])
    q, k, w = (x[0] for x in draw.inputs(1, 5, n.sum(), case.H, 64, dtype="bfloat16"))
    w = None if method.per_head else w
    cu_q, cu_k = np.array([0, 2, 5], np.int32), np.array([0, *np.cumsum(n)], np.int32)
    lengths = (n * r + [(r - 1), 0]).astype(np.int32)
    limits, listed = _limits(case, n)
    wanted = oracle.select_packed(q, k, w, cu_q, cu_k, method, lengths=lengths, **limits, candidate_size=case.listed)
    options = dict(implementation=name, return_scores=True)
    q, w, cu_q, lengths, budget = (
        None if x is None else jnp.asarray(x) for x in (q, w, cu_q, lengths, limits["budget"])
    )

    some = dict(candidates=listed, budget=budget) | options
    packed = hj.select_packed(q, jnp.asarray(k), w, cu_q, jnp.asarray(cu_k), method, lengths=lengths, **some)
    table = jnp.asarray(np.random.default_rng(0).permutation(10).reshape(2, 5), jnp.int32)
    cache, starts = hj.init_cache(10, size, 64, jnp.bfloat16, entry_size=r), jnp.asarray(cu_k * r)
    cache = hj.append(cache, jnp.asarray(np.repeat(k, r, axis=0)), table, starts, jnp.array([0, 0]))
    pages = hj.select_paged(q, w, cache, table, cu_q, lengths, method, **some)
    for got in (packed, pages):
        oracle.assert_same_selection(got.indices, got.count, wanted, 2e-2, scores=got.scores)

    first = dict(
        candidates=None if listed is None else hj.CandidateBlocks(listed.ids[None, :2], listed.block_size),
        budget=None if budget is None else budget[None, :2],
    )
    w = None if w is None else w[None, :2]
    alone = hj.select(
        q[None, :2], jnp.asarray(k)[None, : n[0]], w, method, lengths=lengths[:1], **first, **options
    )  # fmt: skip
    np.testing.assert_array_equal(alone.count[0], wanted.count[:2])


def _limits(case, n):
    """For the oracle; and the lists for `select`."""
    rng = np.random.default_rng(0)
    ids = budget = listed = None
    if case.listed:
        shape = (5, case.H, 9) if case.method.per_head else (5, 9)
        ids = rng.integers(-1, n.max() // case.listed + 2, shape).astype(np.int32)
        listed = hj.CandidateBlocks(jnp.asarray(ids), case.listed)
    if case.has_budget:
        budget = rng.integers(-1, case.method.topk + 2, 5).astype(np.int32)
    return dict(candidates=ids, budget=budget), listed
