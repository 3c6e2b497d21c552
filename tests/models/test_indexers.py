"""The indexers of published models compute and select what public model code does, whole and through a cache."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models import indexers
from hisa_jax.models.indexers import page
from hisa_jax.models.rope import rope_table
from tests.models.golden import FOLDER

FAMILY = ("axk2", "dots3_note", "glm5_next", "hy_v4", "minimax_m3_vl", "mistral_large4", "qwen4_exp")
LAYERS = ("dsv32-0", "dsv32-2", "glm5-1", "glm52-0", "dsv4-1", "dsv4-3")
CASES = (*FAMILY, *LAYERS)
# An indexer with pools, with windows, and with blocks a head; the others are in the exhaustive run.
IN_GATE = ("glm5_next", "minimax_m3_vl", "dsv4-1")
LIMIT = 1e-5


@functools.cache
def case(name):
    """An indexer, the arguments of its call, and what public code computes: q, k, w, and "selected" or "blocks"."""
    if name in FAMILY:
        arrays = dict(np.load(FOLDER / "family" / f"{name}.npz"))
        weights = {key.removeprefix("weights."): x for key, x in arrays.items() if key.startswith("weights.")}
        arguments = {key: arrays.get(key) for key in ("hidden", "q_resid", "cos", "sin")}
        arguments["positions"] = arrays["positions"].astype(np.int32)
        return indexers.from_weights(name, json.loads(str(arrays["meta"])), weights), arguments, arrays
    folder, layer = name.split("-")
    golden, computed = (np.load(FOLDER / folder / file) for file in ("golden.npz", "indexer.npz"))
    wanted = {part: computed[f"L{layer}.{part}"] for part in "qkw"}
    wanted["selected"] = golden[f"L{layer}.index_selected"]
    if folder == "dsv4":
        inputs, sizes = np.load(FOLDER / folder / "inputs.npz"), dict(index_topk=3, qk_rope_head_dim=8)
        arguments = {key: inputs[f"L{layer}.{key}"] for key in ("hidden", "q_resid")}
        arguments |= {key: inputs[key] for key in ("cos", "sin")}
        start = f"L{layer}.weights."
        weights = {key.removeprefix(start): inputs[key] for key in inputs.files if key.startswith(start)}
        sizes |= dict(compress_rates={"compressed_sparse_attention": 4})
        return indexers.from_weights("deepseek_v4", sizes, weights), arguments, wanted
    config = models.read_config(FOLDER / folder)
    tensors = safetensors.numpy.load_file(FOLDER / folder / "model.safetensors")
    tensors = {key: x.astype(np.float32) for key, x in tensors.items()}
    ids, layer = golden["input_ids"], int(layer)
    own = f"model.layers.{layer}."
    before = golden[f"L{layer - 1}.hidden"] if layer else tensors["model.embed_tokens.weight"][ids]
    hidden = rms_norm(before, tensors[own + "input_layernorm.weight"], config.rms_norm_eps)
    latents = hidden @ tensors[own + "self_attn.q_a_proj.weight"].T
    latents = rms_norm(latents, tensors[own + "self_attn.q_a_layernorm.weight"], config.lora_norm_eps)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    cos, sin = rope_table(config, jnp.asarray(positions))
    start = own + "self_attn.indexer."
    weights = {key: x for key, x in tensors.items() if key.startswith(start)}
    sizes = dict(index_topk=config.index_topk, qk_rope_head_dim=config.qk_rope_head_dim)
    arguments = dict(hidden=hidden, q_resid=latents, cos=cos, sin=sin, positions=positions)
    return indexers.from_weights(config.model_type, sizes, weights), arguments, wanted


def rms_norm(x, weight, eps):
    x = x.astype(np.float64)
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight).astype(np.float32)


def in_jax(arguments):
    return {name: None if x is None else jnp.asarray(x) for name, x in arguments.items()}


def part(arguments, at):
    return {name: None if x is None else x[:, at] for name, x in arguments.items()}


@functools.cache
def whole(name):
    indexer, arguments, _ = case(name)
    return indexer(**in_jax(arguments), return_scores=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.gate(*IN_GATE)
def test_it_computes_and_selects_what_public_code_does(name):
    _, _, wanted = case(name)
    got = whole(name)
    # Of QSA the first queries, which see no whole pool, were not caught.
    first = 3 if name == "qwen4_exp" else 0
    np.testing.assert_allclose(got.q[:, first:], wanted["q"][:, first:], atol=LIMIT, rtol=0)
    np.testing.assert_allclose(got.k, wanted["k"], atol=LIMIT, rtol=0)
    if "w" in wanted:
        np.testing.assert_allclose(got.w, wanted["w"], atol=LIMIT, rtol=0)
    if "blocks" in wanted:
        most = np.iinfo(np.int32).max
        lists = (np.where(x < 0, most, x) for x in (np.moveaxis(got.selection.blocks, 2, 1), wanted["blocks"]))
        np.testing.assert_array_equal(*(np.sort(x, axis=-1) for x in lists))
    else:
        S = wanted["selected"].shape[-1]
        is_chosen = (np.asarray(got.selection.indices)[..., None] == np.arange(S)).any(axis=-2)
        np.testing.assert_array_equal(is_chosen, wanted["selected"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.exhaustive
def test_chunks_through_a_cache_with_rejected_tokens_select_the_same(name):
    indexer, arguments, _ = case(name)
    arguments = in_jax(arguments)
    B, T = arguments["hidden"].shape[:2]
    cache, start = indexer.init_cache(B, T, page_size=4, room=5), 0
    for n in (5, 1, 3, 7, T):
        chunk = part(arguments, slice(start, start + n))
        if start == 6:
            junk = indexer(**chunk | dict(hidden=-chunk["hidden"]), cache=cache).cache
            cache = junk.truncate(junk.lengths - n)
        got = indexer(**chunk, cache=cache, return_scores=True)
        wanted = jax.tree.map(lambda x, at=slice(start, start + n): x[:, at], whole(name).selection)
        np.testing.assert_array_equal(got.selection.indices, wanted.indices)
        np.testing.assert_array_equal(got.selection.count, wanted.count)
        np.testing.assert_allclose(got.selection.scores, wanted.scores, atol=1e-4)
        cache, start = got.cache, start + n


@pytest.mark.parametrize("name", CASES)
@pytest.mark.exhaustive
def test_padding_on_either_side_changes_nothing(name):
    indexer, arguments, _ = case(name)
    B, T = arguments["hidden"].shape[:2]
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

    def padded(x, value=np.nan):
        x = np.broadcast_to(x, (B, *x.shape[1:]))
        pads = ((0, 3), (3, 0))
        return np.stack([np.pad(x[b], (pads[b], *[(0, 0)] * (x.ndim - 2)), constant_values=value) for b in (0, 1)])

    arguments = {name: x for name, x in arguments.items() if x is not None and name != "positions"}
    arguments = {name: padded(np.asarray(x)) for name, x in arguments.items()}
    got = indexer(**in_jax(arguments | dict(positions=padded(positions, -1)))).selection.indices
    wanted = whole(name).selection.indices
    np.testing.assert_array_equal(got[0, :T], wanted[0])
    np.testing.assert_array_equal(got[1, 3:], wanted[1])
    assert (got[0, T:] == -1).all() and (got[1, :3] == -1).all()


def test_hisa_on_pools_with_all_blocks_kept_is_the_models_own_selection():
    indexer, arguments, _ = case("glm5_next")
    method = hj.Hisa(topk=2, block_size=2, block_topk=7, entry_size=4, tail="open")
    got = indexer(**in_jax(arguments), method=method).selection
    np.testing.assert_array_equal(got.indices, whole("glm5_next").selection.indices)
    with pytest.raises(ValueError, match=r"^Indexer: method is Dsa\(topk=2\), wanted entry_size, activation, per_head"):
        indexer(**in_jax(arguments), method=hj.Dsa(topk=2))


def test_what_does_not_fit_is_named():
    _, arguments, arrays = case("axk2")
    weights = {key.removeprefix("weights."): x for key, x in arrays.items() if key.startswith("weights.")}
    sizes = dict(topk=8, rope_dim=8)
    for model_type, changed, message in (
        ("llama", {}, "from_weights: model_type is 'llama', wanted one of deepseek_v32, "),
        ("axk2", {"wk.weight": None}, "from_weights: axk2: weights lack wk.weight"),
        ("axk2", {"bias": np.ones(3)}, "from_weights: axk2: weights have bias, which its indexer has not"),
        ("axk2", {"wk.weight": np.ones((3, 40))}, "from_weights: axk2: wk.weight is [3, 40], wanted [16, 40]"),
    ):
        given = {name: x for name, x in (weights | changed).items() if x is not None}
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            indexers.from_weights(model_type, sizes, given)
    for wrong, message in (
        (dict(rope_dim=8), "sizes lack topk or index_topk"),
        (dict(topk="8"), "topk is '8', wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            indexers.from_weights("axk2", wrong, weights)
    indexer = indexers.from_weights("axk2", sizes, weights)
    for name in ("q_resid", "cos"):
        with pytest.raises(ValueError, match=f"^Indexer: {name} is None, wanted"):
            indexer(**in_jax(arguments | {name: None}))


@pytest.mark.parametrize("model_type", ["qwen4_exp", "minimax_m3_vl"])
def test_the_config_of_a_stack_that_is_not_built_names_its_indexer(model_type):
    family = {"minimax_m3_vl": "minimax_m3"}.get(model_type, model_type)
    with pytest.raises(ValueError, match=rf"is '{model_type}'.*models\.indexers\.from_weights\('{family}', "):
        models.config_from_keys({"model_type": model_type, "hidden_size": 8})


def test_the_page_is_what_the_table_says():
    file = FOLDER.parent.parent / "docs" / "indexers.md"
    assert file.read_text() == page.page(), f"python -m hisa_jax.models.indexers.page > docs/{file.name}"
