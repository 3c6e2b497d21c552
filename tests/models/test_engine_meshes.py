"""Engines on meshes: tests/models/meshes.py on 8 emulated devices, tests/models/engine_processes.py on localhost."""

import jax
import pytest

from hisa_jax import models
from hisa_jax.models.engine import Engine
from tests import emulated

from .. import test_processes
from . import serving

# What they promise; not imported from there, since those modules configure JAX.
PROMISES = {
    "small": ("a_small_mesh",),
    "pages": ("one_on_eight_devices_for_the_pages",),
    "all": ("two_on_each_axis",),
    "groups": ("eight_groups",),
    "ranks": ("four_ranks_of_two_devices",),
    "pages run out": (
        "a_request_that_is_cancelled_gives_back_pages_of_four_devices_and_the_others_go_on",
        "requests_wait_for_pages_of_one_device_while_others_have_some",
    ),
    "faults": ("faults_of_every_kind_end_as_on_one_device",),
}


@pytest.mark.slow
@pytest.mark.gate("small")
@pytest.mark.parametrize("promises", PROMISES)
def test_an_engine_on_eight_devices_serves_as_on_one(promises):
    """Some 10 s of CPU for the small one, a minute and more for the others."""
    emulated.assert_kept("tests.models.meshes", *PROMISES[promises], n=len(PROMISES[promises]), timeout_s=1800)


def run(n, *promises):
    return test_processes.run(n, *promises, module="tests.models.engine_processes")


@pytest.mark.exhaustive
def test_four_processes_serve_as_one_device_does():
    for status, output in run(4, "tokens_are_those_of_one_device_with_one_cancelled"):
        assert status == 0 and "served: 9" in output, output


@pytest.mark.exhaustive
def test_two_processes_do_too_and_what_differs_is_an_error_on_both():
    promises = (
        "tokens_are_those_of_one_device_with_one_cancelled",
        "another_config_is_an_error_on_all",
        "requests_that_differ_are_an_error_on_all_and_without_them_they_go_on",
        "a_step_that_raises_on_one_process_is_done_again_by_all",
        "a_process_that_makes_no_step_is_an_error_on_those_that_do",
    )
    for status, output in run(2, *promises):
        assert status == 0 and output.count("kept:") == len(promises), output
        assert "Engine: rows is 4 on process 0, 8 on process 1, wanted the same on all" in output, output
        assert "Engine: methods is " in output and "step: tokens is " in output and "went on" in output, output
        assert "did not come within 4 s" in output, output


@pytest.mark.exhaustive
def test_a_process_that_dies_ends_the_other_with_an_error():
    first, other = run(2, "a_process_that_dies_ends_the_others")
    assert other[0] == 3 and first[0] != 0, first[1]
    assert any(text in first[1] for text in ("did not come within", "another task died", "Gloo")), first[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(n_pages=30), "Engine: n_pages=30, wanted a multiple of 4, the mesh's 'data' and 'context'"),
        (dict(rows=5), "Engine: rows=5, wanted a multiple of 2, the mesh's 'data'"),
        (dict(prefill_rows=3), "Engine: prefill_rows=3, wanted a multiple of 2, the mesh's 'data'"),
        (dict(process_timeout_s=0), "Engine: process_timeout_s=0, wanted a number of at least"),
    ],
)
def test_sizes_that_the_mesh_does_not_split_are_refused(sizes, message):
    model = serving.model().with_method(serving.HISA)
    model.mesh = jax.sharding.AbstractMesh((2, 1, 2), ("data", "model", "context"))
    with pytest.raises(ValueError, match=message):
        Engine(model, **dict(n_pages=32, max_length=64) | sizes)
    assert models.make_mesh(1, 1, 1).shape == {"data": 1, "model": 1, "context": 1}
