"""The best of each unit of keys, of queries with one head: `triton.units`, interpreted, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import score_of
from hisa_jax.kernels_pallas.triton.units import Config, heuristic, units
from tests import draw
from tests.gpu.test_lowering import lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def prefill():
    """MiniMax-M3's block scores of 4096 queries with 4 heads that choose alone, at 128K."""
    T, S = 4 * 4096, 131072
    config = heuristic(T, 1, S)

    def f(q, w, k, limit, tiles):
        columns, how = Columns(limit=limit, n=S, tiles=tiles), dict(unit=128, has_relu=False, is_weighted=False)
        return units(Operands(q, w, k, None, None), columns, config=config, **how)

    bf16, i32 = jnp.bfloat16, jnp.int32
    keys, tiles = ((S, 128), bf16), ((T // config.tile_t + 1, 4), i32)
    return f, ((T, 1, 128), bf16), ((T, 1), jnp.float32), keys, ((T,), i32), tiles


@pytest.mark.unoptimised
@pytest.mark.gate("64-128-bfloat16")  # 2 s each
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("tile_s", "unit"), [(64, 128), (64, 64), (64, 16), (128, 128), (128, 32)])
def test_the_best_of_units_is_numpys(tile_s, unit, dtype):
    """Two sequences, a limit within the first tile of a unit and one past a launch's last; NaN is as good as -inf."""
    n, T, D = np.array([140, 300]), 20, 32
    q, k, _ = (x[0] for x in draw.inputs(1, T, n.sum(), 1, D, dtype=dtype))
    k = np.array(k)
    k[5] = k[140 + 7] = np.nan
    k[140 + 128 : 140 + 256] = np.nan  # a whole unit
    limit = np.array([1, 130, 140, *[300] * 15, 250, 190], np.int32)
    starts = dict(query_starts=np.array([0, 3, T]), key_starts=np.array([0, 140]))
    sequences = Sequences(**starts, lengths=n, max_keys=300)
    columns = Columns(limit=jnp.asarray(limit), n=300, tiles=sequences.query_tiles(T, 16, jnp.asarray(limit)))
    operands = Operands(jnp.asarray(q), jnp.ones((T, 1)), jnp.asarray(k), None, None)
    config, options = Config(tile_t=16, tile_s=tile_s, n_keys=256), dict(has_relu=False, is_weighted=False)
    got = np.asarray(units(operands, columns, unit=unit, config=config, interpret=True, **options))

    for t in range(T):
        keys = k[:140] if t < 3 else k[140:]
        x = np.asarray(q[t, 0], np.float32) @ np.asarray(keys[: limit[t]], np.float32).T
        x = np.pad(np.where(np.isnan(x), -np.inf, x), (0, -len(x) % unit), constant_values=-np.inf)
        best = x.reshape(-1, unit).max(axis=1)
        np.testing.assert_allclose(np.asarray(score_of(jnp.asarray(got[t, : len(best)]))), best, rtol=1e-5, atol=1e-5)


def test_a_prefill_lowers():
    assert "hisa_units" in lower(*prefill())


def test_many_queries_share_what_is_read_and_few_have_no_larger_tiles():
    assert heuristic(16384, 1, 131072) == Config(tile_t=256, tile_s=64, n_keys=8192, num_warps=8, num_stages=3)
    assert heuristic(128, 32, 131072).tile_t == 16
    assert heuristic(128, 1, 131072).tile_t == 128
