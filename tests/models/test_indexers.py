"""The indexers of published models compute and select what public model code does, whole and through a cache."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.experimental import checkify

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models import indexers
from hisa_jax.models.indexers import module, page
from hisa_jax.models.indexers.table import ALIASES, FAMILIES
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
    return jax.jit(functools.partial(indexer, return_scores=True))(**in_jax(arguments))


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


@pytest.mark.parametrize("name", sorted(file.stem for file in (FOLDER / "family_other").glob("*.npz")))
@pytest.mark.exhaustive
def test_other_sizes_by_whole_configs_with_padded_rows(name):
    arrays = dict(np.load(FOLDER / "family_other" / f"{name}.npz"))
    weights = {key.removeprefix("weights."): x for key, x in arrays.items() if key.startswith("weights.")}
    indexer = indexers.from_weights(name, json.loads(str(arrays["config"])), weights)
    arguments = {key: arrays[key] for key in ("hidden", "q_resid", "cos", "sin", "positions")}
    got, is_real = indexer(**in_jax(arguments)), arrays["positions"] >= 0
    for ours, key in ((got.q, "q"), (got.w, "w")):
        if key in arrays:
            np.testing.assert_allclose(ours[is_real], arrays[key][is_real], atol=LIMIT, rtol=0)
    pooled = got.k.shape[1] < is_real.shape[1]
    for b, n in enumerate(is_real.sum(axis=1)) if "k" in arrays else ():
        whole, k = n // indexer.method.entry_size, arrays["k"][b]
        np.testing.assert_allclose(got.k[b, :whole], (k if pooled else k[is_real[b]])[:whole], atol=LIMIT, rtol=0)
    ours, wanted = got.selection.blocks if indexer.method.per_head else got.selection.indices, arrays["chosen"]
    ours = np.sort(np.where((ours < 0) | (ours == np.iinfo(np.int32).max), -1, ours), axis=-1)
    wanted, width = np.sort(wanted, axis=-1), min(ours.shape[-1], wanted.shape[-1])
    np.testing.assert_array_equal(ours[..., -width:], wanted[..., -width:])
    assert (ours[..., :-width] < 0).all() and (wanted[..., :-width] < 0).all()


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
    for tensor, dtype in ((np.ones((16, 40), np.int8), "int8"), ([[1.0]], "list")):
        with pytest.raises(TypeError, match=f"^from_weights: axk2: wk.weight is {dtype}, wanted floats of 16 bits"):
            indexers.from_weights("axk2", sizes, weights | {"wk.weight": tensor})
    indexer = indexers.from_weights("axk2", sizes, weights)
    for name in ("hidden", "q_resid", "cos", "positions"):
        with pytest.raises(TypeError, match=f"^Indexer: {name} is int8, wanted"):
            indexer(**in_jax(arguments | {name: np.asarray(arguments[name]).astype(np.int8)}))
    none = indexer(**in_jax({name: np.asarray(x)[:, :0] for name, x in arguments.items()}))
    assert none.q.shape == (2, 0, 12, 16) and none.selection.indices.shape == (2, 0, 8)
    for name in ("q_resid", "cos"):
        with pytest.raises(ValueError, match=f"^Indexer: {name} is None, wanted"):
            indexer(**in_jax(arguments | {name: None}))


def test_positions_that_leave_some_out_are_an_error_under_checked():
    check = hj.checked(module._check_positions)
    check("Indexer", jnp.array([[2, 1, 0, -1], [-1, 0, 1, 2]]), None)
    check("Indexer", jnp.array([[-1, 5, 6, -1], [-1, -1, -1, -1]]), jnp.array([5, 2]))
    for positions, lengths in (([[0, 1, 3]], None), ([[1, 2, 3]], None), ([[0, 0, 1]], None), ([[0, 1, 2]], [3])):
        with pytest.raises(checkify.JaxRuntimeError, match="Indexer: positions are .* wanted adjacent ones from"):
            check("Indexer", jnp.array(positions), None if lengths is None else jnp.array(lengths))


# What bears on an indexer in configs as published, beside names of its sizes that mean another thing there: the heads
# of the attention, blocks of weights. Wanted: head_dim, dims of RoPE, pairs, the method.
ATTENTION = dict(head_dim=64, block_size=128, rms_norm_eps=1e-5, index_n_heads=2, index_head_dim=16, index_topk=8)
CONFIGS = {
    "deepseek_v32": (ATTENTION | dict(qk_rope_head_dim=8), (16, 8, "halves", hj.Dsa(topk=8))),
    "glm_moe_dsa": (
        ATTENTION | dict(qk_rope_head_dim=8, indexer_rope_interleave=False),
        (16, 8, "halves", hj.Dsa(topk=8)),
    ),
    "mistral_large4": (dict(text_config=ATTENTION | dict(qk_rope_head_dim=8)), (16, 8, "parted", hj.Dsa(topk=8))),
    "glm5_next": (
        dict(text_config=ATTENTION | dict(head_dim=0, qk_rope_head_dim=0, index_kpool=4)),
        (16, 0, "halves", hj.Dsa(topk=2, entry_size=4, tail="open")),
    ),
    "deepseek_v4": (
        ATTENTION | dict(qk_rope_head_dim=8, compress_ratios=[0, 128, 4]),
        (16, 8, "neighbours", hj.Dsa(topk=8, entry_size=4, returns="entries")),
    ),
    "qwen4_exp": (
        dict(head_dim=32, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4)
        | dict(rope_parameters={"rope_theta": 1e7, "partial_rotary_factor": 0.25}),
        (16, 8, "halves", hj.Dsa(topk=2, entry_size=4, tail="open")),
    ),
    "minimax_m3_vl": (
        dict(text_config=dict(head_dim=32, partial_rotary_factor=0.5, sparse_attention_config=dict(
            sparse_index_dim=16, sparse_block_size=8, sparse_topk_blocks=2, sparse_local_block=0))),
        (16, 16, "halves", hj.BlockSparse(topk=16, block_size=8, keep_first=0, keep_last=0, scored_by="max",
                                          activation=None, per_head=True)),
    ),
}  # fmt: skip


def published(model_type, H=2, D=16, E=12, Q=10, r=4):
    """Tensors of ones by the names that checkpoints have them under."""
    name = ALIASES.get(model_type, model_type)
    wide = 2 * D if name == "deepseek_v4" else D
    shapes = {
        "wq": (H * D, E if name in ("minimax_m3", "mistral_large4") else Q), "wqk": ((H + 1) * D, E), "wk": (wide, E),
        "k_norm": (D,), "k_norm_bias": (D,), "w": (H, E), "q_norm": (D,), "q_input_norm": (E,),
        "q_input_norm_bias": (E,), "q_scale": (H,), "q_bias": (H,), "ape": (r, wide), "gate": (wide, E),
    }  # fmt: skip
    last = {ours: theirs[-1] for ours, theirs in FAMILIES[name].tensors.items()}
    before = "model.layers.7.self_attn." + ("" if name == "minimax_m3" else "indexer.")
    return {before + theirs: np.ones(shapes[ours], np.float32) for ours, theirs in last.items()}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_published_config_and_published_names_are_what_it_is_made_of(model_type):
    sizes, wanted = CONFIGS[model_type]
    indexer = indexers.from_weights(model_type, sizes, published(model_type))
    assert (indexer.head_dim, indexer.rope_dim, indexer.family.pairs, indexer.method) == wanted


def test_sizes_and_tables_that_do_not_fit_are_named():
    weights, sizes = published("qwen4_exp"), CONFIGS["qwen4_exp"][0]
    for wrong, message in (
        (dict(indexer_budget=8.5), "indexer_budget is 8.5, wanted an int from 1"),
        (dict(indexer_budget=True), "indexer_budget is True, wanted an int from 1"),
        (dict(rms_norm_eps=2), "rms_norm_eps is 2, wanted a number between 0 and 1"),
        (dict(rope_dim=18), "RoPE of 18 dims, wanted an even number up to head_dim = 16"),
        (dict(rope_dim=7), "RoPE of 7 dims, wanted an even number"),
    ):
        with pytest.raises(ValueError, match=f"^from_weights: qwen4_exp: {re.escape(message)}"):
            indexers.from_weights("qwen4_exp", sizes | wrong, weights)
    of_two_layers = weights | {name.replace("7", "8"): x for name, x in weights.items()}
    with pytest.raises(ValueError, match="^from_weights: qwen4_exp: weights have a name twice"):
        indexers.from_weights("qwen4_exp", sizes, of_two_layers)
    del (unsaid := dict(sizes))["rope_parameters"]
    for given, width, cache, message in (
        (sizes, 6, False, r"cos is \[1, 3, 6\], wanted \[1 or 2, 3, 4 or 8\]"),
        (unsaid, 18, False, r"cos is \[1, 3, 18\], wanted \[1 or 2, 3, an even number up to 16\]"),
        (unsaid, 8, True, "cos turns 8 dims, wanted 16 as the cache has"),
    ):
        indexer = indexers.from_weights("qwen4_exp", given, weights)
        held = indexer.init_cache(2, 8) if cache else None
        table = jnp.ones((1, 3, width))
        with pytest.raises(ValueError, match=f"^Indexer: {message}"):
            indexer(jnp.ones((2, 3, 12)), cos=table, sin=table, cache=held)
    v4 = {name: value for name, value in CONFIGS["deepseek_v4"][0].items() if name != "qk_rope_head_dim"}
    with pytest.raises(ValueError, match="^from_weights: deepseek_v4: sizes lack rope_dim or qk_rope_head_dim"):
        indexers.from_weights("deepseek_v4", v4, published("deepseek_v4"))


@pytest.mark.parametrize("model_type", ["qwen4_exp", "minimax_m3_vl"])
def test_the_config_of_a_stack_that_is_not_built_names_its_indexer(model_type):
    family = {"minimax_m3_vl": "minimax_m3"}.get(model_type, model_type)
    with pytest.raises(ValueError, match=rf"is '{model_type}'.*models\.indexers\.from_weights\('{family}', "):
        models.config_from_keys({"model_type": model_type, "hidden_size": 8})


def test_the_page_is_what_the_table_says():
    file = FOLDER.parent.parent / "docs" / "indexers.md"
    assert file.read_text() == page.page(), f"python -m hisa_jax.models.indexers.page > docs/{file.name}"
