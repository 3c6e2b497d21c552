"""The adapters to other programs against the oracle, on pages as theirs are.

`make test-integrations` runs the programs' own tests.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec

import hisa_jax as hj
from hisa_jax.integrations import records
from hisa_jax.integrations.streamindex import index_cache, streamindex_topk
from hisa_jax.integrations.tokamax import lightning_indexer
from hisa_jax.testing.oracle.compare import assert_same_selection
from tests.host_pages import PAGE, PARTS, D, P, batch, check, chosen

HISA = hj.Hisa(topk=24, block_size=32, block_topk=3)
SCAN = hj.Scan(topk=24, candidates=48, exact_heads=2, slopes="plain")
LAYOUTS = ("records", "bfloat16", "lanes")


@pytest.mark.gate("hisa-4")
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("method", [hj.Dsa(topk=24), HISA, SCAN], ids=["dsa", "hisa", "scan"])
def test_what_is_chosen_from_a_hosts_pages_is_what_the_oracle_chooses(method, ratio):
    """Pages of 64 entries are two blocks, 250 tokens no whole number of entries."""
    check(batch(ratio=ratio), method)


@pytest.mark.gate("lanes-bfloat16", "bfloat16-float32")
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_and_dtype_is_read(layout, q_dtype):
    some = batch(layout, q_dtype=q_dtype)
    run, options = (
        (lightning_indexer, dict(kv_layout="seq_along_lane")) if layout == "lanes" else (streamindex_topk, {})
    )
    check(some, hj.Dsa(topk=24), run, **options)


@pytest.mark.exhaustive
def test_tokamax_gets_scores_as_bits():
    some, method = batch(ratio=4), hj.Dsa(topk=24)
    indices, bits = lightning_indexer(**some.arguments, k=24, compression_ratio=4, return_scores=True)
    scores = np.asarray(bits).view(np.float32)
    assert_same_selection(**chosen(indices), scores=scores, reference=some.expected(method), tolerance=1e-5)


@pytest.mark.gate(4)
@pytest.mark.parametrize("ratio", [1, 4])
def test_devices_that_share_entries_choose_among_their_own(ratio):
    """Two devices take 8 tokens in turn. The best of what both choose are the best of all."""
    some, method, n, width = batch(ratio=ratio), hj.Dsa(topk=24), 2, 8 // ratio
    table = np.asarray(some.arguments["page_indices"]).reshape(-1, P)
    entries = np.asarray(some.arguments["cache_kv"]).reshape(-1, PAGE, 256)[table].reshape(-1, P * PAGE, 256)
    scored = []
    for rank in range(n):
        own = np.zeros_like(entries)
        mine = np.flatnonzero(np.arange(P * PAGE) // width % n == rank)
        own[:, : len(mine)] = entries[:, mine]
        arguments = some.arguments | dict(
            cache_kv=jnp.asarray(own.reshape(-1, PAGE // 4, 4, 256)),
            page_indices=jnp.arange(table.size, dtype=jnp.int32),
        )
        split = dict(cp_size=n, cp_rank=jnp.int32(rank), interleave_size=8)
        got = lightning_indexer(**arguments, k=24, compression_ratio=ratio, return_scores=True, **split)
        indices, scores = np.asarray(got[0]), np.asarray(got[1]).view(np.float32)
        scored.append((scores, np.where(indices >= 0, mine[indices], P * PAGE)))
    scores, indices = (np.concatenate(x, axis=1) for x in zip(*scored, strict=True))
    best = np.take_along_axis(indices, np.argsort(-scores, axis=1, kind="stable")[:, :24], axis=1)
    best = np.sort(best, axis=1).astype(np.int32)
    best[best == P * PAGE] = -1
    assert_same_selection(**chosen(best), reference=some.expected(method), tolerance=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [hj.Dsa(topk=24), HISA], ids=["dsa", "hisa"])
def test_pages_may_be_read_once_and_kept_up_by_append(method):
    """The cache that a server made of its first tokens, with the others appended: what pages with all of them give."""
    some = batch()
    table, lengths = some.arguments["page_indices"].reshape(-1, P), some.arguments["seq_lens"]
    before = lengths // 2
    cache, table = index_cache(some.arguments["cache_kv"], table, before, D=D, method=method)
    new = [hj.QuantizedKeys(*(getattr(keys, part)[len(keys.values) // 2 :] for part in PARTS)) for keys in some.keys]
    new = hj.QuantizedKeys(*(jnp.concatenate([getattr(keys, part) for keys in new]) for part in PARTS))
    ends = jnp.cumsum(jnp.append(jnp.array([0], jnp.int32), lengths - before), dtype=jnp.int32)
    cache = hj.append(cache, new, table, ends, before)
    arguments = some.arguments | dict(cache_kv=cache, page_indices=table.reshape(-1))
    check(some._replace(arguments=arguments), method)


def test_the_call_works_abstractly_and_on_a_devices_share():
    some, options = batch(), dict(k=600, compression_ratio=1, num_kv_pages_per_block=(3, 2, 2))
    shape = jax.eval_shape(streamindex_topk, **some.arguments, **options)
    assert (shape.shape, shape.dtype) == ((12, 600), jnp.int32)
    mesh, whole = jax.make_mesh((1,), ("data",)), PartitionSpec("data")
    on_share = jax.shard_map(
        lambda arguments: streamindex_topk(**arguments, k=24, compression_ratio=1),
        mesh=mesh, in_specs=whole, out_specs=whole,
    )  # fmt: skip
    got = jax.jit(on_share)(jax.device_put(some.arguments, NamedSharding(mesh, whole)))
    assert_same_selection(**chosen(got), reference=some.expected(hj.Dsa(topk=24)), tolerance=1e-5)


WRONG = {
    "float": (dict(page_indices=np.zeros(20, np.float32)), "streamindex_topk: page_indices is float32, wanted int32"),
    "table": (dict(page_indices=np.zeros((4, 5), np.int32)), "page_indices is [4, 5], wanted [S * P]: a flat table"),
    "pages": (dict(page_indices=np.zeros(18, np.int32)), "page_indices is [18], wanted a multiple of the 4 requests"),
    "no request": (dict(seq_lens=np.zeros(0, np.int32)), "seq_lens is [0], wanted one request or more"),
    "lengths": (dict(seq_lens=np.zeros(4, np.float32)), "seq_lens is float32, wanted int32"),
    "offsets": (dict(cu_q_lens=np.zeros(4, np.int32)), "cu_q_lens is [4], wanted [5]"),
    "counts": (dict(distribution=np.ones(3, np.float32)), "distribution is float32, wanted int32"),
    "distribution": (dict(distribution=(1, 1)), "distribution has 2 numbers, wanted 3"),
    "dtype": (dict(cache_kv=np.zeros((4, 16, 4, 256), np.int8)), "streamindex_topk: cache_kv is int8, wanted uint8 or"),
    "packing": (dict(cache_kv=np.zeros((4, 32, 2, 256), np.uint8)), "is [4, 32, 2, 256], wanted [pages, page / 4"),
    "width": (dict(cache_kv=np.zeros((4, 16, 4, 128), np.uint8)), "wanted at least 129 numbers a token"),
    "weights": (dict(indexer_weights=np.zeros((12, 3), np.float32)), "indexer_weights is [12, 3], wanted [12, 4]"),
    "k": (dict(k=0), "k=0, wanted at least 1"),
    "method": (dict(method=HISA), "k=8 with Hisa(topk=24"),
    "ratio": (dict(compression_ratio=0), "compression_ratio=0, wanted at least 1"),
    "implementation": (dict(implementation="triton"), 'implementation="triton" cannot run here'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_call_cannot_use_is_named(name):
    change, message = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as error:
        streamindex_topk(**batch().arguments | dict(k=8, compression_ratio=1) | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kv_layout="columns"), "kv_layout='columns', wanted one of head_along_sublane, seq_along_lane"),
        (dict(kv_layout="seq_along_lane"), "wanted at least 129 numbers a token for keys of D = 64, in seq_along_lane"),
        (dict(cp_size=2, interleave_size=6, compression_ratio=4), "interleave_size=6, wanted a multiple of"),
        (dict(cp_size=2, method=HISA, k=24), "wanted a Dsa: blocks are split over devices"),
        (dict(cp_size=2, cp_rank=1.0), "lightning_indexer: cp_rank is float32, wanted int32 or int64"),
        (dict(cp_size=2, cp_rank=np.array([1], np.int32)), "lightning_indexer: cp_rank is [1], wanted []"),
    ],
)
def test_what_tokamaxs_call_cannot_use_is_named(change, message):
    with pytest.raises((TypeError, ValueError)) as error:
        lightning_indexer(**batch().arguments | dict(k=8) | change)
    assert message in str(error.value)


@pytest.mark.exhaustive
def test_a_device_that_there_is_not_has_no_entries():
    """4 seconds."""
    for rank in (-1, 2):
        wrong = batch().arguments | dict(k=8, cp_size=2, cp_rank=rank, interleave_size=8)
        assert (lightning_indexer(**wrong) == -1).all()
        with pytest.raises(checkify.JaxRuntimeError, match=f"cp_rank is {rank}, wanted from 0 to 1"):
            hj.checked(lightning_indexer)(**wrong)


def test_every_scale_byte_is_its_power_of_two():
    bytes_ = np.arange(256, dtype=np.uint8)
    wanted = bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(records._scale_of(jnp.asarray(bytes_)), wanted)


@pytest.mark.exhaustive
def test_a_page_that_is_none_is_named_under_checked():
    some = batch()
    arguments = some.arguments | dict(page_indices=some.arguments["page_indices"].at[0].set(99))
    with pytest.raises(checkify.JaxRuntimeError, match="block_tables lacks pages of requests"):
        hj.checked(streamindex_topk)(**arguments, k=8, compression_ratio=1)
