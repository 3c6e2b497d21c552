"""Sparse grouped-query attention against the oracle, forward and backward, contiguous and in pages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import hisa_jax as hj
from tests import draw, oracle

SCALE = 0.3
I32 = jnp.int32


def inputs(B, T, S, Hq, G, K, block_size=1, *, grouped=False, D=16, V=8, dtype="float32", seed=0):
    """Queries, keys, values, lists with holes, one of them empty, and ascending positions of queries."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, Hq, D), (B, S, G, D), (B, S, G, V)
    q, k, v = (draw.cast(rng.normal(size=shape), dtype) for shape in shapes)
    lists = (B, T, G) if grouped else (B, T)
    n = -(-S // block_size)
    indices = np.stack([rng.permutation(n)[:K] for _ in range(int(np.prod(lists)))]).reshape(*lists, K)
    indices[rng.random(indices.shape) < 0.3] = -1
    indices[0, 0] = -1
    positions = np.sort(rng.integers(0, S, (B, T)), axis=1)
    positions[:, -1] = S - 1
    return q, k, v, indices.astype(np.int32), positions.astype(np.int32)


def dense(q, k, v, indices, positions, block_size, sink=None):
    """The same in plain differentiable JAX: how often each token counts, for each query and group."""
    Hq, (S, G) = q.shape[2], k.shape[1:3]
    ids = indices if indices.ndim == 4 else jnp.repeat(indices[:, :, None], G, axis=2)
    counts = jnp.sum(ids[..., None] == jnp.arange(S) // block_size, axis=3)
    counts = jnp.where(jnp.arange(S) <= positions[..., None, None], counts, 0)
    counts = jnp.repeat(counts, Hq // G, axis=2)  # [B, T, Hq, S]
    k, v = (jnp.repeat(x, Hq // G, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bths", q, k, precision="highest") * SCALE
    logits = jnp.where(counts > 0, logits + jnp.log(jnp.maximum(counts, 1)), -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    total = lse if sink is None else jnp.logaddexp(lse, jnp.broadcast_to(sink, lse.shape))
    p = jnp.where(counts > 0, jnp.exp(logits - total[..., None]), 0)
    return jnp.einsum("bths,bshv->bthv", p, v, precision="highest"), lse


FORMS = [  # block_size, a list a group
    pytest.param(1, False, id="tokens"),
    pytest.param(1, True, id="tokens_a_group"),
    pytest.param(8, False, id="blocks"),
    pytest.param(8, True, id="blocks_a_group"),
]


@pytest.mark.parametrize(("block_size", "grouped"), FORMS)
def test_output_and_logsumexp_are_the_oracles(block_size, grouped):
    q, k, v, indices, positions = inputs(2, 5, 37, 6, 2, 4, block_size, grouped=grouped)  # 5 blocks, the last of 5
    sink = np.linspace(-1, 2, 6).astype(np.float32)
    out, lse = hj.sparse_attention(
        *map(jnp.asarray, (q, k, v, indices)), scale=np.float64(SCALE), block_size=np.int64(block_size),
        query_positions=jnp.asarray(positions), sink=jnp.asarray(sink), return_lse=True,
    )  # fmt: skip
    wanted, wanted_lse = oracle.sparse_attention(q, k, v, indices, SCALE, block_size, positions, sink)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=2e-5, atol=2e-5)
    assert not np.asarray(out[0, 0]).any() and np.isneginf(np.asarray(lse[0, 0])).all()


@pytest.mark.gate("blocks_a_group")
@pytest.mark.parametrize(("block_size", "grouped"), FORMS)
def test_gradients_are_those_of_the_dense_form(block_size, grouped):
    q, k, v, indices, positions = map(jnp.asarray, inputs(2, 5, 37, 6, 2, 4, block_size, grouped=grouped))
    indices = indices.at[..., -1].set(indices[..., 0])  # one listed twice
    sink = jnp.linspace(-1, 1, 6)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6, 8)).astype(np.float32))

    def loss(attend, *arrays):
        out, lse = attend(*arrays)
        return jnp.sum(out * cotangent) + 0.1 * jnp.sum(jnp.where(lse > -1e20, lse, 0))

    def sparse(q, k, v, sink):
        options = dict(block_size=block_size, query_positions=positions, sink=sink, return_lse=True)
        return hj.sparse_attention(q, k, v, indices, scale=SCALE, **options)

    def reference(q, k, v, sink):
        return dense(q, k, v, indices, positions, block_size, sink)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        got = jax.jit(jax.grad(functools.partial(loss, sparse), (0, 1, 2, 3)))(q, k, v, sink)
        wanted = jax.jit(jax.grad(functools.partial(loss, reference), (0, 1, 2, 3)))(q, k, v, sink)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-4)


def test_what_a_query_does_not_attend_to_changes_no_bit():
    q, k, v, indices, positions = inputs(1, 3, 20, 2, 1, 3, 4)
    indices[0, 1] = [1, 5, np.iinfo(np.int32).max]  # what is no block is none
    positions[0] = [3, 6, 7]  # block 1 is open for the second query
    attended = np.isin(np.arange(20) // 4, indices[0]) & (np.arange(20) < 8)
    bad_k, bad_v = (np.where(attended[None, :, None, None], x, np.nan).astype(np.float32) for x in (k, v))

    def grads(k, v):
        options = dict(scale=SCALE, block_size=4, query_positions=jnp.asarray(positions))
        return jax.value_and_grad(
            lambda *qkv: jnp.sum(hj.sparse_attention(*qkv, jnp.asarray(indices), **options)), (0, 1, 2)
        )(*map(jnp.asarray, (q, k, v)))

    for mine, theirs in zip(jax.tree.leaves(grads(bad_k, bad_v)), jax.tree.leaves(grads(k, v)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_bfloat16_stays_within_its_rounding():
    q, k, v, indices, _ = inputs(1, 3, 40, 8, 2, 20, dtype="bfloat16")
    out = hj.sparse_attention(*map(jnp.asarray, (q, k, v, indices)), scale=SCALE)
    assert out.dtype == jnp.bfloat16
    wanted = oracle.sparse_attention(q, k, v, indices, SCALE)[0]
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("B", "T", "S", "K"), [(0, 3, 20, 4), (2, 0, 20, 4), (2, 3, 0, 4), (2, 3, 20, 0)])
def test_empty_axes_give_zeros(B, T, S, K):
    k, v = jnp.ones((B, S, 2, 16)), jnp.ones((B, S, 2, 8))
    indices = jnp.zeros((B, T, K), I32)
    out, lse = hj.sparse_attention(jnp.ones((B, T, 4, 16)), k, v, indices, scale=0.1, return_lse=True)
    assert out.shape == (B, T, 4, 8) and not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


@pytest.mark.parametrize(("block_size", "grouped"), FORMS)
@pytest.mark.gate("blocks_a_group")
def test_pages_hold_what_one_piece_holds(block_size, grouped):
    q, k, v, indices, positions = map(jnp.asarray, inputs(2, 3, 48, 4, 2, 4, block_size, grouped=grouped))
    table = jnp.array([[5, 0, 3], [1, 4, 6]], I32)
    k_pages, v_pages = (
        jnp.full((8, 16, 2, x.shape[3]), jnp.nan).at[table].set(x.reshape(2, 3, 16, 2, -1)) for x in (k, v)
    )
    options = dict(scale=SCALE, block_size=block_size, return_lse=True)
    wanted = hj.sparse_attention(q, k, v, indices, query_positions=positions, **options)
    padded = [jnp.concatenate([x.reshape(-1, *x.shape[2:]), x[0, -1:]]) for x in (q, indices, positions)]
    got = hj.sparse_attention_paged(
        padded[0], k_pages, v_pages, padded[1], table, jnp.array([0, 3, 6]), query_positions=padded[2], **options
    )
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine[:6].reshape(theirs.shape), theirs, rtol=1e-6, atol=1e-6)
    assert not np.asarray(got[0][6]).any()  # no request's
    missing = hj.sparse_attention_paged(
        padded[0], k_pages, v_pages, padded[1], table.at[1].set(-1), jnp.array([0, 3, 6]),
        query_positions=padded[2], **options,
    )  # fmt: skip
    assert not np.asarray(missing[0][3:]).any()


def call(**changed):
    """A valid call with some arguments replaced."""
    kv = jnp.ones((2, 40, 2, 16))
    return dict(q=jnp.ones((2, 3, 4, 16)), k=kv, v=kv, indices=jnp.zeros((2, 3, 5), I32), scale=0.1) | changed


def paged(**changed):
    """A valid call in pages with some arguments replaced."""
    pages = jnp.ones((4, 16, 2, 16))
    tables = dict(block_tables=jnp.zeros((2, 2), I32), cu_seqlens_q=jnp.array([0, 1, 3]))
    given = dict(q=jnp.ones((3, 4, 16)), k=pages, v=pages, indices=jnp.zeros((3, 5), I32), scale=0.1)
    return given | tables | changed


BAD = [
    (dict(q=jnp.ones((2, 3, 16))), "q is [2, 3, 16], wanted [B, T, Hq, D]"),
    (dict(q=jnp.ones((2, 3, 4, 16), jnp.int8)), "q is int8, wanted bfloat16 or float32"),
    (dict(k=jnp.ones((2, 40, 2, 16), jnp.bfloat16)), "k is bfloat16, wanted float32"),
    (dict(k=jnp.ones((2, 40, 2, 8))), "k is [2, 40, 2, 8], wanted [2, S, G, 16]: its first and last axes must equal"),
    (dict(v=jnp.ones((2, 41, 2, 8))), "v is [2, 41, 2, 8], wanted [2, 40, 2, V]: a value a key (k is [2, 40, 2, 16])"),
    (dict(q=jnp.ones((2, 3, 5, 16))), "q has 5 heads, wanted a multiple of the 2 heads of k"),
    (dict(indices=jnp.zeros((2, 3, 5))), "indices is float32, wanted int32"),
    (dict(indices=jnp.zeros((2, 4, 5), I32)), "indices is [2, 4, 5], wanted [2, 3, K]: one list a query (q is"),
    (dict(indices=jnp.zeros((2, 3, 4, 5), I32)), "indices is [2, 3, 4, 5], wanted [2, 3, 2, K]: one list a query and"),
    (dict(block_size=8), "query_positions is None with block_size=8, wanted [2, 3] int32: a block may hold tokens"),
    (dict(block_size=0), "block_size=0, wanted at least 1"),
    (dict(block_size=8.0), "block_size is float, wanted an int"),
    (dict(query_positions=jnp.zeros((2, 4), I32)), "query_positions is [2, 4], wanted [2, 3]: one a query (q is"),
    (dict(sink=jnp.ones((2,))), "sink is [2], wanted [4]: one logit a head (q is [2, 3, 4, 16])"),
    (dict(scale=float("nan")), "scale=nan, wanted a finite float32 number"),
    (dict(return_lse=1), "return_lse is int, wanted a bool"),
    (dict(implementation="mosaic_gpu"), "implementation='mosaic_gpu', wanted one of auto, "),
]
BAD_PAGES = [
    (dict(k=jnp.ones((4, 16, 2, 8))), "k is [4, 16, 2, 8], wanted [n_pages, page_size, G, 16]: its last axis must"),
    (dict(indices=jnp.zeros((4, 5), I32)), "indices is [4, 5], wanted [3, K]: one list a query (q is [3, 4, 16])"),
    (dict(block_size=3, query_positions=jnp.zeros((3,), I32)), "block_size=3, wanted a divisor of page_size = 16"),
    (dict(block_size=8), "query_positions is None with block_size=8, wanted [3] int32: a block may hold tokens"),
    (dict(block_tables=jnp.zeros((2,), I32)), "block_tables is [2], wanted [R, P]"),
    (dict(cu_seqlens_q=jnp.zeros((2,), I32)), "cu_seqlens_q is [2], wanted [3]: a start for each request, and the end"),
]


@pytest.mark.parametrize(
    ("function", "valid", "changed", "message"),
    [*((hj.sparse_attention, call, *case) for case in BAD),
     *((hj.sparse_attention_paged, paged, *case) for case in BAD_PAGES)],
)  # fmt: skip
def test_a_bad_argument_is_named_with_what_is_wanted(function, valid, changed, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(f'{function.__name__}: {message}')}"):
        function(**valid(**changed))


def test_checked_finds_indices_of_what_is_not_there():
    with pytest.raises(checkify.JaxRuntimeError, match="sparse_attention: indices range from -1 to 40"):
        hj.checked(hj.sparse_attention)(**call(indices=jnp.full((2, 3, 5), 40, I32)))
    indices = jnp.array([[0, 40, -1], [31, -1, -1], [-1, -1, -1]], I32)  # tables of two pages of 16
    with pytest.raises(checkify.JaxRuntimeError, match=r"sparse_attention_paged: rows \[ True False False\] of q"):
        hj.checked(hj.sparse_attention_paged)(**paged(indices=indices))
