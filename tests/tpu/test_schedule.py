"""The reader of the compiler's schedules, what the table of chips derives, and that no kernel has grown unseen."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import hisa_jax as hj
from bench import shapes
from bench.gpu.checks import check_hisa
from bench.tpu import aot
from bench.tpu import command as tpu
from bench.tpu import rows as tpu_rows
from bench.tpu import schedule as tpu_schedule
from bench.tpu.chips import CHIPS

COMMITTED = pathlib.Path(tpu.__file__).parents[1] / "results" / "tpu_schedule.json"
GROWTH = 1.10


def loops_body(n_ref, x_ref, o_ref):
    def outer(i, _):
        o_ref[...] += x_ref[...]
        lax.fori_loop(0, 24, inner, None)
        return _

    def inner(i, _):
        o_ref[...] = jnp.tanh(o_ref[...]) * jnp.exp(x_ref[...])
        return _

    lax.fori_loop(0, 10, outer, None)
    lax.fori_loop(0, n_ref[0], inner, None)


@functools.cache
def schedule_of_loops(chip):
    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(
        loops_body,
        grid=(6,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((48, 128), jnp.float32),
        name="loops",
    )
    operands = (jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((48, 128), jnp.float32))
    return aot.compile_for(chip, call, *operands).schedule("loops")


def test_finds_the_loops_and_how_often_they_run(chip):
    schedule = schedule_of_loops(chip)
    loops = [loop for loop in schedule.root.walk() if loop.path and not loop.is_branch]
    names = schedule.names(("outer", "inner", "again"))
    assert [names[loop.path] for loop in loops] == ["grid", "outer", "inner", "again"]
    grid, _, inner, again = loops
    assert inner.trips == 24 and again.trips is None
    assert 6 <= grid.trips <= 7  # a last turn only copies
    assert inner.slots["EUP"] > 0 and inner.bundles > 0


def test_cycles_are_bundles_times_trips(chip):
    schedule = schedule_of_loops(chip)
    trips = lambda again, inner: schedule.named_trips(  # noqa: E731
        ("outer", "inner", "again"), {"grid": 6, "outer": 10, "again": again, "inner": inner}, {}, {}
    )
    cycles = lambda again, inner: schedule.cost(trips(again, inner)).cycles  # noqa: E731
    path = {name: path for path, name in schedule.names(("outer", "inner", "again")).items()}
    assert cycles(0, 24) - cycles(0, 23) == 6 * 10 * schedule.cost(path=path["inner"]).cycles
    assert cycles(5, 24) - cycles(4, 24) == 6 * schedule.cost(path=path["again"]).cycles


def test_a_loop_of_unknown_length_must_be_given(chip):
    with pytest.raises(ValueError, match="trips of loop .* are not known"):
        schedule_of_loops(chip).cost()
    with pytest.raises(KeyError, match="has no loop"):
        schedule_of_loops(chip).cost({"9.9": 1})


def test_a_listing_of_another_form_is_not_guessed_at():
    with pytest.raises(ValueError, match="listing has changed"):
        tpu_schedule.read("x", "0 : { a }\n", "== CAPACITY\n1 1 1 1 1 1 1 1 1 1\n", "")


def test_clocks_follow_from_published_peaks():
    """v5e and v5p are known to run at 1.5 and 1.75 GHz."""
    clocks = {name: round(chip.clock_hz / 1e9, 2) for name, chip in CHIPS.items()}
    assert clocks == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "v7x": 2.2}


@pytest.mark.parametrize("chip", CHIPS, indirect=True)
def test_rows_a_cycle_of_the_matrix_units(chip):
    """A large product is scheduled about at the rate that the table of chips takes for its clock: the compiler takes
    the matrix unit for up to 1.3 times faster than the published peak, so such loops may stall (docs/tpu.md)."""
    rows, size = 2048, 512

    def body(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    call = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((rows, size), jnp.float32), name="product")
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, size), (size, size))]
    schedule = aot.compile_for(chip, call, *operands).schedule("product")
    peak = CHIPS[chip].bf16_flops / CHIPS[chip].clock_hz
    share = 2 * rows * size * size / peak / schedule.cost().cycles
    assert 0.6 < share < 1.35


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("topk", 8192),
        *(pytest.param(name, 131072, marks=pytest.mark.exhaustive) for name in ("flat", "hisa", "mla")),
    ],
)
def test_no_kernel_has_grown_by_more_than_a_tenth(chip, name, context):
    committed = json.loads(COMMITTED.read_text())
    if committed["jax"] != jax.__version__:
        pytest.skip(f"the schedules were made with jax {committed['jax']}")
    row = next(row for row in tpu_rows.rows() if (row.row, row.context) == (name, context))
    now = tpu.estimate(CHIPS[chip], row)["kernels"]
    same = {"chip": chip, "row": name, "context": context, "dtype": row.dtype}
    line = next(line for line in committed["rows"] if all(line[key] == same[key] for key in same))
    for kernel, then in line["kernels"].items():
        assert now[kernel]["bundles"] <= GROWTH * then["bundles"], kernel
        assert now[kernel]["cycles_a_query"] <= GROWTH * then["cycles_a_query"], kernel
        assert 0 < now[kernel]["vmem_mib"] <= GROWTH * then["vmem_mib"] < CHIPS[chip].vmem_bytes / (1 << 20), kernel


def test_rows_are_drawn_as_they_are_compiled():
    for row in tpu_rows.rows():
        drawn = jax.eval_shape(row.draw)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
            lambda x: (x.shape, x.dtype), row.operands
        ), row.row


def test_a_wrong_result_is_not_timed():
    """The check that `--run` makes first: of the selection of few queries, which XLA makes, and of a damaged one."""
    S, small = 2048, dataclasses.replace(shapes.DSV32, H=16, D=64, topk=128, block_size=64, block_topk=8)
    q, k, w = jnp.ones((1, 4, 16, 64)), jnp.sin(jnp.arange(S * 64.0)).reshape(1, S, 64), jnp.ones((1, 4, 16))
    visible = jnp.full((1, 4), S, jnp.int32)
    got = hj.select(q, k, w, small.methods()["hisa"], query_positions=visible - 1, return_blocks=True)
    out = got.indices, got.count, got.blocks
    check_hisa(out, (q, k, None, w, visible), small)
    for damaged in ((out[0].at[0, 0, 5].add(1), *out[1:]), (out[0], out[1] - 1, out[2]), (*out[:2], out[2] + 1)):
        with pytest.raises(AssertionError):
            check_hisa(damaged, (q, k, None, w, visible), small)


def test_run_needs_a_tpu():
    command = [sys.executable, "-m", "bench", "tpu", "--run"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2
    assert "--run needs a TPU, this machine has cpu" in done.stderr
