"""A model with stacked layers gives what it gives layer by layer, chunk by chunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax import models
from hisa_jax.models.stacked import Stacked, runs_of, table_of_layer

from . import golden


@pytest.mark.parametrize("case", ["dsv32", pytest.param("glm52", marks=pytest.mark.exhaustive)])
def test_a_stacked_model_gives_the_golden_logits_in_chunks(case):
    model, ids = golden.model(case), golden.ids(case)
    stacked = Stacked(model)
    assert sum(n for _, n in runs_of(model)) == model.config.num_hidden_layers > len(stacked.runs)
    B, T = ids.shape
    cache = stacked.empty_cache(B, T)
    cache = dataclasses.replace(cache, block_tables=cache.block_tables[::-1])
    run, found = jax.jit(type(stacked).run), []
    for chunk in (ids[:, : T - 4], ids[:, T - 4 :]):
        out = run(stacked, chunk, cache=cache)
        cache = out.cache
        found.append(out.logits)
    golden.assert_close(jnp.concatenate(found, axis=1), golden.numbers(case)["logits"], golden.LOGITS)
    with pytest.raises(ValueError, match="trace=True, wanted a model of single layers"):
        stacked.run(ids, cache=cache, trace=True)
    with pytest.raises(ValueError, match="Engine: model is Stacked, wanted the one it was made of"):
        models.Engine(stacked, n_pages=8)


def test_layers_have_pages_of_their_own_on_the_device_of_the_page():
    """3 layers of 8 pages over 2 devices: 12 pages a device, 4 of each layer; what is no page stays none."""
    tables = jnp.array([[0, 3, 4, 7, -1, 8]], jnp.int32)
    found = np.stack([np.asarray(table_of_layer(tables, i, 3, 24, 2))[0] for i in range(3)])
    np.testing.assert_array_equal(found, [[0, 3, 12, 15, -1, -1], [4, 7, 16, 19, -1, -1], [8, 11, 20, 23, -1, -1]])
