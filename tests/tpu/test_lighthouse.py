"""Lighthouse with splash attention, compiled for TPUs with grouped heads: forward and gradient."""

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj
from bench.tpu import aot
from hisa_jax.lighthouse.forward import Options, attend, strengths
from hisa_jax.lighthouse.rope import Rotation
from hisa_jax.lighthouse.selection import select

T, H, G, D = 8192, 4, 2, 128


@pytest.mark.exhaustive  # a minute a chip: gathers are slow to compile
def test_a_layer_and_its_gradient_compile(chip):
    method = hj.Lighthouse(levels=3, pool=4, topk=T // 64)
    options = Options(name="splash", scale=D**-0.5, rotate=Rotation(1e5))

    def layer(q, k, v, d):
        positions = jnp.arange(T, dtype=jnp.int32)[None]
        selection = select(*strengths(q, k, method=method, options=options), method)
        out, pull = jax.vjp(lambda *x: attend(*x, selection, positions, method, options), q, k, v)
        return out, *pull(d)

    shapes = ((1, T, heads, D) for heads in (H, G, G, H))
    program = aot.compile_for(chip, layer, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    names = {schedule.name for schedule in program.schedules}
    assert any("splash" in name for name in names), names
    # Scratch is a few copies of the inputs; scores of all queries with all keys would be hundreds.
    assert program.temp_bytes < 8 * T * (2 * H + 2 * G) * D * 2
