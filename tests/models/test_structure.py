"""A model as jitted functions take it. 1 s."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import hisa_jax as hj
from hisa_jax.models.structure import Structure, structures_of, weights_of
from tests.models import golden

HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)


def test_a_model_is_made_again_of_the_weights_that_it_had():
    model = nnx.clone(golden.model("glm5").with_method(HISA))  # which other tests have, too
    weights, was = weights_of(model), np.asarray(model.embed[...])
    model.embed[...] = jnp.zeros_like(model.embed[...])
    again = Structure(model).merge(weights)
    assert not np.any(model.embed[...])
    np.testing.assert_array_equal(again.embed[...], was)
    assert again.plan(0, "decode") == HISA


def test_structures_are_equal_where_the_program_is():
    model = golden.model("glm5").with_method(HISA)
    phases = structures_of(model)
    assert phases["prefill"] == phases["decode"] == Structure(golden.model("glm5").with_method(HISA))
    assert hash(phases["prefill"]) == hash(phases["decode"])
    assert phases["decode"] != Structure(model.with_method(hj.Dsa(topk=8)))
    assert phases["decode"] != Structure(model.with_page_size(2))
