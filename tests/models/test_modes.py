"""A model of one device under meshes that are not its own, in 64-bit mode, and with NaN forbidden: the same numbers."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import hisa_jax as hj
from hisa_jax import models
from tests.models import golden

CASE, LAYERS = "glm5", (0, 2)  # one of each kind
PROMPTS = [[3, 5, 9, 2, 44], [7, 8]]  # unlike lengths, so that there is padding
METHOD = hj.Hisa(topk=8, block_size=2, block_topk=5)
MODES = {
    "auto_mesh": lambda: jax.set_mesh(models.make_mesh(1, 1)),
    # "vocab" is a name that the parameters' axes have.
    "explicit_mesh": lambda: jax.set_mesh(
        jax.make_mesh((1, 1), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)
    ),
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
}


def logits(method=None):
    """Of a model that is loaded in the mode."""
    model = models.from_pretrained(golden.folder_of(CASE, LAYERS), method)
    return model, nnx.jit(lambda model, ids: model(ids))(model, golden.ids(CASE))


def results():
    """The gradient of the logits by the embedding, and the tokens of `generate` and of an engine."""
    model, _ = logits(METHOD)

    @nnx.jit
    def gradient(model, ids):
        return nnx.grad(lambda model: (model(ids) ** 2).mean())(model)["embed"][...]

    engine = models.Engine(model, n_pages=16, rows=2, max_length=16, chunk=4)
    requests = [engine.submit(prompt, 2) for prompt in PROMPTS]
    finished = {}
    while len(finished) < len(requests):
        finished |= engine.step().finished
    tokens = models.generate(model, PROMPTS, 2, chunk=4).tokens
    return gradient(model, golden.ids(CASE)), tokens, [finished[request] for request in requests]


@functools.cache
def plain(function):
    return function()


@pytest.mark.gate("explicit_mesh", "debug_nans")  # tests/test_modes.py has each call in 64-bit mode
@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_one_device_has_the_same_logits(mode):
    _, want = plain(logits)
    with MODES[mode]():
        _, got = logits()
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
def test_it_trains_and_serves_the_same(mode):
    want = plain(results)
    with MODES[mode]():
        got = results()
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_model_with_a_mesh_of_its_own_declines_explicit_axes():
    model = models.from_pretrained(golden.FOLDER / CASE, mesh=models.make_mesh(1, 1))
    with MODES["explicit_mesh"](), pytest.raises(ValueError, match="Explicit axes .*, wanted Auto ones or no mesh"):
        models.generate(model, PROMPTS, 1)
