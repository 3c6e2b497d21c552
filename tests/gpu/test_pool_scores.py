"""`pool_scores`: block means scored where they are taken, against `pool` and `scores`, which write them first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import indexer, triton
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.operands import KeyBlocks
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from hisa_jax.kernels_pallas.triton import pool_scores
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.kernels_pallas.triton.pool_scores import pools_where_scored
from tests import kernel_calls
from tests.gpu import draw
from tests.gpu.test_lowering import BF16, E4M3, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
BLOCK = 32


@pytest.fixture
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


METHOD = hj.Hisa(topk=50, block_size=BLOCK, block_topk=4)


def call(B, T, S, dtype, lengths=None, make=draw.integers, H=16, D=64, seed=0):
    q, k, k_scale, w = make(seed, B, T, S, H, D, dtype, dtype == E4M3)
    lengths = jnp.full(B, S) if lengths is None else jnp.asarray(lengths)
    visible = jnp.clip(lengths[:, None] - T + 1 + jnp.arange(T), 0, None).astype(jnp.int32)
    return kernel_calls.call_of(q, k, k_scale, w, visible, lengths=lengths.astype(jnp.int32))


def both_ways(of, interpret=True):
    """Sort keys of the blocks, by one pass and by two; the eligible blocks of each query."""
    flat = flatten(of, BLOCK)
    eligible = -(-flat.visible // BLOCK)
    counts = flat.sequences.tokens_in_blocks(flat.k.shape[0], BLOCK)
    ways = (
        KeyBlocks(k=flat.k, k_scale=flat.k_scale, counts=counts, size=BLOCK),
        pool(flat.k, flat.k_scale, counts, block_size=BLOCK, interpret=interpret),
    )
    sort_keys = (triton.stages.block_sort_keys(flat, means, eligible, METHOD, interpret) for means in ways)
    return *map(np.asarray, sort_keys), np.asarray(eligible)


def check(of, close=False, interpret=True):
    got, wanted, eligible = both_ways(of, interpret)
    for t, n in enumerate(eligible):
        if close:
            score = lambda x: np.where(x < 0, x ^ (2**31 - 1), x).view(np.float32)  # noqa: E731
            is_forced = wanted[t, :n] == FORCED
            np.testing.assert_array_equal(got[t, :n] == FORCED, is_forced)
            x, y = score(got[t, :n][~is_forced]), score(wanted[t, :n][~is_forced])
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(got[t, :n], wanted[t, :n])
        rest = got[t, n : -(-n // 16) * 16]
        assert (rest == INVISIBLE).all(), f"query {t}"


@pytest.mark.gate("e4m3")  # 2 seconds a case, as the next
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_one_pass_and_two_give_the_same_scores(dtype, monkeypatch):
    """Requests of all lengths, one of none; more queries than a tile has; several blocks a program."""
    monkeypatch.setattr(pool_scores, "_PROGRAMS", {E4M3: 12, BF16: 1}[dtype])
    check(call(3, 9, 300, dtype, lengths=[300, 0, 77]))


def test_absent_tokens_and_those_of_others_leave_no_trace():
    of = call(2, 1, 224, BF16, lengths=[200, 97])
    wanted = both_ways(of)[0]
    k = of.k._replace(values=of.k.values.at[0, 200:].set(jnp.nan).at[1, 97:].set(jnp.nan))
    np.testing.assert_array_equal(both_ways(dataclasses.replace(of, k=k))[0], wanted)


@pytest.mark.exhaustive  # 10 seconds
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_normal_data(dtype):
    check(call(2, 2, 1700, dtype, make=draw.normal, D=128), close=True)


@pytest.mark.exhaustive  # 3 seconds
def test_a_filter_for_few_queries_takes_keys(monkeypatch):
    """In the whole indexer, whose selections others check."""
    seen = []
    monkeypatch.setattr(triton.stages, "pool", lambda *_, **__: pytest.fail("means were written"))
    real = triton.stages.block_filter
    monkeypatch.setattr(triton.stages, "block_filter", lambda *x: seen.append(type(x[1])) or real(*x))
    indices, count, _ = indexer.Indexer(triton.stages).select_hisa(call(2, 1, 200, BF16), METHOD, True)
    assert seen == [KeyBlocks] and indices.shape == (2, 50) and list(count) == [50, 50]


def test_where_it_is_taken():
    k = jnp.zeros((1 << 17, 1), BF16)
    assert pools_where_scored(1, 1, k) and pools_where_scored(32, 32, k)
    assert not pools_where_scored(1, 3, k) and not pools_where_scored(1, 1, jnp.zeros((1 << 18, 1), BF16))


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize(("B", "S", "H"), [(32, 4096, 64), (1, 131072, 32)])
def test_lowers(B, S, H, dtype):
    def select(q, k, k_scale, w, visible):
        arrays = q, k, k_scale if dtype == E4M3 else None, w, visible
        return kernel_calls.select_blocks(triton, *arrays, block_size=128, block_topk=16)

    f32, i32 = jnp.float32, jnp.int32
    shapes = ((B, 1, H, 128), dtype), ((B, S, 128), dtype), ((B, S), f32), ((B, 1, H), f32), ((B, 1), i32)
    assert "hisa_pool_scores" in lower(select, *shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 64, 128), (3, 9, 64, 128), (5, 2, 16, 64), (2, 3, 128, 128)])
def test_on_device(gpu, B, T, H, D, dtype):
    check(call(B, T, 20_001, dtype, make=draw.normal, H=H, D=D), close=True, interpret=False)
