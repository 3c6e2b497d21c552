"""What the parts of the quality report say of cases whose answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench.quality import agreement, answers, model
from bench.quality.tables import averaged, excess, worst
from bench.quality.variants import FLAT, HISA, Variant, ablations, main_variants, scans
from hisa_jax.models.evaluate import statistics
from hisa_jax.models.training import forward as training
from hisa_jax.models.training.batches import held_out_samples
from hisa_jax.models.training.weights import Skeleton
from tests.models.training import tiny

pytestmark = pytest.mark.slow

TOPK = tiny.CONFIG.index_topk
FLAT_VARIANT = Variant(name=FLAT, method=hj.Dsa(topk=TOPK))
HISA_VARIANT = Variant(name=HISA, method=tiny.HISA)


@pytest.fixture(scope="module")
def stacked():
    skeleton = Skeleton(tiny.CONFIG, dtype="float32")
    return skeleton.stacked(skeleton.initial(0))


def sequences(length):
    return np.random.default_rng(0).integers(256, size=(2, length)).astype(np.uint8)


@pytest.mark.parametrize(
    "right, n, low, high", [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)]
)
def test_wilson_intervals_are_the_published_ones(right, n, low, high):
    np.testing.assert_allclose(statistics.wilson(right, n), (low, high), atol=5e-5)


def test_an_impossible_share_is_refused():
    with pytest.raises(ValueError, match="wilson: 3 of 2"):
        statistics.wilson(3, 2)


def test_a_mean_has_the_normal_interval_and_none_of_one_value():
    # Standard deviation 1, so a standard error of 1 / sqrt(3).
    np.testing.assert_allclose(statistics.mean([1.0, 2.0, 3.0]), (2, 2 - 1.1316, 2 + 1.1316), atol=5e-5)
    assert np.isnan(statistics.mean([1.0])[1:]).all()
    assert np.isnan(statistics.mean([])).all()


@pytest.mark.gate(HISA)
@pytest.mark.parametrize("variant", [FLAT_VARIANT, HISA_VARIANT], ids=[FLAT, HISA])
def test_logits_are_those_of_the_forward_pass_that_trains(stacked, variant):
    def attend(attention, x, table, made):
        return training.sparse(attention, x, table, made, method=variant.method)

    tokens = sequences(128)
    wanted, _ = training.forward(stacked, jnp.asarray(tokens, jnp.int32), attend)
    np.testing.assert_allclose(model.logits_of(stacked, tokens, variant), wanted, atol=1e-4)


def test_a_variant_that_selects_all_attends_densely(stacked):
    """A second; the selection of all tokens, which it does without, gives the same."""
    tokens, all_ = sequences(24), Variant(name="all", method=hj.Dsa(topk=24))
    assert all_.takes_all(24) and not all_.takes_all(25) and not HISA_VARIANT.takes_all(8)
    wanted, _ = training.forward(stacked, jnp.asarray(tokens, jnp.int32), training.dense)
    np.testing.assert_allclose(model.logits_of(stacked, tokens, all_), wanted, atol=1e-4)


@pytest.mark.exhaustive
def test_queries_in_chunks_select_and_attend_as_in_one(stacked, monkeypatch):
    variant = dataclasses.replace(HISA_VARIANT, flat_last=40)
    tokens = sequences(112)
    whole = np.asarray(model.logits_of(stacked, tokens, variant))
    selected = [np.asarray(seen.indices) for seen in model.layers_of(stacked, tokens, variant)]
    monkeypatch.setattr(model, "_LONG", 1)
    monkeypatch.setattr(model, "_CHUNKS", 2)
    monkeypatch.setattr(model, "_TILE", 20)
    jax.clear_caches()
    np.testing.assert_allclose(model.logits_of(stacked, tokens, variant), whole, atol=1e-4)
    for seen, wanted in zip(model.layers_of(stacked, tokens, variant), selected, strict=True):
        np.testing.assert_array_equal(seen.indices, wanted)
    jax.clear_caches()


def test_layers_and_queries_that_stay_flat_select_what_the_flat_indexer_does(stacked):
    tokens = sequences(128)
    first_flat, hisa = (
        next(iter(model.layers_of(stacked, tokens, variant))).indices
        for variant in (dataclasses.replace(HISA_VARIANT, flat_layers=(0,)), HISA_VARIANT)
    )
    flat = next(iter(model.layers_of(stacked, tokens, FLAT_VARIANT))).indices
    last_flat = dataclasses.replace(HISA_VARIANT, flat_last=16)
    tail = next(iter(model.layers_of(stacked, tokens, last_flat))).indices
    assert (np.asarray(hisa) != np.asarray(flat)).any()
    np.testing.assert_array_equal(first_flat, flat)
    np.testing.assert_array_equal(tail[:, -16:], flat[:, -16:])
    np.testing.assert_array_equal(tail[:, :-16], hisa[:, :-16])


@pytest.mark.exhaustive
def test_a_method_that_selects_everything_has_recall_1_and_keeps_every_needle(stacked):
    samples = held_out_samples(tiny.corpus(), "multikey", 256, 2, seed=0, n_keys=2, n_questions=2)
    everything = Variant(name="everything", method=hj.Dsa(topk=256))
    whole = Variant(name="all blocks", method=hj.Hisa(topk=TOPK, block_size=8, block_topk=32))
    rows = agreement.agreement_rows(
        stacked, samples, FLAT_VARIANT, [FLAT_VARIANT, everything, whole, HISA_VARIANT], 16, TOPK
    )

    def value(name, measure, queries="retrieval"):
        return averaged(rows, method=name, measure=measure, queries=queries)

    for queries in ("text", "retrieval"):
        assert value("everything", "recall", queries) == 1
        assert value("everything", "mass", queries) == pytest.approx(1)
        assert value("all blocks", "recall", queries) == value("all blocks", "iou", queries) == 1
        assert 0 < value(HISA, "recall", queries) < 1
    assert value("everything", "needle_bytes") == 1
    assert value(FLAT, "needle_bytes") < 1
    # All of the t tokens before are among the t + 1 of the next query; all layers see the same.
    assert 0.9 < value("everything", "next_query_iou", "text") < 1
    assert value("everything", "last_layer_iou", "text") == 1
    assert value("everything", "iou", "text") < 0.5
    assert not [row for row in rows if row["method"] == FLAT and row["measure"] == "recall"]  # 1 by itself
    # 7 bytes of an answer, 2 questions, 2 samples.
    assert {row["n"] for row in rows if row["queries"] == "retrieval"} == {28}


def knowing(wrong):
    """In place of `logits_of`: knows the next byte, but for what `wrong` changes, [B, T] uint8 -> the same."""

    def logits_of(stacked, tokens, variant):
        following = wrong(np.roll(tokens, -1, axis=1))
        return 20 * jax.nn.one_hot(jnp.asarray(following, jnp.int32), 256)

    return logits_of


def test_needles_are_counted_at_their_depth(monkeypatch):
    """Whoever answers only what stands in the first half gets the first half right."""
    length = 512

    def wrong(following):
        for row in following:
            text = row.tobytes()
            key = text[text.index(b"<<ask ") + 6 : text.rindex(b" = ")]
            if text.index(b"<<key " + key) > length // 2:
                row[text.rindex(b">>") - 1] = ord("x")
        return following

    monkeypatch.setattr(answers, "logits_of", knowing(wrong))
    rows = answers.needle_rows(None, tiny.corpus(), FLAT_VARIANT, length, (0.0, 0.2, 0.8), 3)
    assert [(row["depth"], row["right"], row["n"]) for row in rows] == [(0.0, 3, 3), (0.2, 3, 3), (0.8, 0, 3)]
    assert rows[0]["accuracy"] == 1 and rows[2]["accuracy"] == 0
    np.testing.assert_allclose((rows[0]["low"], rows[0]["high"]), statistics.wilson(3, 3))


def test_every_question_counts_and_numbers_of_keys_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(answers, "logits_of", knowing(lambda following: following))
    rows = answers.multikey_rows(None, tiny.corpus(), FLAT_VARIANT, 1024, 3, (4, 8, 16))
    assert [(row["n_keys"], row["right"], row["n"]) for row in rows] == [(4, 12, 12), (8, 24, 24)]
    rows = answers.task_rows(None, tiny.corpus(), FLAT_VARIANT, 1024, 2)
    found = {row["task"]: (row["right"], row["n"]) for row in rows}
    assert found == {"recall": (16, 16), "multivalue": (2, 2), "copy": (2, 2), "variables": (2, 2)}


def test_a_model_that_knows_nothing_needs_8_bits_a_byte_at_all_positions(monkeypatch):
    monkeypatch.setattr(answers, "logits_of", lambda _, tokens, __: jnp.zeros((*tokens.shape, 256)))
    rows = answers.bits_rows(None, tiny.corpus(), FLAT_VARIANT, 600, 2)
    assert [(row["first"], row["end"]) for row in rows] == [(0, 256), (256, 512), (512, 600), (0, 600)]
    for row in rows:
        np.testing.assert_allclose([row["bits"], *row["by_window"]], 8, atol=1e-5)


def test_extra_bits_are_paired_by_window():
    def row(method, by_window):
        return {"part": "bits", "method": method, "by_window": by_window}

    middle, low, high = excess([row(FLAT, [1.0, 3.0]), row(HISA, [1.1, 3.1])], HISA)
    np.testing.assert_allclose((middle, low, high), 0.1)


def test_the_threshold_is_held_against_the_worst_context():
    def row(context, right):
        return {"part": "needle", "method": FLAT, "context": context, "right": right, "n": 10}

    context, share = worst([row(1024, 10), row(2048, 7), row(4096, 9)], "needle")
    assert (context, share["accuracy"]) == (2048, 0.7)


def test_the_variants_select_the_same_number_of_tokens_and_ablations_change_one_thing():
    assert {variant.method.topk for variant in (*main_variants(256, 32, 32), *scans(256))} == {256}
    of_scans = [(variant.method.candidates, variant.method.exact_heads, variant.method.unit) for variant in scans(256)]
    assert of_scans[0] == (1024, 4, 1) and set(of_scans) == {
        (384, 4, 1), (512, 4, 1), (768, 4, 1), (1024, 4, 1), (1024, 0, 1), (512, 0, 1), (1024, 4, 8), (1024, 4, 32),
    }  # fmt: skip
    shapes = {
        (variant.method.block_size, variant.method.block_topk)
        for variant in ablations(256, 32, 32)
        if variant.name == HISA or variant.name.startswith("B=")
    }
    assert shapes == {(16, 64), (32, 32), (64, 16), (128, 8), (32, 16), (32, 64), (32, 128)}
