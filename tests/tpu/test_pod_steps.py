"""Whole steps of real models on real pods, by the real compiler: what a device holds and sends, and what runs.

`python -m bench pods` compiles whole models; a row takes a minute or two of CPU. Here are two layers on four chips.
"""

import jax
import pytest

import hisa_jax as hj
from bench.pods import bounds, hlo
from bench.pods.rows import Row
from bench.pods.step import compile_step, config_of
from bench.tpu import aot
from bench.tpu.chips import CHIPS
from tests import emulated

pytestmark = pytest.mark.slow
FEW = hj.Hisa(topk=256, block_size=128, block_topk=8)  # kernels of fewer places compile faster


@pytest.fixture
def effort(request):
    """As much of the compiler's effort as the case says: the least takes half of the time."""
    names = "jax_optimization_level", "jax_memory_fitting_level"
    before = [getattr(jax.config, name) for name in names]
    for name, own in zip(names, before, strict=True):
        jax.config.update(name, request.param or own)
    yield
    for name, own in zip(names, before, strict=True):
        jax.config.update(name, own)


def small(model, weights, chip, **changes):
    """Two layers with some of their experts on the four chips of the smallest slice, 32K tokens a request."""
    per_chip = CHIPS[chip].devices_per_chip
    own = dict(phase="decode", data=2, model_axis=per_chip, context_axis=2, batch=4, context=32768)
    return Row(model=model, weights=weights, chip=chip, layers=(3, 5), experts=16, **(own | changes))


@pytest.mark.gate("gate")  # 15 s of CPU, the others 40
@pytest.mark.parametrize(
    ("chip", "row", "effort"),
    [
        pytest.param("v5e", small("glm5", "bf16", "v5e", method=FEW, context=131072), "O0", id="gate"),
        pytest.param("v5e", small("glm5", "bf16", "v5e"), None, id="decode"),
        pytest.param("v7x", small("dsv32", "e4m3", "v7x"), None, id="weights_of_8_bits"),
        pytest.param("v6e", small("glm5", "bf16", "v6e", phase="prefill", queries=256), None, id="prefill"),
    ],
    indirect=["effort"],
)
def test_two_layers_of_a_real_model_fit_and_exchange_what_is_new_alone(chip, row, effort):
    if reason := aot.why_not():
        pytest.skip(reason)
    config, mesh = config_of(row), aot.small_mesh(chip, **row.axes)
    step = compile_step(row, mesh, schedules=False)
    text, memory = step.program.compiled.as_text(), step.program.compiled.memory_analysis()
    found, kernels = hlo.collectives(text, row.n_devices, step.runs), hlo.kernels(text)
    assert step.runs == (2,) and {x.times for x in found} == {1, 2}
    assert not bounds.problems(row, config, found, kernels, memory.temp_size_in_bytes, CHIPS[chip].hbm_bytes)
    # Pages are written where they are, and of the cache and of 8-bit weights nothing is copied.
    assert memory.alias_size_in_bytes >= step.cache_bytes
    assert memory.temp_size_in_bytes < 0.1 * (step.cache_bytes + step.weight_bytes)


@pytest.mark.exhaustive  # half a minute of CPU
def test_an_engine_writes_its_pages_where_they_are():
    if reason := aot.why_not():
        pytest.skip(reason)
    emulated.assert_kept("tests.tpu.engine_passes", n=1)
