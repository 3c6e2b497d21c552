"""Whole steps of real models on real pods, by the real compiler: what a device holds and sends, and what runs.

`python -m bench pods` compiles whole models; a row takes a minute or two of CPU. Here are two layers on four chips.
"""

import pytest

from bench.pods import bounds, hlo
from bench.pods.rows import Row
from bench.pods.step import compile_step, config_of
from bench.tpu import aot
from bench.tpu.chips import CHIPS

# 35 seconds of CPU each: the gate has tests/bench/test_pods.py.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def small(model, weights, chip, **changes):
    """Two layers with some of their experts on the four chips of the smallest slice, 32K tokens a request."""
    per_chip = CHIPS[chip].devices_per_chip
    own = dict(phase="decode", data=2, model_axis=per_chip, context_axis=2, batch=4, context=32768)
    return Row(model=model, weights=weights, chip=chip, layers=(3, 5), experts=16, **(own | changes))


@pytest.mark.parametrize(
    ("chip", "row"),
    [
        ("v5e", small("glm5", "bf16", "v5e")),
        ("v7x", small("dsv32", "e4m3", "v7x")),
        ("v6e", small("glm5", "bf16", "v6e", phase="prefill", queries=256)),
    ],
)
def test_two_layers_of_a_real_model_fit_and_exchange_what_is_new_alone(chip, row):
    if reason := aot.why_not():
        pytest.skip(reason)
    config, mesh = config_of(row), aot.small_mesh(chip, **row.axes)
    step = compile_step(row, mesh)
    text, memory = step.program.compiled.as_text(), step.program.compiled.memory_analysis()
    found, kernels = hlo.collectives(text, row.n_devices, step.runs), hlo.kernels(text)
    assert step.runs == (2,) and {x.times for x in found} == {1, 2}
    assert not bounds.problems(row, config, found, kernels, memory.temp_size_in_bytes, CHIPS[chip].hbm_bytes)
    # Pages are written where they are, and of the cache and of 8-bit weights nothing is copied.
    assert memory.alias_size_in_bytes >= step.cache_bytes
    assert memory.temp_size_in_bytes < 0.1 * (step.cache_bytes + step.weight_bytes)
