"""Options of indexers together, and indexers over pools trained beside a model. 4 s in the gate."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench.__main__ import main
from bench.indexers import command, measure, saved, training
from bench.indexers.model import SIZES, Runner, random_pools
from bench.indexers.rules import Asked, Rule, choose, composed, cost, routed
from bench.indexers.tables import tables
from bench.quality.model import logits_of
from bench.quality.variants import Variant
from hisa_jax.models.training import text
from hisa_jax.models.training.batches import held_out_samples
from hisa_jax.models.training.weights import Skeleton
from tests.models.training import tiny

S, H, D, TOPK = 256, 4, 16, 16
RULES = composed(TOPK, 8, 8, H, router_block=16)


@pytest.fixture(scope="module")
def stacked():
    skeleton = Skeleton(tiny.CONFIG, dtype="float32")
    return skeleton.stacked(skeleton.initial(0))


def asked(positions, seed=0):
    """What queries at some positions choose by, and keys."""
    keys, n = jax.random.split(jax.random.key(seed), 3), len(positions)
    q, w = jax.random.normal(keys[0], (1, n, H, D)), jax.random.normal(keys[1], (1, n, H))
    return Asked(q, w, jnp.asarray(positions, jnp.int32)[None]), jax.random.normal(keys[2], (1, S, D))


def choices(rule, here, k):
    """What two layers choose by a rule, of which the second may depend on the first; with other queries in each."""
    before = None
    for layer, of_layer in enumerate((here, here._replace(q=-here.q))):
        before = choose(rule, rule.role(layer), of_layer, k, before)
        yield np.asarray(before.indices[0])


def test_the_flat_rule_costs_all_products_and_a_shared_one_its_share():
    by_name = {rule.name: cost(rule, 16384, H) for rule in RULES}
    assert by_name["flat"] == 1
    assert by_name["flat, shared by 2 layers"] == 0.5
    assert by_name["flat, a quarter of the heads"] == 0.25 + 1 / 16
    assert by_name["flat, shared by 4 queries"] == 0.25 + (2 * TOPK + 4) / 16384
    assert by_name["flat, a list for 4 layers"] == 0.25 + 0.75 * 4 * TOPK / 16384
    assert all(by_name[rule.name] <= 1 for rule in RULES[1:])


def test_heads_are_those_of_greatest_score_over_whole_blocks_before_a_query():
    here, k = asked(range(100, 108))
    got = routed(here, k, 2, 16)
    q, w, means = (np.asarray(x) for x in (here.q[0], here.w[0], k[0].reshape(-1, 16, D).mean(1)))
    for t, position in enumerate(range(100, 108)):
        products = np.maximum(means[: (position + 1) // 16] @ q[t].T, 0)
        best = np.sort(np.argsort(-np.abs(w[t]) * products.sum(0))[:2])
        np.testing.assert_array_equal(got.q[0, t], q[t, best])
        np.testing.assert_array_equal(got.w[0, t], w[t, best])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.gate("HISA, shared by 4 queries", "scan, a list for 4 layers")
def test_rules_choose_what_is_visible_and_all_of_it_where_it_is_few(rule):
    few, many = range(8, 16), range(200, 208)
    for positions in (few, many):
        here, k = asked(positions)
        for indices in choices(rule, here, k):
            for row, position in zip(indices, positions, strict=True):
                real = row[row >= 0]
                assert (np.diff(real) > 0).all()
                assert real[-1] <= position
                assert len(real) == min(position + 1, TOPK)


@pytest.mark.exhaustive
def test_layers_take_over_or_choose_in_the_list_of_the_first():
    here, k = asked(range(200, 208))
    rules = {rule.name: rule for rule in RULES}
    first, second = choices(rules["flat, shared by 2 layers"], here, k)
    np.testing.assert_array_equal(first, second)
    listed = choose(rules["HISA, a list for 4 layers"], "publish", here, k, None)
    (_, second) = choices(rules["HISA, a list for 4 layers"], here, k)
    for row, blocks in zip(second, np.asarray(listed.blocks[0]), strict=True):
        assert np.isin(row[row >= 0] // 8, blocks).all()


@pytest.mark.exhaustive
def test_saved_layers_choose_by_rules_as_the_model_does(tmp_path, capsys):
    """Of a layer whose source is in no file nothing is said; neighbours share candidates if they are neighbours."""
    layers = {at: asked(range(200, 208), seed=at) for at in (0, 1, 2, 5)}
    for file, some in {"a": (0, 1), "b": (2, 5)}.items():
        q, w, k = (np.concatenate([x[at] for at in some]) for x in (
            {at: here.q for at, (here, _) in layers.items()}, {at: here.w for at, (here, _) in layers.items()},
            {at: k for at, (_, k) in layers.items()},
        ))  # fmt: skip
        np.savez(tmp_path / f"{file}.npz", layers=some, positions=np.arange(200, 208), q=q, w=w, k=k)
    files = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    assert main(["indexers", "--saved", *files, "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "indexers.json").read_text())["rows"]}
    assert rows["flat"]["recall"] == rows["flat"]["worst"] == 1
    assert len(rows) == 16
    assert rows["flat, a list for 4 layers"]["layers"] == rows["HISA, shared by 2 layers"]["layers"] == 3
    rule = Rule(name="", method=hj.Dsa(topk=S // 64), layers=2)
    first, second = (choose(rule, "choose", *layers[at], None).indices for at in (0, 1))
    taken = float(np.mean(np.asarray(hj.compare(measure.selection_of(first), measure.selection_of(second)).recall)))
    assert rows["flat, shared by 2 layers"]["worst"] == pytest.approx(taken)
    assert main(["indexers", "--saved", files[0], files[0], "--out", str(tmp_path)]) == 2
    assert "layers [0, 1] came before" in capsys.readouterr().err


@pytest.mark.exhaustive  # two seconds
def test_a_rule_of_which_no_layer_has_its_source_is_left_out():
    flat = Rule(name="flat", method=hj.Dsa(topk=4))
    layers = {5: saved.Layer(*asked(range(200, 208)), None)}
    rows = saved.rows(layers, [flat, dataclasses.replace(flat, name="shared", layers=2)])
    assert [row["method"] for row in rows] == ["flat"]


@pytest.mark.exhaustive
def test_a_group_of_like_queries_chooses_what_each_of_them_would():
    here, k = asked(range(200, 204))
    alike = here._replace(q=jnp.repeat(here.q[:, :1], 4, axis=1), w=jnp.repeat(here.w[:, :1], 4, axis=1))
    rule = Rule(name="", method=hj.Dsa(topk=TOPK), group=4)
    got = choose(rule, "choose", alike, k, None).indices
    np.testing.assert_array_equal(got, choose(dataclasses.replace(rule, group=1), "choose", alike, k, None).indices)


@pytest.mark.exhaustive
def test_a_model_by_the_flat_rule_is_the_model(stacked):
    tokens = np.random.default_rng(0).integers(256, size=(1, 96)).astype(np.uint8)
    method = hj.Dsa(topk=tiny.CONFIG.index_topk)
    wanted = logits_of(stacked, tokens, Variant(name="", method=method))
    np.testing.assert_allclose(Runner(stacked).logits(tokens, Rule(name="", method=method)), wanted, atol=1e-4)


@pytest.mark.exhaustive
def test_what_was_prepared_is_all_that_runs(stacked):
    runner, tokens = Runner(stacked), np.zeros((1, 96), np.uint8)
    method = hj.Hisa(topk=16, block_size=8, block_topk=8)
    rules = [Rule(name="", method=method, lists=2), Rule(name="", method=method, layers=2)]
    runner.prepare(96, tuple(rules))
    n = len(runner.programs.made)
    for rule in rules:
        assert np.isfinite(runner.logits(tokens, rule)).all()
    assert len(runner.programs.made) == n == 4


@pytest.mark.exhaustive
def test_what_is_compared_was_prepared_too(stacked):
    runner, rule = Runner(stacked), Rule(name="", method=hj.Dsa(topk=16), lists=2)
    samples = held_out_samples(tiny.corpus(), "multikey", 1024, 2, seed=0, n_keys=4, n_questions=2)
    runner.prepare(1024, (rule,))
    measure.prepare_like(runner, rule, 1024, samples[0], 16)
    n = len(runner.programs.made)
    flat = Rule(name="", method=hj.Dsa(topk=16))
    runner.prepare(1024, (flat,))
    measure.prepare_like(runner, flat, 1024, samples[0], 16)
    n_both = len(runner.programs.made)
    measure.recall(runner, rule, measure.references(runner, samples, flat, 16))
    assert len(runner.programs.made) == n_both > n == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", SIZES)
def test_indexers_over_pools_learn_where_the_attention_looks(stacked, model_type):
    recipe = training.Recipe(T=256, queries=16, steps=20, rate=1e-2)
    pools, losses = random_pools(model_type, stacked.config, 0), []
    trained = training.train(stacked, pools, tiny.corpus(), recipe, lambda _, kl: losses.append(kl))
    assert losses[-1] < 0.9 * losses[0]
    rules = command.of_pools(64, *SIZES[model_type][::2])
    samples = held_out_samples(tiny.corpus(), "multikey", 1024, 1, seed=0, n_keys=4, n_questions=2)
    runner = Runner(stacked, trained)
    compared = measure.references(runner, samples, rules[0], 16)
    rows = [measure.recall(runner, rule, compared) for rule in rules]
    assert rows[0]["recall_text"] == rows[0]["recall_asking"] == 1
    assert all(0 < row["worst_text"] <= row["recall_text"] <= 1 for row in rows)


@pytest.mark.exhaustive
def test_the_command_writes_rows_and_a_table(stacked, monkeypatch, tmp_path, capsys):
    corpus = tmp_path / "corpus.npz"
    text.save_corpus(tiny.corpus(), corpus)
    monkeypatch.setattr(command, "load", lambda _: stacked)
    monkeypatch.setattr(command, "composed", lambda *_, **__: composed(16, 8, 8, 2, router_block=16)[:2])
    monkeypatch.setattr(command, "of_pools", lambda *_, of_pools=command.of_pools: of_pools(64, 4, 4)[:2])
    sizes = ["--context", "1024", "--samples", "1", "--queries", "8", "--steps", "2", "--window", "512"]
    sizes += ["--part", "train", "pools", "composed"]
    assert main(["indexers", "--corpus", str(corpus), "--out", str(tmp_path), "--models", "qwen4_exp", *sizes]) == 0
    rows = json.loads((tmp_path / "indexers.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["train"] * 2 + ["pools"] * 2 + ["composed"] * 2
    assert (tmp_path / "indexers.md").read_text() == tables(rows)
    untrained = ["--out", str(tmp_path), "--models", "glm5_next", "--part", "pools"]
    assert main(["indexers", "--corpus", str(corpus), *untrained]) == 2
    assert "glm5_next.npz: no such file, wanted --part train before" in capsys.readouterr().err
