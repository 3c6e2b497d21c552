"""Quantised and rotated index keys: what they may change and what not."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.models.cache import empty_pages

from . import golden


def run(case="dsv32", **settings):
    """The first layer of a model with these settings; its inputs do not depend on them."""
    return golden.with_config(case, **settings).run(golden.ids(case), trace=True).layers[0]


@pytest.mark.slow
def test_the_hadamard_rotation_changes_no_score():
    plain, rotated = golden.output("dsv32").layers[0], run(index_hadamard=True)
    assert np.abs(np.asarray(plain.index_inputs[1]) - np.asarray(rotated.index_inputs[1])).max() > 0.1
    want, got = golden.token_scores(plain.index_inputs), golden.token_scores(rotated.index_inputs)
    golden.assert_close(got, want, golden.SCORES)
    np.testing.assert_array_equal(plain.selection.indices, rotated.selection.indices)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_quantised_index_keys_select_nearly_the_same(dtype, scale):
    layer = run(index_key_dtype=dtype, index_key_scale=scale, index_hadamard=True)
    q, k, _ = layer.index_inputs
    assert isinstance(k, hj.QuantizedKeys) and k.values.dtype == q.dtype == jnp.dtype(dtype)
    is_power_of_two = np.frexp(np.asarray(k.scales))[0] == 0.5
    assert is_power_of_two.all() == (scale == "ue8m0")
    selected, want = golden.as_mask(layer.selection, 40), golden.numbers("dsv32")["L0.index_selected"]
    recall = (selected & want).sum() / want.sum()
    assert recall > 0.9, f"recall {recall:.3f}"
    # What differs are choices near the threshold: by the exact scores they are worth almost the same.
    scores = np.where(
        np.isfinite(golden.numbers("dsv32")["L0.index_scores"]), golden.numbers("dsv32")["L0.index_scores"], 0
    )
    assert (scores * selected).sum() > 0.99 * (scores * want).sum()


@pytest.mark.slow
def test_quantised_index_keys_are_cached_as_such():
    settings = {"index_key_dtype": "float8_e4m3fn", "index_hadamard": True}
    model = golden.with_config(golden.folder_of("dsv32", (1,)), **settings)
    tokens = golden.ids("dsv32")
    whole = golden.run(model, tokens)
    first = golden.run(model, tokens[:, :20], model.empty_cache(2, 40))
    second = golden.run(model, tokens[:, 20:], first.cache)
    assert second.cache.layers[0].keys.dtype == jnp.float8_e4m3fn
    golden.assert_close(second.logits, whole.logits[:, 20:], golden.LOGITS)


@pytest.mark.exhaustive  # 10 seconds
@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_latents_in_8_bits_are_cached_as_such_and_attended_to_by_both_forms(form):
    model, tokens = golden.with_config("dsv32", latent_dtype="float8_e4m3fn"), golden.ids("dsv32")
    first = model.run(tokens[:, :20], cache=model.empty_cache(2, 40), form=form)
    latents = first.cache.layers[0].latents
    assert isinstance(latents, hj.QuantizedLatents) and latents.values.dtype == jnp.float8_e4m3fn
    found = model.run(tokens[:, 20:], cache=first.cache, form=form, trace=True).layers[0].attention
    plain = np.asarray(golden.output("dsv32").layers[0].attention[:, 20:])
    assert 1e-3 < np.linalg.norm(found - plain) / np.linalg.norm(plain) < 0.06


def test_the_published_scale_format_is_read_with_the_checkpoint():
    assert golden.model("fp8_loader").config.index_key_scale == "ue8m0"
    first, *_ = empty_pages(golden.model("fp8_loader").config, 1, 4, jnp.float32)
    assert first.keys.dtype == jnp.float32 and first.scales is None
