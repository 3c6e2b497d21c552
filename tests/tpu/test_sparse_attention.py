"""Sparse grouped-query attention over blocks on a TPU: interpreted against the oracle, and compiled ahead of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.tpu import aot
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_attention import Config, sparse_attention, why_not
from hisa_jax.sparse_attention import block_lists
from tests import oracle
from tests.test_sparse_attention import inputs

BF16 = jnp.bfloat16


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_attends_to_what_is_listed(grouped, interpret):
    q, k, v, indices, at = inputs(2, 2, 700, 6, 2, 3, 128, grouped=grouped, D=128, V=128, dtype="bfloat16")
    at[1, 1] = 300  # in the middle of a block
    indices[1, 1], indices[1, 1, ..., :2] = -1, [2, 0]
    attended = np.zeros(k.shape[:3], bool)  # no query reads a token that holds NaN
    for b, t, g in np.ndindex(2, 2, 2):
        ids = indices[b, t, g] if grouped else indices[b, t]
        tokens = (ids[ids >= 0][:, None] * 128 + np.arange(128)).ravel()
        attended[b, tokens[tokens <= at[b, t]], g] = True
    k, v = (jnp.where(attended[..., None], x, jnp.nan).astype(BF16) for x in (k, v))
    lists = block_lists(jnp.asarray(indices), jnp.asarray(at), 128, 700)
    options = dict(scale=0.1, block_size=128, config=Config(tile_s=256), interpret=interpret)
    out, lse = sparse_attention(jnp.asarray(q), k, v, lists, **options)
    wanted, wanted_lse = oracle.sparse_attention(q, k, v, indices, 0.1, 128, at)
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=0.02)
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-3)
    # A NaN that the first group lists stays there.
    k = k.at[1, 0, 0].set(jnp.nan)
    poisoned, poisoned_lse = sparse_attention(jnp.asarray(q), k, v, lists, **options)
    assert (
        np.isnan(np.asarray(poisoned[1, 1, :3], np.float32)).all()
        and np.isnan(np.asarray(poisoned_lse[1, 1, :3])).all()
    )
    np.testing.assert_array_equal(poisoned[1, 1, 3:], out[1, 1, 3:])


def test_says_what_it_declines():
    shape = dict(Hq=24, G=2, D=256, V=256, dtype=BF16, block_size=128, n_listed=32)
    assert why_not("TPU v5 lite", **shape) is None
    assert "bfloat16" in why_not("TPU7x", **{**shape, "dtype": jnp.float32})
    assert "multiple of 128 tokens up to 1024, not 1" in why_not("TPU7x", **{**shape, "block_size": 1})
    assert "at most 16384 blocks" in why_not("TPU7x", **{**shape, "n_listed": 20000})
    assert "not 64 and 256" in why_not("TPU7x", **{**shape, "D": 64})
    assert "this device is 'cpu'" in why_not("cpu", **shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "T", "Hq", "G", "D"), [pytest.param(1, 64, 24, 2, 256, marks=pytest.mark.exhaustive), (8, 1, 64, 4, 128)]
)
def test_compiles(chip, B, T, Hq, G, D):
    def attend(q, k, v, indices, at):
        # A cache that is kept with its groups side by side: no copy of it is made.
        k, v = (x.reshape(B, -1, G, D) for x in (k, v))
        lists = block_lists(indices, at, 128, k.shape[1])
        return sparse_attention(q, k, v, lists, scale=D**-0.5, block_size=128)

    shapes = ((B, T, Hq, D), BF16), *2 * [((B, 32768, G * D), BF16)], ((B, T, G, 16), jnp.int32), ((B, T), jnp.int32)
    program = aot.compile_for(chip, attend, *(jax.ShapeDtypeStruct(*shape) for shape in shapes), schedules=False)
    assert program.temp_bytes < B * 32768 * G * D
