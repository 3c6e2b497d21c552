"""Entries of several tokens, heads that choose by themselves, blocks by their best token, lists and budgets."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import dispatch
from tests import draw, oracle
from tests.contract import FAMILY, TOLERANCE

B, T, S, H, D = 2, 8, 150, 4, 32
POOLS = FAMILY["family_pools"]
# By the oracle everywhere; the others are in the exhaustive run.
IN_GATE = ("family_pools", "family_each_head")
LISTED = {"tokens": hj.Dsa(topk=6), "pools": POOLS, "heads": hj.Dsa(topk=6, per_head=True)}
each = pytest.mark.parametrize("name", FAMILY)


def inputs(method, seed=0):
    q, k, w = draw.inputs(B, T, S, H, D, seed=seed)
    return q, k, None if method.per_head else w


def check(got, reference, tolerance=TOLERANCE):
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)


def selected(select, *arrays, method, **options):
    """With scores and blocks; that these change nothing is a promise of its own."""
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    arrays = jax.tree.map(jnp.asarray, arrays)
    return select(
        *arrays, method=method, return_scores=True, return_blocks=method.has_blocks, implementation="xla", **options
    )


@each
@pytest.mark.gate(*IN_GATE)
def test_positions_within_entries_and_lengths_with_an_open_tail(name):
    method, r = FAMILY[name], FAMILY[name].entry_size
    rng = np.random.default_rng(0)
    options = dict(
        query_positions=rng.integers(-1, S * r + r, (B, T)).astype(np.int32),
        lengths=np.array([S * r + r - 1, 31 * r + 1], np.int32),
    )
    options["query_positions"][0] = [r - 2, r - 1, r, 2 * r - 1, 6 * r - 1, 6 * r, 33 * r, S * r + r - 2]
    got = selected(hj.select, *inputs(method), method=method, **options)
    check(got, oracle.select(*inputs(method), method, **options))


@each
@pytest.mark.gate("family_pools")
def test_empty_batches_give_empty_selections(name):
    method = FAMILY[name]
    for B, T, S in ((0, 3, 50), (2, 0, 50), (2, 3, 0)):
        q, k, w = draw.inputs(B, T, S, H, D)
        options = dict(method=method, query_positions=np.zeros((B, T), np.int32))
        got = selected(hj.select, q, k, None if method.per_head else w, **options)
        assert got.count.shape == ((B, T, H) if method.per_head else (B, T))
        assert got.indices.shape == got.scores.shape and got.indices.shape[:-1] == got.count.shape
        # Where there are no keys, the tokens of an open entry are chosen all the same.
        assert ((got.indices >= 0).sum(axis=-1) == got.count).all() and (method.tail or not got.count.any())


def test_tokens_of_pools_then_the_tail():
    """By hand: 3 pools of 4 with scores 1, 3, 2, and 2 tokens after them."""
    q, k = jnp.ones((1, 1, 1, 1)), jnp.array([[[1.0], [3.0], [2.0]]])
    method = hj.Dsa(topk=2, entry_size=4, tail="open")
    got = hj.select(q, k, None, method, lengths=jnp.array([14]), return_scores=True)
    assert got.indices.tolist() == [[[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, -1]]] and got.count.tolist() == [[10]]
    assert got.scores.tolist() == [[[3, 3, 3, 3, 2, 2, 2, 2, np.inf, np.inf, -np.inf]]]
    few = hj.select(q, k[:, :0], None, method, lengths=jnp.array([3]))
    assert few.indices.tolist() == [[[0, 1, 2, *[-1] * 8]]]
    entries = hj.select(q, k, None, hj.Dsa(topk=2, entry_size=4, returns="entries"), lengths=jnp.array([14]))
    assert entries.indices.tolist() == [[[1, 2]]]


def test_each_head_chooses_by_itself():
    q = jnp.array([[[[1.0, 0], [0, 1], [0, -1]]]])
    k = jnp.array([[[3.0, 1], [2, 2], [1, 3], [0, -9]]])
    got = hj.select(q, k, None, hj.Dsa(topk=1, per_head=True, activation=None), return_scores=True)
    assert got.indices.tolist() == [[[[0], [2], [3]]]] and got.scores.tolist() == [[[[3], [3], [9]]]]


def test_a_block_scores_what_its_best_visible_token_does():
    k = jnp.array([[[5.0], [0], [4], [4], [9], [1]]])
    method = hj.BlockSparse(topk=2, block_size=2, keep_first=0, keep_last=0, scored_by="max")
    q, positions = jnp.ones((1, 3, 1, 1)), jnp.array([[3, 4, 5]])
    got = hj.select(q, k, None, method, query_positions=positions, return_blocks=True)
    assert got.blocks.tolist() == [[[0], [2], [2]]] and got.indices.tolist() == [[[0, 1], [4, -1], [4, 5]]]


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("method", LISTED)
@pytest.mark.gate("pools-8")
def test_a_list_alone_is_scored_in_any_order_with_repeats_and_holes(method, block_size):
    method = LISTED[method]
    rng = np.random.default_rng(0)
    shape = (B, T, H, 9) if method.per_head else (B, T, 9)
    ids = rng.integers(-1, 24, shape).astype(np.int32)
    ids[0, 0], ids[0, 1, ..., :4] = -1, [2**31 - 1, -(2**31), S, 10**6]
    listed = hj.CandidateBlocks(jnp.asarray(ids), block_size)
    got = selected(hj.select, *inputs(method), method=method, candidates=listed)
    check(got, oracle.select(*inputs(method), method, candidates=ids, candidate_size=block_size))


@pytest.mark.parametrize("name", ["dsa", "hisa", "scan", "blocks", *FAMILY])
@pytest.mark.gate("family_each_head")
def test_a_budget_keeps_the_best_of_each_query(name):
    methods = dict(
        dsa=hj.Dsa(topk=24), hisa=hj.Hisa(topk=24, block_size=16, block_topk=4),
        scan=hj.Scan(topk=24, candidates=48, exact_heads=1), blocks=hj.BlockSparse(topk=64, block_size=16),
    ) | FAMILY  # fmt: skip
    method, rng = methods[name], np.random.default_rng(0)
    budget = rng.integers(-3, method.topk + 9, (B, T)).astype(np.int32)
    got = selected(hj.select, *inputs(method), method=method, budget=budget)
    check(got, oracle.select(*inputs(method), method, budget=budget))
    # Without scores, where few are seen: what is seen and what is allowed.
    few = rng.integers(0, method.topk * method.entry_size, (B, T)).astype(np.int32)
    options = dict(query_positions=few, budget=np.full((B, 1), 3, np.int32))
    got = hj.select(*jax.tree.map(jnp.asarray, inputs(method)), method, **jax.tree.map(jnp.asarray, options))
    check(got, oracle.select(*inputs(method), method, **options | dict(budget=np.full((B, T), 3))))


def packed(method, lengths, n_q, seed=0):
    """Packed sequences of so many tokens, and a row of padding after the queries and the keys."""
    lengths, n_q = np.array(lengths, np.int32), np.array(n_q, np.int32)
    n_k = lengths // method.entry_size
    q, _, w = (x[0] for x in draw.inputs(1, int(n_q.sum()) + 1, 1, H, D, seed=seed))
    _, k, _ = (x[0] for x in draw.inputs(1, 1, int(n_k.sum()) + 1, H, D, seed=seed))
    offsets = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (n_q, n_k))
    return (q, k, None if method.per_head else w), *offsets, lengths


def pages_of(method, k, cu_k, lengths, page_size, seed=0, dtype="float32", **on):
    """A cache that was written token by token and in chunks, with rejected tokens, truncated, and copied; its table.

    Rows of tokens that end no entry hold NaN.
    """
    r, R, rng = method.entry_size, len(lengths), np.random.default_rng(seed)
    P = -(-(lengths.max() + 9) // (r * page_size))
    pages = rng.permutation(3 * R * P).astype(np.int32)
    table, spare = pages[: R * P].reshape(R, P), pages[R * P :]
    cache = hj.init_cache(3 * R * P, page_size, D, dtype, entry_size=r)
    append, truncate = jax.jit(hj.append), jax.jit(hj.truncate, static_argnames="max_tokens")

    def rows(starts, ends, wrong):
        made = np.full((R * 64, D), np.nan, np.float32)
        each = [
            (-k[cu_k[i] + t // r] if wrong else k[cu_k[i] + t // r]) if t % r == r - 1 and (t < lengths[i] // r * r)
            else made[0]
            for i in range(R) for t in range(starts[i], ends[i])
        ]  # fmt: skip
        made[: len(each)] = each
        return jnp.asarray(made, dtype), jnp.asarray(np.concatenate([[0], np.cumsum(ends - starts)]), jnp.int32)

    done = np.zeros(R, np.int32)
    while (done < lengths).any():
        for wrong in (True, False):
            ends = np.minimum(done + rng.integers(0, 60, R), lengths).astype(np.int32)
            new, offsets = rows(done, ends, wrong)
            cache = append(cache, new, jnp.asarray(table), offsets, jnp.asarray(done))
            if wrong and rng.random() < 0.5:
                cache = truncate(cache, jnp.asarray(table), jnp.asarray(ends), jnp.asarray(done), max_tokens=60)
        done = ends
    # A fork: the first page of each lies elsewhere.
    cache = hj.copy_pages(cache, jnp.asarray(table[:, 0]), jnp.asarray(spare[:R]))
    table[:, 0] = spare[:R]
    return cache, jnp.asarray(table)


@each
@pytest.mark.gate("family_heads_and_pools")
def test_packed_batches_and_pages_select_alike(name):
    method, r = FAMILY[name], FAMILY[name].entry_size
    arrays, cu_q, cu_k, lengths = packed(method, [40 * r + r - 1, 17 * r, r - 1], [5, 3, 1])
    budget = np.arange(10, dtype=np.int32) * 3
    options = dict(lengths=lengths, budget=budget)
    got = selected(hj.select_packed, *arrays, cu_q, cu_k, method=method, **options)
    check(got, oracle.select_packed(*arrays, cu_q, cu_k, method, **options))
    q, k, w = arrays
    cache, table = pages_of(method, k, cu_k, lengths, page_size=2)
    paged = functools.partial(hj.select_paged, cache=cache, block_tables=table, lengths=jnp.asarray(lengths))
    pages = selected(paged, q, w, cu_seqlens_q=cu_q, method=method, budget=budget)
    jax.tree.map(np.testing.assert_array_equal, pages, got)


@pytest.mark.exhaustive
def test_blocks_by_their_best_token_may_be_parts_of_pages():
    method = FAMILY["family_block_max"]  # of 16
    arrays, cu_q, cu_k, lengths = packed(method, [150, 81, 3], [5, 3, 1])
    got = selected(hj.select_packed, *arrays, cu_q, cu_k, method=method, lengths=lengths)
    q, k, w = arrays
    cache, table = pages_of(method, k, cu_k, lengths, page_size=64)
    paged = functools.partial(hj.select_paged, cache=cache, block_tables=table, lengths=jnp.asarray(lengths))
    jax.tree.map(np.testing.assert_array_equal, selected(paged, q, w, cu_seqlens_q=cu_q, method=method), got)


def test_a_fork_and_what_it_grew_from_share_pages():
    method = hj.Dsa(topk=3, entry_size=4, tail="open")
    k = jnp.asarray(draw.inputs(1, 1, 40, 1, D).k[0])
    cache = hj.init_cache(6, 2, D, jnp.float32, entry_size=4)  # pages of 8 tokens
    table = jnp.array([[0, 1, 2], [0, 1, 3]], jnp.int32)
    cache = hj.append(cache, k[:17], table[:1], jnp.array([0, 17]), jnp.array([0]))
    cache = hj.copy_pages(cache, jnp.array([2]), jnp.array([3]))
    both = jnp.concatenate([k[17:20], -k[17:22]])
    cache = hj.append(cache, both, table, jnp.array([0, 3, 8]), jnp.array([17, 17]))
    assert cache.counts.tolist() == [2, 2, 1, 1, 0, 0] and cache.places.tolist() == [0, 1, 2, 2, -1, -1]
    np.testing.assert_array_equal(cache.keys[jnp.array([0, 0, 1, 1, 2]), jnp.array([0, 1, 0, 1, 0])], k[3:20:4])
    np.testing.assert_array_equal(cache.keys[3, 0], -k[19])
    q = jnp.ones((2, 1, D))
    got = hj.select_paged(q, None, cache, table, jnp.array([0, 1, 2]), jnp.array([20, 22]), method)
    assert got.count.tolist() == [12, 14] and got.indices[1, 12:].tolist() == [20, 21, -1]
    cut = hj.truncate(cache, table, jnp.array([20, 22]), jnp.array([19, 15]), max_tokens=7)
    assert cut.counts.tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hj.Dsa(entry_size=0), "Dsa(entry_size=0): must be at least 1"),
        (lambda: hj.Dsa(tail="open"), "Dsa(tail='open'): wanted an entry_size above 1: one token leaves none open"),
        (lambda: hj.Hisa(tail=True), "Hisa(tail=True): must be None or one of open"),
        (
            lambda: hj.Dsa(returns="entries"),
            "Dsa(returns='entries'): wanted an entry_size above 1: of one token they are tokens",
        ),
        (
            lambda: hj.Dsa(entry_size=4, tail="open", returns="entries"),
            "Dsa(tail='open', returns='entries'): the tail's tokens are no entries",
        ),
        (lambda: hj.Dsa(activation="gelu"), "Dsa(activation='gelu'): must be None or one of relu"),
        (
            lambda: hj.Dsa(activation=None, token_score=max),
            "Dsa(activation=None) with functions for token_score: no score is left to have one",
        ),
        (
            lambda: hj.Scan(activation=None),
            "Scan(activation=None): heads that are summed as they are scan as one: Dsa is as fast",
        ),
        (
            lambda: hj.Scan(per_head=True),
            "Scan(per_head=True): a head by itself leaves no others to be scanned as one",
        ),
        (lambda: hj.BlockSparse(scored_by="sum"), "BlockSparse(scored_by='sum'): must be one of mean, max"),
        (
            lambda: hj.BlockSparse(scored_by="max", pool=max),
            "BlockSparse(scored_by='max', pool=...): the best token's score leaves pool no use",
        ),
    ],
)
def test_what_means_nothing_says_so(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_calls_that_mean_nothing_say_so():
    q, k, w = map(jnp.asarray, draw.inputs(1, 2, 20, 4, 16))
    listed = hj.CandidateBlocks(jnp.zeros((1, 2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"^select: w with Dsa\(topk=4, per_head=True\), wanted None: each head"):
        hj.select(q, k, w, hj.Dsa(topk=4, per_head=True))
    with pytest.raises(ValueError, match=r"^select: candidates with Hisa\(.*\), wanted a Dsa: they are found already"):
        hj.select(q, k, w, hj.Hisa(topk=4), candidates=listed)
    with pytest.raises(
        ValueError, match="^select: k has room for 20 keys of 134217728 tokens each, wanted at most 214"
    ):
        hj.select(q, k, w, hj.Dsa(topk=4, entry_size=2**27, returns="entries"))
    got = hj.select(q, k, w, hj.Dsa(topk=4), candidates=hj.CandidateBlocks(jnp.zeros((1, 2, 3), jnp.int32), 2**31 - 1))
    np.testing.assert_array_equal(got.indices, hj.select(q, k, w, hj.Dsa(topk=4)).indices)
    cache, table, one = hj.init_cache(2, 2, 16, jnp.float32, entry_size=4), jnp.array([[0, 1]]), jnp.array([0, 1])
    with pytest.raises(ValueError, match=r"^select_paged: Dsa\(topk=4\) with a cache of entry_size=4"):
        hj.select_paged(q[0, :1], w[0, :1], cache, table, one, jnp.array([8]), hj.Dsa(topk=4))


NO_TPU = "needs blocks of 8, 16, 32, 64, 128 or 256 tokens, not 12"


@pytest.mark.parametrize(
    ("method", "limits", "split", "on_tpu"),
    [
        (hj.Dsa(activation=None), {}, None, None),
        (hj.Dsa(topk=512, entry_size=4, tail="open"), {}, None, None),
        (hj.Hisa(block_ratio=4), {}, "a Hisa of block_ratio=4", None),
        (hj.BlockSparse(scored_by="max"), {}, "a BlockSparse of scored_by='max'", None),
        (
            hj.BlockSparse(topk=2016, block_size=12, scored_by="max"),
            {},
            "a BlockSparse of scored_by='max'",
            NO_TPU,
        ),
        (hj.Dsa(), dict(n_listed=4096, listed_size=8), "candidates", "needs blocks of 64, 128 or 256 tokens, not 8"),
        (hj.Dsa(), dict(n_listed=4096, listed_size=128), "candidates", None),
        (hj.Dsa(), dict(has_budget=True), "a budget", None),
    ],
)
def test_kernels_decline_by_name(method, limits, split, on_tpu):
    problem = dispatch.Problem(
        H=64, D=128, S=8192, q_dtype="bfloat16", k_dtype="bfloat16", method=method, **limits
    )  # fmt: skip
    h200 = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    v6e = dispatch.Device(platform="tpu", kind="TPU v6 lite")
    over_devices = split and f"has no kernels for {split} of keys that are split over devices"
    for device, name, reason in ((h200, "mosaic_gpu", None), (h200, "triton", None), (v6e, "mosaic_tpu", on_tpu)):
        assert dispatch.IMPLEMENTATIONS[name].why_not(device, problem) == reason, name
        is_split = dataclasses.replace(problem, is_split=True)
        assert dispatch.IMPLEMENTATIONS[name].why_not(device, is_split) == over_devices, name
    assert dispatch.IMPLEMENTATIONS["xla"].why_not(h200, problem) is None
