"""The flat indexer's kernel against NumPy, and the compiler at the sizes of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import shapes
from bench.tpu import aot
from hisa_jax.kernels_pallas.mosaic_tpu import flat
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.kernels_pallas.mosaic_tpu.flat import Config
from hisa_jax.layout import Keys, Queries
from tests.gpu import draw
from tests.gpu.promises import check_flat

DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}


def select_flat(q, k, k_scale, w, visible, *, topk, config=None, interpret=False):
    choice = Choice(k=topk, interpret=interpret)
    (indices,) = flat.flat(Queries(q, w, jnp.asarray(visible)), Keys(k, k_scale), choice=choice, config=config)
    return indices, jnp.minimum(visible, topk)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "T", "S", "H", "D", "topk", "dtype", "config"),
    [
        pytest.param(2, 5, 700, 16, 64, 100, "bf16", Config(tile_t=8, tile_s=256), marks=pytest.mark.exhaustive),
        (1, 17, 300, 16, 128, 64, "int8", Config(tile_t=16, tile_s=256)),
        pytest.param(
            1, 3, 513, 32, 64, 2048, "e4m3", Config(tile_t=8, tile_s=512), marks=pytest.mark.exhaustive
        ),  # wants more than there are
    ],
)
def test_chooses_the_best_tokens(B, T, S, H, D, topk, dtype, config, interpret):
    has_scale = dtype != "bf16"
    q, k, k_scale, w = draw.integers(0, B, T, S, H, D, DTYPES[dtype], has_scale)
    visible = np.random.default_rng(1).integers(0, S + 1, (B, T)).astype(np.int32)
    visible[0, :3] = 0, 1, S
    visible[1:] = 0  # a tile that sees nothing
    got = select_flat(q, k, k_scale, w, visible, topk=topk, config=config, interpret=interpret)
    check_flat(got, q, k, k_scale, w, visible, topk=topk, token_tolerance=0.0)


@pytest.mark.slow
def test_keys_beyond_the_last_visible_are_not_read(interpret):
    q, k, _, w = draw.integers(0, 1, 8, 1024, 16, 64, jnp.bfloat16, False)
    visible = np.full((1, 8), 256, np.int32)
    spoilt = jnp.where(jnp.arange(1024)[:, None] < 256, k, jnp.nan)
    options = dict(topk=32, config=Config(tile_t=8, tile_s=256), interpret=interpret)
    for got, want in zip(
        select_flat(q, spoilt, None, w, visible, **options), select_flat(q, k, None, w, visible, **options), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_config_refuses_sizes_that_do_not_tile():
    with pytest.raises(ValueError, match="tile_t must be a multiple of 8"):
        Config(tile_t=12)


def test_tells_how_many_keys_fit():
    assert flat.why_not(1 << 20) is None
    assert "at most" in flat.why_not(1 << 21)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "context", "dtype"),
    [
        pytest.param("prefill", 8192, "bf16", marks=pytest.mark.exhaustive),
        pytest.param("prefill", 131072, "bf16", marks=pytest.mark.exhaustive),  # as test_schedule.py compiles it
        ("decode32", 131072, "int8"),
        ("prefill", 1 << 20, "e4m3"),
    ],
)
def test_compiles(chip, phase, context, dtype):
    model, phase = shapes.DSV32, shapes.PHASES[phase]
    B, T = phase.B, min(phase.T, 64)
    q = jax.ShapeDtypeStruct((B, T, model.H, model.D), DTYPES[dtype])
    k = jax.ShapeDtypeStruct((B, context, model.D), DTYPES[dtype])
    scale = None if dtype == "bf16" else jax.ShapeDtypeStruct((B, context), jnp.float32)
    w, visible = jax.ShapeDtypeStruct((B, T, model.H), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
    f = lambda q, k, scale, w, visible: select_flat(q, k, scale, w, visible, topk=model.topk)  # noqa: E731
    aot.compile_for(chip, f, q, k, scale, w, visible, schedules=False)
