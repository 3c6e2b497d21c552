"""The stages of the scan by Mosaic GPU, interpreted: what they share with Triton's has its tests in test_scan.py.

A case takes 5 to 10 seconds, nearly all of them to compile.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.mosaic_gpu import list_tokens, refine_tokens, scan, scores
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_bits import list_ptx
from hisa_jax.kernels_pallas.operands import Operands, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, score_of, sort_key_of
from tests.gpu.ptx_machine import Machine

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
KEEP = dict(keep_first=3, keep_last=2)
THRESHOLD = 1.0  # below a third of the scores
VISIBLE = np.array([299, 290, 5, 0, 288, 289, 260, 33, 64, 200], np.int32)


def whole_numbers(rng, *shape):
    return rng.integers(-2, 3, shape).astype(float)


def two_sequences(dtype, has_scale, in_pages=False):
    """A query of a sequence of 299, nine of one of 290, and what each scans with: whole numbers, so sums are exact."""
    rng = np.random.default_rng(0)
    rows, k = whole_numbers(rng, 10, 4, 64), whole_numbers(rng, 640, 64)
    w, k_scale = whole_numbers(rng, 10, 4), 2.0 ** rng.integers(-1, 2, 640)
    # One linear row, two with relu, and one that is none, whatever is in it.
    heads = ScanHeads(q=jnp.asarray(rows, dtype), w=jnp.asarray(w, jnp.float32), n_linear=1, n=3)
    size = 32
    table = rng.permutation(len(k) // size) if in_pages else np.arange(len(k) // size)
    stored = np.zeros_like(k).reshape(-1, size, 64)
    stored[table] = k.reshape(-1, size, 64)
    stored_scale = np.zeros_like(k_scale).reshape(-1, size)
    stored_scale[table] = k_scale.reshape(-1, size)
    call = FlatCall(
        q=heads.q,
        w=heads.w,
        visible=jnp.asarray(VISIBLE),
        k=jnp.asarray(stored.reshape(-1, 64), dtype),
        k_scale=jnp.asarray(stored_scale.reshape(-1), jnp.float32) if has_scale else None,
        sequences=Sequences(
            query_starts=np.array([0, 1, 10]), key_starts=np.array([0, 320]), lengths=np.array([299, 290]), max_keys=320
        ),
        pages=Pages(table=jnp.asarray(table, jnp.int32), size=size, n_pages=len(table)) if in_pages else None,
    )
    products = np.einsum("trd,sd->trs", rows[:, :3], k)
    products[:, 1:] = np.maximum(products[:, 1:], 0)
    scores = np.einsum("tr,trs->ts", w[:, :3], products) * (k_scale if has_scale else 1)
    first = np.array([0] + [320] * 9)
    return call, heads, [scores[t, first[t] : first[t] + n] for t, n in enumerate(VISIBLE)]


@pytest.mark.parametrize(
    ("dtype", "has_scale", "in_pages"),
    [
        (E4M3, True, False),
        pytest.param(BF16, False, False, marks=pytest.mark.exhaustive),
        pytest.param(E4M3, True, True, marks=pytest.mark.exhaustive),
    ],
    ids=["e4m3", "bf16", "pages"],
)
def test_a_scan_of_groups_of_queries_has_each_querys_own_scores(interpret, dtype, has_scale, in_pages):
    call, heads, scores = two_sequences(dtype, has_scale, in_pages)
    got = scan.scan_sort_keys(call, heads, 4, n_ctas=2, interpret=interpret)
    threshold = jnp.full((10,), sort_key_of(jnp.float32(THRESHOLD))).at[4].set(-(2**31) + 1)
    masks = scan.scan_masks(call, heads, threshold, **KEEP, n_ctas=2, interpret=interpret)
    for t, wanted in enumerate(scores):
        sample = wanted[::4]
        np.testing.assert_array_equal(score_of(got[t, : len(sample)]), sample)
        assert (got[t, len(sample) : 512] == INVISIBLE).all()  # as far as a top-k reads
        place = np.arange(len(wanted))
        passes = (wanted >= THRESHOLD) | (place < 3) | (place >= len(wanted) - 2) | (t == 4)
        words = np.asarray(masks[t, : -(-len(wanted) // 32)])
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        np.testing.assert_array_equal(np.flatnonzero(bits), np.flatnonzero(passes))


def words_of_bits(words):
    """Random words of a row a query, and how many tokens each sees: some words are not, or only in part."""
    rng = np.random.default_rng(1)
    x = rng.integers(-(2**31), 2**31, (7, words)) & rng.integers(-(2**31), 2**31, (7, words))
    visible = np.array([32 * words, 32 * words - 1, 33, 32, 1, 0, 300], np.int32)
    for t, n in enumerate(visible):  # words beyond hold anything, bits of the last one nothing
        x[t, n // 32 : -(-n // 32)] &= (1 << int(n) % 32) - 1
    x = x.astype(np.int32)
    wanted = [
        np.flatnonzero(np.unpackbits(row[: -(-n // 32)].view(np.uint8), bitorder="little"))
        for row, n in zip(x, visible, strict=True)
    ]
    return x, visible, wanted


def assert_lists(tokens, count, wanted, capacity):
    for got, n, those in zip(np.asarray(tokens), np.asarray(count), wanted, strict=True):
        assert n == len(those)
        # Longer ones are counted alone.
        np.testing.assert_array_equal(got, np.concatenate([those, np.full(capacity, -1)])[:capacity])


def test_a_list_holds_the_set_bits(interpret):
    words, visible, wanted = words_of_bits(16)
    given = jnp.asarray(words), jnp.asarray(visible)
    assert_lists(*list_tokens.list_tokens(*given, 128, n_ctas=2, interpret=interpret), wanted, 128)


@pytest.mark.parametrize(("words", "capacity"), [(16, 128), (1300, 12000)])
def test_the_machine_lists_them_too(words, capacity):
    """A round, and three: a row with room for all and one without."""
    x, visible, wanted = words_of_bits(words)
    text, names = list_ptx(capacity), ("COUNT", "MASKS", "WORDS", "LIST", "SCRATCH")
    for i in reversed(range(len(names))):
        text = text.replace(f"${i}", names[i].lower() + "_")
    rows = []
    for row, n in zip(x, visible, strict=True):
        at = dict(masks_=0, words_=-(-int(n) // 32), list_=16, scratch_=0, count_=0)
        cta = Machine(text, 128, at, row.view(np.uint32), 16 + 4 * capacity)
        cta.run()
        counts = {int(warp.registers["count_"][0]) for warp in cta.warps}
        assert len(counts) == 1
        rows.append((cta.smem[4:].view(np.int32), counts.pop()))
    assert_lists(*zip(*rows, strict=True), wanted, capacity)


@pytest.mark.parametrize("in_pages", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["rows", "pages"])
def test_the_best_of_listed_tokens(interpret, in_pages):
    call, _, _ = two_sequences(E4M3, True, in_pages)
    rng = np.random.default_rng(2)
    q, w = whole_numbers(rng, 10, 16, 64), whole_numbers(rng, 10, 16)
    count = np.array([299, 280, 5, 0, 40, 41, 100, 33, 64, 150], np.int32)
    tokens = np.full((10, 512), -1, np.int32)
    for t, n in enumerate(count):
        tokens[t, :n] = np.sort(rng.choice(VISIBLE[t], n, replace=False)) if n >= 40 else np.arange(n)
    first = np.array([0] + [320] * 9, np.int32)
    operands = Operands(jnp.asarray(q, E4M3), jnp.asarray(w, jnp.float32), call.k, call.k_scale, call.pages)
    lists = jnp.asarray(tokens), jnp.asarray(count), jnp.asarray(first)
    config = refine_tokens.Config(ring=4)
    got, n_chosen = refine_tokens.refine_tokens(
        operands, *lists, k_top=40, config=config, n_ctas=3, interpret=interpret
    )
    stored = np.asarray(call.k, np.float32), np.asarray(call.k_scale)
    for t, n in enumerate(count):
        rows = first[t] + tokens[t, :n]
        rows = rows if call.pages is None else np.asarray(call.pages.rows(jnp.asarray(rows)))
        scores = w[t] @ np.maximum(q[t] @ stored[0][rows].T, 0) * stored[1][rows]
        best = np.sort(tokens[t, :n][np.argsort(-scores, kind="stable")[:40]])
        assert n_chosen[t] == len(best)
        np.testing.assert_array_equal(got[t, : len(best)], best)
        assert (np.asarray(got[t, len(best) :]) == -1).all()


def test_a_few_queries_of_very_many_keys_have_a_configuration():
    for n_queries, n_keys in ((1, 2**24), (10, 2**24), (1, 2**30)):
        config = scores.heuristic(scores.Sizes(n_queries, 64, 128, 1, 1, 1), n_keys)
        assert config.tile_t == n_queries  # keys are read once


def test_lists_that_fit_no_shared_memory_or_rows_too_short_to_gather_are_declined():
    assert refine_tokens.heuristic(64, 128, 12288, 1).n_sort_keys == 2
    assert refine_tokens.heuristic(64, 128, 12288, 2).n_sort_keys == 1
    for H, D, capacity, itemsize in ((64, 128, 65536, 1), (64, 64, 512, 1), (128, 128, 512, 1), (64, 128, 640, 1)):
        assert refine_tokens.heuristic(H, D, capacity, itemsize) is None
