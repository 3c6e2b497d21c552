"""Keys sharded over devices: tests/context_parallel.py on 8 emulated ones, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from tests import draw, emulated


@pytest.mark.slow
@pytest.mark.gate("some")
@pytest.mark.parametrize(("part", "n_promises"), {"some": 9, "others": 10}.items(), ids=["some", "others"])
def test_a_selection_over_eight_devices_is_that_of_one(part, n_promises):
    emulated.assert_kept("tests.context_parallel", part, n=n_promises)


METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=16, block_topk=5),
    "all_blocks_kept": hj.Hisa(topk=24, block_size=16, block_topk=32),
    "block_sparse": hj.BlockSparse(topk=64, block_size=16),
}


@pytest.mark.gate("hisa-False")  # those of eight devices have every method with scores
@pytest.mark.parametrize(
    ("method", "return_scores"),
    [
        ("hisa", False),
        *(pytest.param(method, True, marks=[] if method == "dsa" else pytest.mark.slow) for method in METHODS),
    ],
)
def test_a_mesh_may_be_one_device(method, return_scores):
    method = METHODS[method]
    q, k, w = draw.inputs(2, 5, 320, 4, 32, dtype="bfloat16")
    arrays = jnp.asarray(q), draw.quantized(k, "int8", "float32"), jnp.asarray(w)
    options = dict(return_scores=return_scores, return_blocks=method.has_blocks)
    mesh = jax.make_mesh((1,), ("context",))
    got = hj.select(*arrays, method, mesh=mesh, context_axis="context", **options)
    wanted = hj.select(*arrays, method, implementation="xla", **options)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def call(S=256, **changes):
    q, k, w = jnp.ones((1, 2, 4, 32)), jnp.ones((1, S, 32)), jnp.ones((1, 2, 4))
    options = dict(mesh=jax.make_mesh((1,), ("context",)), context_axis="context") | changes
    method = options.pop("method", hj.Hisa(topk=16, block_size=64, block_topk=2))
    return hj.select(q, k, w, method, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(context_axis="x"), r"select: context_axis='x', wanted one of the mesh's axes \('context',\)"),
        (dict(data_axis="x"), "select: data_axis='x', wanted one of"),
        (dict(data_axis="context"), "select: context_axis='context', data_axis='context', wanted different axes"),
        (dict(S=250), "select: k's S = 250, wanted a multiple of 64 for context_axis='context'"),
        (dict(method=hj.Dsa(topk=4), return_blocks=True), "select: return_blocks=True"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_empty_batches_give_empty_selections():
    mesh = jax.make_mesh((1,), ("context",))
    q, k, w = jnp.ones((0, 2, 4, 32)), jnp.ones((0, 64, 32)), jnp.ones((0, 2, 4))
    got = hj.select(q, k, w, hj.Dsa(topk=4), mesh=mesh, context_axis="context")
    assert got.indices.shape == (0, 2, 4)
