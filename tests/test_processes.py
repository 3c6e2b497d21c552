"""Several processes: tests/processes.py on localhost, each run bounded by a time-out."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj

TIMEOUT_S = 600
# What they promise; not imported from there, since that module configures JAX.
SHARDED = "selections_are_those_of_one_device", "sparse_mla_is_that_of_one_device_and_exchanges_one_sum"
PAGED = "pages_on_all_processes_serve_as_on_one"


def run(n, *promises, module="tests.processes"):
    """(exit status, output) of each of n processes; fails if one has not ended in time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, str(port), str(n)]
    started = [
        subprocess.Popen(
            [*command, str(i), *promises], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for i in range(n)
    ]  # fmt: skip
    try:
        ended = [(process.communicate(timeout=TIMEOUT_S)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(status, output) for output, status in ended]


@pytest.mark.exhaustive
def test_four_processes_select_and_attend_to_what_one_device_does():
    for status, output in run(4, *SHARDED):
        assert status == 0 and output.count("kept:") == 3 and "merged: 216 bytes" in output, output


@pytest.mark.exhaustive
def test_two_processes_do_too_and_end_with_an_error_where_shapes_disagree_or_one_dies():
    faults = "shapes_that_disagree_are_an_error_on_all", "a_process_that_dies_ends_the_others"
    first, other = run(2, *SHARDED, PAGED, *faults)
    for _, output in (first, other):
        assert output.count("kept:") == 3 and "merged: 216 bytes" in output and "paged" in output, output
        assert (
            "refused: step: k is float32 [1, 256, 32] on process 0, float32 [1, 272, 32] on process 1, wanted the same "
            "on all" in output
        ), output
    # The collective's error, or that of the runtime, which misses the other one's heartbeat: whichever comes first.
    assert other[0] == 3 and first[0] != 0, first[1]
    assert "Gloo AllGather failed" in first[1] or "another task died" in first[1], first[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_axis": "x"}, r"sparse_mla: context_axis='x', wanted one of the mesh's axes \('context',\)"),
        ({"data_axis": "x"}, "sparse_mla: data_axis='x', wanted one of"),
        ({"sink": jnp.zeros(3)}, r"sparse_mla: sink is \[3\], wanted \[4\]"),
    ],
)
def test_attention_that_cannot_be_sharded_is_refused(changes, message):
    q, kv, indices = jnp.ones((1, 2, 4, 24)), jnp.ones((1, 8, 24)), jnp.zeros((1, 2, 3), jnp.int32)
    options = dict(mesh=jax.make_mesh((1,), ("context",)), context_axis="context", value_dim=16, scale=1.0) | changes
    with pytest.raises(ValueError, match=message):
        hj.sparse_mla(q, kv, indices, **options)
