"""Caches and positions: a sequence gives the same whichever way it comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.cache import packing, page_size_of, sketch_of
from hisa_jax.models.dsa import absorb, absorbed_beside, absorbed_in_place, choose_form

from . import golden

HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)


def test_real_tokens_are_packed_in_front_and_come_back_to_their_places():
    rows = packing(jnp.array([[-1, 0, 1], [-1, -1, -1], [5, -1, 6]]))
    x = jnp.arange(9).reshape(3, 3)
    assert rows.pack(x).tolist() == [1, 2, 6, 8, 0, 3, 4, 5, 7] and rows.cu_seqlens.tolist() == [0, 2, 2, 4]
    np.testing.assert_array_equal(rows.unpack(rows.pack(x)), x)


def test_pages_are_parts_of_every_block_and_whatever_size_for_the_others():
    flat, scan = hj.Dsa(), hj.Scan(unit=2)
    assert page_size_of([flat, scan]) == 64
    assert page_size_of([flat, scan, hj.Hisa(), hj.Hisa(block_size=48)]) == 16
    assert page_size_of([flat, scan, hj.Hisa()], 128) == 128
    assert page_size_of([flat, hj.BlockSparse(topk=64, block_size=8, scored_by="max")]) == 64


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (96, "Model: page_size=96, wanted a power of two up to 256"),
        (0, "Model: page_size=0, wanted an int of at least 1"),
        (8, r"Model: page_size=8 with Hisa\(.*\), wanted a divisor of its block_size"),
    ],
)
def test_pages_of_other_sizes_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        golden.model("glm5").with_method(HISA).with_page_size(size)


def test_a_model_with_other_pages_shares_its_weights_and_keeps_them_with_another_method():
    model = golden.model("glm5").with_method(HISA)
    other = model.with_page_size(2)
    assert (model.page_size, other.page_size, other.with_method(hj.Dsa(topk=8)).page_size) == (4, 2, 2)
    assert other.embed[...] is model.embed[...]
    assert jax.eval_shape(lambda: other.empty_cache(1, 8)).layers[0].keys.shape[:2] == (4, 2)


def test_layers_keep_what_the_methods_of_some_phase_scan():
    """Those that have index keys; the others share a selection."""
    flat, scan, sketched = hj.Dsa(), hj.Scan(), hj.Scan(sketch="int4")
    assert sketch_of([flat, scan]) is None and sketch_of([flat, scan, sketched]) == "int4"
    model = golden.model("glm52").with_method(lambda layer, phase: sketched if layer and phase == "decode" else flat)
    cache = jax.eval_shape(lambda: model.empty_cache(1, 8))
    kinds = model.config.indexer_kinds
    assert {"full", "shared"} == set(kinds[1:])
    wanted = [i > 0 and kind == "full" for i, kind in enumerate(kinds)]
    assert [layer.codes is not None for layer in cache.layers] == wanted
    plain = jax.eval_shape(lambda: model.with_method(scan).empty_pages(2))
    assert all(layer.codes is None and layer.code_scales is None for layer in plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["glm5", pytest.param("glm52", marks=pytest.mark.exhaustive)])
def test_padding_anywhere_changes_neither_selection_nor_logits(case):
    """With blocks, whose borders a shifted count of tokens would move.

    Without padding there are ten tokens more, which nothing before them sees: the same shapes, so the same programs.
    """
    model, n = golden.model(case).with_method(HISA), 30
    tokens = golden.ids(case)
    alone = model.run(tokens, trace=True)
    columns = {
        "left": np.arange(10, 40),
        "right": np.arange(30),
        "holes": np.delete(np.arange(40), np.arange(1, 31, 3)),
    }
    for name, where in columns.items():
        padded, mask = np.zeros((2, 40), np.int32), np.zeros((2, 40), bool)
        padded[:, where], mask[:, where] = tokens[:, :n], True
        out = jax.tree.map(np.asarray, model.run(jnp.asarray(padded), mask=jnp.asarray(mask), trace=True))
        golden.assert_close(out.logits[:, where], alone.logits[:, :n], golden.LOGITS, name)
        for got, want in zip(out.layers, alone.layers, strict=True):
            wanted = np.asarray(want.selection.indices)[:, :n]
            np.testing.assert_array_equal(got.selection.indices[:, where], wanted, name)
        padding = np.setdiff1d(np.arange(40), where)
        assert (out.layers[0].selection.count[:, padding] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.gate("absorbed")
def test_chunks_give_what_the_whole_gives(form):
    model, tokens = golden.some_layers("glm5", (0, 2)).with_method(HISA), golden.ids("glm5")
    whole = model.run(tokens)
    cache, logits = model.empty_cache(2, 48), []
    run = jax.jit(lambda model, tokens, cache: model.run(tokens, cache=cache, form=form))
    for first in range(0, 40, 10):
        out = run(model, tokens[:, first : first + 10], cache)
        cache, logits = out.cache, [*logits, out.logits]
    golden.assert_close(jnp.concatenate(logits, axis=1), whole.logits, golden.LOGITS)
    assert cache.lengths.tolist() == [40, 40] and cache.capacity == 48


@pytest.mark.slow
def test_positions_are_for_rope_alone():
    """RoPE is relative: tokens that all stand further on give the same."""
    model, tokens = golden.model("glm5"), golden.ids("glm5")
    positions = jnp.broadcast_to(jnp.arange(40), (2, 40)) + 100
    golden.assert_close(model(tokens, positions), model(tokens), golden.LOGITS)


@pytest.mark.slow
def test_a_row_of_padding_gives_finite_logits():
    model, tokens = golden.model("dsv32"), golden.ids("dsv32")
    mask = jnp.zeros((2, 40), bool).at[0].set(True)
    for form in ("expanded", "absorbed"):
        assert np.isfinite(np.asarray(model.run(tokens, mask=mask, form=form).logits)).all()


def test_the_form_of_attention_goes_by_the_work():
    config = golden.model("dsv32").config
    assert choose_form(config, 1, 40, 8) == "absorbed"
    assert choose_form(config, 40, 8, 8) == "expanded"
    assert choose_form(models.dsv32(), 2048, 6000, 2048) == "expanded"
    assert choose_form(models.dsv32(), 2048, 8192, 2048) == "absorbed"
    assert choose_form(models.dsv32(), 1, 2048, 2048) == "absorbed"


def test_queries_for_latents_are_the_same_in_place_as_beside():
    draw = np.random.default_rng(0).normal
    operands = [jnp.asarray(draw(size=n), jnp.bfloat16) for n in ((1, 600, 4, 16), (1, 600, 4, 8), (32, 4, 16))]
    beside, in_place = jax.jit(absorbed_beside)(*operands), jax.jit(absorbed_in_place)(*operands)
    assert beside.shape == in_place.shape == (1, 600, 4, 40)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (beside, in_place)))
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (beside, jax.jit(absorb)(*operands))))


def test_the_model_is_a_pytree_under_jit():
    model, tokens = golden.model("glm5"), golden.ids("glm5")
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    golden.assert_close(logits, golden.numbers("glm5")["logits"], golden.LOGITS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": jnp.zeros(3, jnp.int32)}, ValueError, r"input_ids is \[3\], wanted \[B, T\]"),
        ({"input_ids": jnp.zeros((1, 3))}, TypeError, "input_ids is float32, wanted int32"),
        ({"positions": jnp.zeros((1, 3))}, TypeError, "positions is float32, wanted int32"),
        ({"positions": jnp.zeros((1, 2), jnp.int32)}, ValueError, r"positions is \[1, 2\], wanted that of input_ids"),
        ({"mask": jnp.zeros((3, 1), bool)}, ValueError, r"mask is \[3, 1\], wanted that of input_ids, \[1, 3\]"),
        ({"phase": "train"}, ValueError, "phase is 'train', wanted 'prefill'"),
        ({"form": "dense"}, ValueError, "form is 'dense', wanted 'auto'"),
    ],
)
def test_bad_inputs_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        golden.model("dsv32").run(**{"input_ids": jnp.zeros((1, 3), jnp.int32)} | arguments)


def test_a_cache_of_another_batch_is_refused():
    model = golden.model("dsv32")
    with pytest.raises(ValueError, match="cache has 2 rows, wanted input_ids' 1"):
        model.run(jnp.zeros((1, 3), jnp.int32), cache=model.empty_cache(2, 3))
