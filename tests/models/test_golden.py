"""Our models against the numbers of the public model code, piece by piece: the first wrong piece is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax import models
from hisa_jax.models.cache import contiguous
from hisa_jax.models.rope import inverse_frequencies

from . import golden

of_check, *others = golden.CASES
cases = pytest.mark.parametrize("case", [pytest.param(of_check, marks=pytest.mark.check), *others])


@cases
def test_both_styles_of_config_say_the_same(case):
    transformers = models.read_config(golden.FOLDER / case)
    published = models.config_from_keys(json.loads((golden.FOLDER / case / "config_published.json").read_text()))
    assert published.num_nextn_predict_layers == 0 and transformers.num_nextn_predict_layers is None
    assert vars(published) | {"num_nextn_predict_layers": None} == vars(transformers)


@cases
def test_rope_frequencies_and_softmax_scale(case):
    config, numbers = golden.model(case).config, golden.numbers(case)
    np.testing.assert_allclose(inverse_frequencies(config), numbers["rope.inv_freq"], rtol=1e-6)
    assert (config.yarn.rope_scale if config.yarn else 1.0) == pytest.approx(numbers["rope.attention_scaling"])
    assert config.softmax_scale == pytest.approx(float(numbers["mla.softmax_scale"]), rel=1e-6)


@cases
def test_every_layer_selects_the_tokens_of_the_public_code(case):
    numbers, inputs = golden.numbers(case), golden.index_inputs(case)
    for i, layer in enumerate(golden.output(case).layers):
        if not golden.selects(case, i):
            assert layer.index_inputs is None and layer.selection is golden.output(case).layers[i - 1].selection
            continue
        q, k, w = layer.index_inputs
        q, k = (golden.deinterleaved(x, golden.model(case).config) for x in (q, k))
        golden.assert_close(q, inputs[f"L{i}.q"], golden.HIDDEN, f"index queries of layer {i}")
        golden.assert_close(k, inputs[f"L{i}.k"], golden.HIDDEN, f"index keys of layer {i}")
        # Ours carry D^-1/2, too.
        golden.assert_close(w * q.shape[-1] ** 0.5, inputs[f"L{i}.w"], golden.HIDDEN, f"head weights of layer {i}")
        want = numbers[f"L{i}.index_scores"]
        got = np.where(np.isfinite(want), golden.token_scores(layer.index_inputs), 0)
        golden.assert_close(got, np.where(np.isfinite(want), want, 0), golden.SCORES, f"index scores of layer {i}")
        selected = golden.as_mask(layer.selection, want.shape[-1])
        np.testing.assert_array_equal(selected, numbers[f"L{i}.index_selected"], f"selection of layer {i}")


@cases
def test_every_layer_gives_the_hidden_states_of_the_public_code(case):
    numbers = golden.numbers(case)
    for i, layer in enumerate(golden.output(case).layers):
        golden.assert_close(layer.attention, numbers[f"L{i}.attn_out"], golden.HIDDEN, f"attention of layer {i}")
        if layer.experts is not None:
            combine = np.zeros_like(numbers[f"L{i}.router_combine"])
            experts, weights = (np.asarray(x).reshape(len(combine), -1) for x in (layer.experts, layer.expert_weights))
            np.put_along_axis(combine, experts, weights, axis=-1)
            golden.assert_close(combine, numbers[f"L{i}.router_combine"], golden.HIDDEN, f"expert weights of layer {i}")
        golden.assert_close(layer.mlp, numbers[f"L{i}.mlp_out"], golden.HIDDEN, f"MLP of layer {i}")
        golden.assert_close(layer.hidden, numbers[f"L{i}.hidden"], golden.HIDDEN, f"output of layer {i}")


@cases
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_both_forms_of_attention_give_the_logits_of_the_public_code(case, form):
    golden.assert_close(golden.output(case, form).logits, golden.numbers(case)["logits"], golden.LOGITS)


@pytest.mark.oldest("dsv32")
@cases
def test_calling_the_model_gives_the_logits_of_the_public_code(case):
    golden.assert_close(golden.model(case)(golden.ids(case)), golden.numbers(case)["logits"], golden.LOGITS)


@pytest.mark.parametrize("case", golden.VARIANTS)
def test_other_settings_give_the_logits_of_the_public_code(case):
    numbers = golden.numbers(case)
    golden.assert_close(golden.run(golden.model(case), golden.ids(case)).logits, numbers["logits"], golden.LOGITS)


@pytest.mark.parametrize(  # the other settings have the test before
    "case", [*golden.CASES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in golden.VARIANTS)]
)
def test_a_left_padded_batch_gives_the_logits_of_the_public_code(case):
    numbers = golden.numbers(case)
    tokens = jnp.asarray(numbers.get("padded.input_ids", numbers["input_ids"]))
    mask = jnp.asarray(numbers["padded.attention_mask"])
    is_real = numbers["padded.attention_mask"].astype(bool)
    positions = jnp.asarray(numbers["padded.position_ids"])
    marked = jnp.where(mask == 1, positions, -1)
    for given in ({"positions": positions, "mask": mask}, {"mask": mask}, {"positions": marked}):
        logits = np.asarray(golden.model(case)(tokens, **given))
        golden.assert_close(logits[is_real], numbers["padded.logits"][is_real], golden.LOGITS, str(list(given)))


@cases
@pytest.mark.gate("glm52")  # whose layers share selections; the first is in `make check`
def test_caches_and_decoding_give_the_numbers_of_the_public_code(case):
    model, numbers, tokens = golden.model(case), golden.numbers(case), golden.ids(case)
    (B, S), length = tokens.shape, int(numbers["prefill.length"])
    config = model.config
    out = golden.run(model, tokens[:, :length], model.empty_cache(B, S))
    for i, layer in enumerate(out.cache.layers):
        kv = contiguous(layer.latents, out.cache.block_tables, out.cache.lengths)[:, :length]
        latent, rope_key = kv[..., : config.kv_lora_rank], kv[..., config.kv_lora_rank :]
        golden.assert_close(latent, numbers[f"prefill.L{i}.cache_latent"], golden.HIDDEN, f"latents of layer {i}")
        # The public code stores even dims before odd ones.
        rope_key = np.concatenate([rope_key[..., 0::2], rope_key[..., 1::2]], axis=-1)
        golden.assert_close(rope_key, numbers[f"prefill.L{i}.cache_krope"], golden.HIDDEN, f"rope keys of layer {i}")
        assert (layer.keys.shape[2] > 0) == golden.selects(case, i)
        if golden.selects(case, i):
            want = numbers[f"prefill.L{i}.cache_index_k"]
            keys = golden.deinterleaved(
                contiguous(layer.keys, out.cache.block_tables, out.cache.lengths)[:, :length], config
            )
            golden.assert_close(keys, want, golden.HIDDEN, f"index keys of layer {i}")
    for t in range(length, S):
        out = golden.run(model, tokens[:, t : t + 1], out.cache, phase="decode")
        golden.assert_close(out.logits[:, 0], numbers["decode.logits"][:, t - length], golden.LOGITS, f"token {t}")
    np.testing.assert_array_equal(out.cache.lengths, [S] * B)


@pytest.mark.slow
@cases
@pytest.mark.gate("glm5")
def test_greedy_continuation_in_chunks_is_that_of_the_public_code(case):
    numbers = golden.numbers(case)
    want, length = numbers["greedy.ids"][0].tolist(), int(numbers["greedy.prompt_length"])
    # Five tokens a chunk: the first chunk holds padding alone in its first columns.
    result = models.generate(golden.model(case), [want[:length]], len(want) - length, chunk=5)
    assert result.tokens == [want[length:]]
