"""Sparse grouped-query attention of the Triton kernel: interpreted, lowered, and on a GPU through the public call."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.triton.sparse_attention import Config, heuristic, sparse_attention, why_not
from hisa_jax.sparse_attention import block_lists
from tests import oracle
from tests.gpu.test_lowering import lower
from tests.test_sparse_attention import inputs

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
BF16, SCALE = jnp.bfloat16, 0.3
FORMS = [  # block_size, a list a group, config; 3 heads a group of 16 that a program takes
    pytest.param(1, True, Config(tile_n=16, tile_s=16), id="tokens_a_group"),
    pytest.param(1, False, Config(tile_n=16, tile_s=16, n_splits=4), id="tokens_split"),
    pytest.param(32, True, Config(tile_n=16, tile_s=16, n_splits=2), id="blocks_a_group_split"),
    pytest.param(16, False, Config(tile_n=16, tile_s=16), id="blocks"),
]


@pytest.mark.gate("tokens_split", "blocks_a_group_split")
@pytest.mark.parametrize(("block_size", "grouped", "config"), FORMS)
def test_attends_to_what_is_listed(block_size, grouped, config):
    K = 20 if block_size == 1 else 3
    q, k, v, indices, at = inputs(2, 3, 100, 6, 2, K, block_size, grouped=grouped, V=32, dtype="bfloat16")
    attended = np.zeros(k.shape[:3], bool)  # no query reads a token that holds NaN
    for b, t, g in np.ndindex(2, 3, 2):
        ids = indices[b, t, g] if grouped else indices[b, t]
        tokens = (ids[ids >= 0][:, None] * block_size + np.arange(block_size)).ravel()
        attended[b, tokens[tokens <= at[b, t]], g] = True
    k, v = (jnp.where(attended[..., None], x, jnp.nan).astype(BF16) for x in (k, v))
    lists = block_lists(jnp.asarray(indices), jnp.asarray(at), block_size, 100)
    out, lse = sparse_attention(
        jnp.asarray(q), k, v, lists, scale=SCALE, block_size=block_size, config=config, interpret=True
    )
    wanted, wanted_lse = oracle.sparse_attention(q, k, v, indices, SCALE, block_size, at)
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=4e-2)
    np.testing.assert_allclose(lse, wanted_lse, atol=4e-3)


@pytest.mark.parametrize("block_size", [1, 128])
@pytest.mark.parametrize(
    ("B", "T", "Hq", "G", "D"),
    [(1, 4096, 24, 2, 256), (128, 1, 64, 4, 128), (1, 1, 24, 2, 256)],
    ids=["prefill", "decode", "decode_one"],
)
@pytest.mark.gate("prefill-128", "decode_one-1")
def test_lowers(B, T, Hq, G, D, block_size):
    def attend(q, k, v, indices, at):
        lists = block_lists(indices, at, block_size, k.shape[1])
        return sparse_attention(q, k, v, lists, scale=0.1, block_size=block_size)

    kv = ((B, 131072, G, D), BF16)
    indices = ((B, T, G, 2048 // block_size), jnp.int32)
    assert "custom_call" in lower(attend, ((B, T, Hq, D), BF16), kv, kv, indices, ((B, T), jnp.int32))


def test_refusals_say_why():
    shape = dict(Hq=24, G=2, D=256, V=256, dtype=BF16, block_size=128, n_listed=32)
    assert why_not("9.0", **shape) is None and why_not("9.0", **{**shape, "block_size": 1}) is None
    assert "needs bfloat16, not float32" in why_not("9.0", **{**shape, "dtype": jnp.float32})
    assert "not 192 and 256" in why_not("9.0", **{**shape, "D": 192})
    assert "power of two from 16 on, not 8" in why_not("9.0", **{**shape, "block_size": 8})


def test_few_queries_are_split_over_all_multiprocessors():
    assert heuristic(1, 64, 4, 128, 2048, 1) == Config(tile_n=16, tile_s=64, n_splits=16)
    assert heuristic(1, 64, 4, 128, 16, 128).n_splits == 16  # a block each
    assert heuristic(4096, 24, 2, 256, 2048, 1) == Config(tile_n=16, tile_s=32)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "Hq", "G", "D"), [(1, 5, 24, 2, 256), (3, 1, 64, 4, 128), (1, 300, 64, 4, 128), (2, 7, 16, 16, 64)]
)
def test_on_a_gpu(B, T, Hq, G, D, block_size, grouped):
    arrays = inputs(B, T, 4000, Hq, G, 2048 // block_size, block_size, grouped=grouped, D=D, V=D, dtype="bfloat16")
    q, k, v, indices, at = map(jnp.asarray, arrays)
    options = dict(scale=D**-0.5, block_size=block_size, query_positions=at, return_lse=True)
    out, lse = hj.sparse_attention(q, k, v, indices, **options, implementation="triton")
    wanted, wanted_lse = hj.sparse_attention(q, k, v, indices, **options, implementation="xla")
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(wanted, np.float32), atol=2e-2)
    np.testing.assert_allclose(lse, wanted_lse, atol=4e-3)
