"""The hierarchical indexer compiles for four TPU generations at the shapes of real models, on a machine without one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bench import shapes
from bench.tpu import aot
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import pool, ragged, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from tests import kernel_calls

DTYPES = {"bf16": jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
K = 1024


def inputs(model, phase, S, dtype):
    B, T = phase.B, phase.T
    scale = None if dtype == "bf16" else jax.ShapeDtypeStruct((B, S), jnp.float32)
    return (
        jax.ShapeDtypeStruct((B, T, model.H, model.D), DTYPES[dtype]),
        jax.ShapeDtypeStruct((B, S, model.D), DTYPES[dtype]),
        scale,
        jax.ShapeDtypeStruct((B, T, model.H), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "phase", "context", "dtype"),
    [
        pytest.param("dsv32", "prefill", 8 * K, "e4m3", marks=pytest.mark.exhaustive),  # keeps all its blocks
        # Keys fill what VMEM has for them. In the gate test_schedule.py compiles it.
        pytest.param("dsv32", "prefill", 128 * K, "bf16", marks=pytest.mark.exhaustive),
        pytest.param("glm5", "prefill", 32 * K, "int8", marks=pytest.mark.exhaustive),
        ("glm52", "prefill", 1024 * K, "bf16"),  # keys copied block by block
        # Decoding on pages is in test_ragged.py.
        pytest.param("dsv32", "decode128", 128 * K, "bf16", marks=pytest.mark.exhaustive),
        pytest.param("glm52", "decode1", 1024 * K, "int8", marks=pytest.mark.exhaustive),
    ],
)
def test_indexer_compiles(chip, model, phase, context, dtype):
    model, phase = shapes.MODELS[model], shapes.PHASES[phase]
    options = {"topk": model.topk, "block_size": model.block_size, "block_topk": model.block_topk}

    def hisa(q, k, k_scale, w, visible):
        return kernel_calls.select_hisa(mosaic_tpu, q, k, k_scale, w, visible, lengths=visible[:, -1], **options)

    program = aot.compile_for(chip, hisa, *inputs(model, phase, context, dtype), schedules=False)
    # Scores of all tokens, the means of a prefill and copies of keys would show here.
    if phase.T > 1:
        assert program.temp_bytes < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "D", "block_size"),
    [*(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((16, 64, 64), (128, 128, 64))), (128, 64, 256)],
)
def test_every_head_and_block_size_compiles(chip, H, D, block_size):
    def hisa(q, k, w, visible):
        return kernel_calls.select_hisa(
            mosaic_tpu, q, k, None, w, visible, topk=500, block_size=block_size, block_topk=16
        )

    q, k = jax.ShapeDtypeStruct((1, 100, H, D), jnp.bfloat16), jax.ShapeDtypeStruct((1, 40_000, D), jnp.bfloat16)
    w, visible = jax.ShapeDtypeStruct((1, 100, H), jnp.float32), jax.ShapeDtypeStruct((1, 100), jnp.int32)
    aot.compile_for(chip, hisa, q, k, w, visible, schedules=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("phase", "context"), [("prefill", 128 * K), ("decode32", 128 * K), ("prefill", 1024 * K)])
def test_lists_compile(chip, phase, context):
    """The blocks that HISA of a layer before kept: no keys are copied."""
    model, phase = shapes.DSV32, shapes.PHASES[phase]
    ids = jax.ShapeDtypeStruct((phase.B, phase.T, model.block_topk), jnp.int32)

    def listed(ids, q, k, k_scale, w, visible):
        candidates = CandidateBlocks(ids, model.block_size)
        call = dataclasses.replace(kernel_calls.call_of(q, k, k_scale, w, visible), candidates=candidates)
        return mosaic_tpu.select_flat(call, model.topk)

    program = aot.compile_for(chip, listed, ids, *inputs(model, phase, context, "bf16"), schedules=False)
    assert program.temp_bytes < 64 << 20


def test_kept_means_compile(chip):
    """What serving does: pool once, filter from the means."""
    model, B, S = shapes.DSV32, 2, 128 * K

    def f(q, k, k_scale, w, visible):
        means = pool.pool(ragged.in_blocks(k, k_scale, model.block_size), visible[:, -1])
        call = kernel_calls.call_of(q, k, k_scale, w, visible)
        choice = Choice(k=model.block_topk, keep_first=1, keep_last=1)
        return select.kept_blocks(*ragged.of_call(call, model.block_size, means), choice)

    operands = inputs(model, dataclasses.replace(shapes.PHASES["decode1"], B=B, T=4), S, "int8")
    aot.compile_for(chip, f, *operands, schedules=False)
