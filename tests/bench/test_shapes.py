"""Named shapes."""

import pytest

from bench import shapes
from hisa_jax.models import published


@pytest.mark.parametrize("name", shapes.MODELS)
def test_shapes_are_those_of_the_published_models(name):
    model, config = shapes.MODELS[name], getattr(published, name)()
    assert (model.H, model.D, model.topk) == (config.index_n_heads, config.index_head_dim, config.index_topk)
    assert model.mla_heads == config.num_attention_heads
    assert model.mla_value_dim == config.kv_lora_rank
    assert model.mla_dim == config.kv_lora_rank + config.qk_rope_head_dim
    assert model.max_context == config.max_position_embeddings


def test_contexts_have_short_names():
    assert list(map(shapes.label, shapes.CONTEXTS)) == ["8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]
    assert shapes.label(1000) == "1000"


def test_every_model_has_all_methods_the_flat_one_first():
    for model in shapes.MODELS.values():
        assert list(model.methods()) == ["dsa", "hisa", "scan", "block-sparse"]
        assert {method.topk for method in model.methods().values()} == {2048}
