"""config.json in every style, and the published sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hisa_jax import models
from hisa_jax.models.config import indexer_kinds

from . import golden


def keys_of(case, **changes):
    keys = json.loads((golden.FOLDER / case / "config_published.json").read_text()) | changes
    return {name: value for name, value in keys.items() if value is not ...}


@pytest.mark.parametrize(("name", "billions"), [("dsv32", 671.9), ("glm5", 743.9)])
def test_published_sizes_have_the_published_number_of_parameters(name, billions):
    config = getattr(models, name)()
    model = nnx.eval_shape(lambda: models.from_config(config, rngs=nnx.Rngs(0)))
    count = sum(parameter.size for parameter in jax.tree.leaves(nnx.state(model)))
    assert round(count / 1e9, 1) == billions


@pytest.mark.gate("glm52")  # whose layers share selections
@pytest.mark.parametrize("name", ["dsv32", "glm5", "glm52"])
def test_published_sizes_run_abstractly(name):
    """The first layers of each, a chunk of a prompt after 8K tokens and one decoding step: every shape fits."""
    config = getattr(models, name)()
    config = dataclasses.replace(
        config, num_hidden_layers=5, layer_kinds=config.layer_kinds[:5], indexer_kinds=config.indexer_kinds[:5]
    )
    model = nnx.eval_shape(lambda: models.from_config(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    for T, phase in ((512, "prefill"), (1, "decode")):
        tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
        out = jax.eval_shape(lambda m, x, p=phase: m.run(x, cache=m.empty_cache(2, 8192), phase=p), model, tokens)
        assert out.logits.shape == (2, T, config.vocab_size)
        assert out.cache.layers[0].latents.shape == (256, 64, 576)


def test_glm52_selects_in_21_of_its_78_layers():
    full = [i for i, kind in enumerate(models.glm52().indexer_kinds) if kind == "full"]
    assert full == [0, 1, 2, *range(6, 75, 4)] and len(full) == 21


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"indexer_types": ["full", "shared", "full"], "index_topk_pattern": "FFF"}, "FSF"),
        ({"index_topk_pattern": "FSS"}, "FSS"),
        ({"index_topk_pattern": ["F", "F", "S"]}, "FFS"),
        ({"index_topk_pattern": None, "index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSF"),
        ({"index_topk_freq": 2}, "FFS"),
        ({}, "FFF"),
    ],
)
def test_shared_layers_come_from_a_list_a_pattern_or_a_frequency(keys, kinds):
    config = models.config_from_keys(keys_of("glm5", **keys))
    assert "".join(kind[0].upper() for kind in config.indexer_kinds) == kinds


def test_frequency_and_offset_follow_the_published_rule():
    assert [i for i, kind in enumerate(indexer_kinds(12, 4, 3)) if kind == "full"] == [0, 1, 2, 6, 10]


def test_the_layout_of_the_indexers_rope_is_a_key_or_that_of_the_family():
    assert not models.config_from_keys(keys_of("dsv32")).indexer_rope_interleave
    assert models.config_from_keys(keys_of("glm5", indexer_rope_interleave=...)).indexer_rope_interleave
    assert models.config_from_keys(keys_of("dsv32", indexer_rope_interleave=True)).indexer_rope_interleave


def test_dense_layers_come_from_a_list_or_a_number():
    kinds = ["sparse", "dense", "sparse"]
    assert models.config_from_keys(keys_of("glm5", mlp_layer_types=kinds)).layer_kinds == tuple(kinds)
    assert models.config_from_keys(keys_of("glm5", first_k_dense_replace=2)).layer_kinds == ("dense", "dense", "sparse")


def test_mscale_scales_rope_and_softmax_as_the_public_code_does():
    rope = keys_of("dsv32")["rope_scaling"] | {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 1.0}
    yarn = models.config_from_keys(keys_of("dsv32", rope_scaling=rope)).yarn
    # 0.1 ln 8 = 0.2079442
    assert yarn.rope_scale == pytest.approx(1.1470165 / 1.2079442, rel=1e-6)
    assert yarn.softmax_scale == pytest.approx(1.2079442**2, rel=1e-6)
    bare = {name: value for name, value in rope.items() if "mscale" not in name}
    yarn = models.config_from_keys(keys_of("dsv32", rope_scaling=bare)).yarn
    assert yarn.rope_scale == pytest.approx(1.2079442, rel=1e-6) and yarn.softmax_scale == 1
    yarn = models.config_from_keys(keys_of("dsv32", rope_scaling=bare | {"attention_factor": 0.5})).yarn
    assert yarn.rope_scale == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "deepseek_v4"}, "model_type is 'deepseek_v4', wanted one of deepseek_v32, glm_moe_dsa"),
        ({"kv_lora_rank": ..., "vocab_size": ...}, "lacks vocab_size, kv_lora_rank"),
        ({"num_hidden_layers": ...}, "lacks num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "default"}}, "lacks rope_theta"),
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu': no other is built"),
        ({"attention_bias": True}, "attention_bias is True, wanted False: no other is built"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling: type is 'linear', wanted one of default, yarn",
        ),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 1e4}}, "lacks factor"),
        ({"index_topk_pattern": "FS"}, "index_topk_pattern is 'FS', wanted an entry for each of num_hidden_layers = 3"),
        ({"index_topk_pattern": "SFF"}, "must be 'full' at layer 0"),
        ({"index_topk_pattern": "FXF"}, r"index_topk_pattern is 'FXF', wanted letters F \(full\) or S"),
        ({"mlp_layer_types": ["dense"]}, "wanted an entry for each of num_hidden_layers = 3"),
        ({"n_group": 3}, "n_group=3.*must be a divisor of 8 experts"),
        ({"topk_group": 2}, "topk_group=2.*must be from 1 to n_group = 1"),
        ({"num_experts_per_tok": 9}, "must be at most the 8 experts in kept groups"),
        ({"qk_rope_head_dim": 32}, "index_head_dim=16.*must be at least qk_rope_head_dim = 32"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        models.config_from_keys(keys_of("glm5", **keys), "config.json")


def test_settings_of_the_index_keys_are_checked():
    config = models.read_config(golden.FOLDER / "glm5")
    for change, message in [
        ({"index_key_dtype": "float16"}, "one of float8_e4m3fn, int8"),
        ({"index_key_scale": "bf16"}, "one of float32, ue8m0"),
        ({"index_hadamard": True, "index_head_dim": 24}, "False unless index_head_dim is 2"),
        ({"latent_dtype": "int8"}, "float8_e4m3fn"),
        ({"latent_dtype": "float8_e4m3fn", "kv_lora_rank": 200}, "None unless 128 divides kv_lora_rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wanted a folder with a config\.json"):
        models.read_config(tmp_path)
    for text, message in [("{", "not JSON"), ("[]", "holds a list, wanted an object")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            models.read_config(tmp_path)


def test_stop_tokens_are_those_of_the_generation_config_then_of_the_config(tmp_path):
    keys, generation = keys_of("glm5", eos_token_id=[3, 100]), tmp_path / "generation_config.json"
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert models.read_config(tmp_path).eos_token_ids == (3, 100)
    for said, ids in (({}, (3, 100)), ({"eos_token_id": None}, (3, 100)), ({"eos_token_id": 7}, (7,)),
                      ({"eos_token_id": [7, 0], "top_p": 0.9}, (7, 0)), ({"eos_token_id": []}, ())):  # fmt: skip
        generation.write_text(json.dumps(said))
        assert models.read_config(tmp_path).eos_token_ids == ids
    for text, message in (
        ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "holds a list, wanted an object"),
        ('{"eos_token_id": 101}', "eos_token_id is 101, wanted a token from 0 to 100 or a list of them"),
        ('{"eos_token_id": [1, -1]}', r"eos_token_id is \[1, -1\]"), ('{"eos_token_id": "1"}', "eos_token_id is '1'"),
        ('{"eos_token_id": true}', "eos_token_id is True"), ('{"eos_token_id": [1.0]}', r"eos_token_id is \[1\.0\]"),
        (" " * (2**20 + 1), "has more than 1048576 bytes"),
    ):  # fmt: skip
        generation.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
            models.read_config(tmp_path)
    with pytest.raises(ValueError, match="eos_token_ids.*tokens from 0 to 100"):
        models.config_from_keys(keys | {"eos_token_id": [101]})
