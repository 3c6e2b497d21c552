"""The lab on a language model, its parts with a tiny random one: what it compares is what the library selects."""

import dataclasses
import pathlib
import random
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import hisa_jax as hj
from bench import UserError
from bench.__main__ import main
from bench.smollm2 import adversary, answers, fetch, joint, lab, measure, model, page, prompts, sketches, training
from bench.smollm2.filters import Varied, View, chosen
from bench.smollm2.indexers import random_indexers
from bench.smollm2.methods import core, fitting, varied

ROOT = pathlib.Path(__file__).parents[2]
T, H, D = 384, 4, 128
CONFIG = model.Config(n_layers=2, width=32, n_heads=4, n_kv_heads=2, head_dim=16, ffn_width=48, vocab=300)
RECIPE = training.Recipe(T=128, n_queries=16, steps=12, per_call=3, rate=0.03)


def view(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k = jax.random.normal(keys[0], (T, H, D)), jax.random.normal(keys[1], (T, D))
    return View(q, jax.random.normal(keys[2], (T, H)), k, jnp.arange(1, T + 1))


class Filters(chex.TestCase):
    @parameterized.named_parameters(
        ("flat", hj.Dsa(topk=16)),
        ("hisa", hj.Hisa(topk=16, block_size=32, block_topk=3)),
        ("hisa_ragged", hj.Hisa(topk=16, block_size=40, block_topk=3)),
        ("block_sparse", hj.BlockSparse(topk=64, block_size=16)),
        ("scan", hj.Scan(topk=16, candidates=24, exact_heads=2)),
        ("scan_one_head", hj.Scan(topk=16, candidates=24, exact_heads=0)),
        ("scan_units", hj.Scan(topk=16, candidates=48, unit=8, exact_heads=1)),
        ("scan_plain", hj.Scan(topk=16, candidates=32, unit=4, slopes="plain", exact_heads=0)),
        ("scan_sketch", hj.Scan(topk=16, candidates=24, sketch="int4", exact_heads=1)),
    )
    @pytest.mark.gate("flat", "hisa_ragged", "block_sparse", "scan_units", "scan_sketch")
    def test_masks_are_the_selections_of_the_library(self, method):
        one = view()
        with jax.default_matmul_precision("highest"):
            mask = np.asarray(jax.jit(lambda: chosen(method, one))())
            wanted = hj.select(one.q[None], one.k[None], one.w[None], method)
        found = np.zeros((T, T + 1), bool)
        np.put_along_axis(found, np.asarray(wanted.indices[0]), True, axis=1)  # -1 is the last column
        np.testing.assert_array_equal(mask, found[:, :T])

    @pytest.mark.exhaustive  # each mask is compared with the library's above
    def test_every_method_is_the_flat_indexer_where_all_tokens_are_candidates(self):
        one = view(1)
        everything = fitting({**core(256), **varied(256)}, H, 3 * T)
        names = [
            name
            for name in everything
            if name.endswith((" 2 k", " 3 k", " 4 k")) and "MISA" not in name and "scan of" not in name
        ]
        flat, *masks = jax.jit(lambda: [chosen(everything[name], one) for name in ("flat", *names)])()
        for name, mask in zip(names, masks, strict=True):
            np.testing.assert_array_equal(np.asarray(mask), np.asarray(flat), err_msg=name)


@pytest.mark.exhaustive
def test_with_all_heads_apart_the_candidates_are_the_selection():
    one = view(3)
    mask = chosen(Varied(topk=16, candidates=18, exact_heads=H), one)  # and the first token and the query's own
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(chosen(hj.Dsa(topk=16), one)))


def test_rotation_is_orthogonal_and_sketches_come_near_to_the_keys():
    k = view().k
    turn = sketches.rotation(D)
    np.testing.assert_allclose(turn @ turn.T, np.eye(D), atol=1e-6)
    made = sketches.make(sketches.NAMES, k, jnp.eye(D))
    errors = {name: float(jnp.linalg.norm(x - k) / jnp.linalg.norm(k)) for name, x in made.items()}
    assert errors["8 bits"] < 0.02 < errors["4 bits"] < 0.2 < errors["3 bits"] < errors["2 bits"]
    assert errors["3 bits, Lloyd-Max"] < errors["3 bits"] and errors["2 bits, Lloyd-Max"] < errors["signs"]


def test_a_second_look_at_the_keys_chooses_among_those_that_passed():
    one = view(2)
    one = View(one.q, one.w, one.k, one.visible, {"signs": one.k})
    both = chosen(Varied(topk=16, candidates=32, sketch="signs", first=64), one)
    np.testing.assert_array_equal(
        np.asarray(both), np.asarray(chosen(hj.Scan(topk=16, candidates=32, exact_heads=0), one))
    )


def test_heads_that_have_nothing_in_common_are_harder():
    methods = {"flat": hj.Dsa(topk=16), "scan": hj.Scan(topk=16, candidates=32, exact_heads=0)}
    rows = adversary.recalls(methods, 512, 16, t=16)
    of = {(row["open"], row["shared"], row["negative"]): row["recall"] for row in rows}
    assert all(recall["flat"] == 1 for recall in of.values())
    assert of[0.5, 0.5, 0.0]["scan"] > 0.95 > 0.8 > of[0.05, 0.0, 0.0]["scan"]


def tiny(seed=0):
    """Weights, indexers and a text that repeats itself."""
    text = np.random.default_rng(seed).integers(0, CONFIG.vocab, 640).astype(np.uint16)
    return model.random_weights(jax.random.key(seed), CONFIG), random_indexers(jax.random.key(seed), CONFIG, H), text


@pytest.mark.exhaustive
def test_training_lowers_the_divergence_and_goes_on_where_it_was_saved(tmp_path):
    weights, _, text = tiny()
    text, rows = text[: RECIPE.T + 1], []  # one window
    first = training.first_state(CONFIG, H, RECIPE)
    whole = training.train(first, weights, CONFIG, RECIPE, text, float("inf"), rows.append)
    assert rows[-1]["step"] == 12 and rows[-1]["kl"] < rows[0]["kl"]
    first = training.first_state(CONFIG, H, RECIPE)
    half = training.train(first, weights, CONFIG, RECIPE, text, float("inf"), rows.append, stop=6)
    training.save(tmp_path / "half.npz", half)
    loaded = training.load(tmp_path / "half.npz", training.first_state(CONFIG, H, RECIPE))
    again = training.train(loaded, weights, CONFIG, RECIPE, text, float("inf"), rows.append)
    chex.assert_trees_all_equal(whole, again)
    with pytest.raises(UserError, match="other shapes"):
        training.load(tmp_path / "half.npz", training.first_state(CONFIG, 2 * H, RECIPE))


def test_together_the_model_learns_from_the_text_and_the_indexers_from_the_model():
    weights, indexers, text = tiny()
    tokens, rows = jnp.asarray(text[:128], jnp.int32), jnp.arange(100, 116)

    @jax.jit
    def sizes():
        _, pull = jax.vjp(lambda *both: joint.loss(*both, CONFIG, tokens, rows, 16)[1], weights, indexers)
        return [[size_of(tree) for tree in pull(which)] for which in ((1.0, 0.0), (0.0, 1.0))]

    (model_of_text, indexers_of_text), (model_of_divergence, indexers_of_divergence) = sizes()
    assert model_of_text > 0 == indexers_of_text and indexers_of_divergence > 0 == model_of_divergence


@pytest.mark.exhaustive
def test_joint_training_lowers_the_loss_of_the_text():
    weights, indexers, text = tiny()
    recipe = joint.Recipe(T=128, n_queries=16, steps=30, per_call=3, topk=16, rate=0.01, model_rate=0.01)
    state, seen = joint.first_state(weights, indexers, recipe), []
    joint.train(state, CONFIG, recipe, text[:129], jnp.float32, float("inf"), seen.append)
    assert seen[-1]["step"] == 30 and seen[-1]["nats"] < seen[0]["nats"]


def size_of(tree):
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)) ** 0.5


class Letters:
    """A tokeniser with a token a letter."""

    def encode(self, text, add_special_tokens):
        return SimpleNamespace(ids=[ord(letter) for letter in text])


def some_prompts(n=2, length=4096):
    filler = np.full(6000, ord("-"), np.uint16)
    return prompts.make_prompts(Letters(), filler, length, n, copied=0)


def test_every_answer_stands_in_the_text_after_the_words_that_ask_for_it():
    made = some_prompts()
    for tokens, questions, choices in zip(*made, strict=True):
        text = "".join(map(chr, tokens))
        assert len(questions) == 12 and len(choices) == 20
        for kind, first, end in questions:
            question = text[text.rindex("\n", 0, first) : first]
            times = prompts.FORMS[kind].times
            assert text[:first].count(question + text[first:end] + "\n") == times and text.count(question) == times + 1


def test_lines_need_room():
    with pytest.raises(ValueError, match="make_prompts: 512 tokens leave"):
        some_prompts(length=512)


def test_a_model_that_attends_to_all_it_sees_is_the_dense_one_and_answers_are_counted():
    weights, indexers, text = tiny()
    rng = random.Random(0)
    tokens = np.array([rng.randrange(300) for _ in range(128)], np.uint16)
    questions = np.array([[[0, 100, 102], [1, 110, 111]]], np.int32)
    asked = prompts.Prompts(tokens[None], questions, np.array([[5, 7]], np.uint16))
    directions = jnp.zeros((2, D, D))
    read = [
        answers.measure(answers.make_forward(CONFIG, method), weights, indexers, directions, text[None, :128], asked)
        for method in (None, hj.Dsa(topk=128))
    ]
    np.testing.assert_allclose(read[0].nats, read[1].nats, atol=1e-4)
    right = answers.Answers(read[0].nats, np.array([[True, False, True]]), np.array([[True] * 3]), np.ones((1, 3)))
    found = answers.by_kind(asked, right, prompts.KINDS)
    assert found["single"]["right"] == 0 and found["single"]["best"] == 1 and found["single"]["tokens"] == 0.5
    assert found["multi-key"]["right"] == 1 and "copy" not in found


@pytest.mark.exhaustive
def test_the_lab_measures_and_writes_tables(tmp_path, monkeypatch):
    weights, indexers, text = tiny()
    some = {"flat": hj.Dsa(topk=16), "scan, 2 k": hj.Scan(topk=16, candidates=32, exact_heads=0)}
    size = lab.Size(
        T=128, topk=16, topks=(8,), windows=2, prompts=1, compared=1, variations=False, methods=1, steps=1, H=H
    )
    monkeypatch.setattr(lab, "core", lambda topk: {name: dataclasses.replace(m, topk=topk) for name, m in some.items()})
    asked = prompts.Prompts(text[None, :128], np.array([[[0, 100, 102]]], np.int32), np.array([[5, 7]], np.uint16))
    data = lab.Data(text, text[:256].reshape(2, 128), asked)
    about = {"heads": H, "seed": 0, "step": 0, "schedule": 0, "queries": 16}
    rows = lab.Rows(tmp_path / "rows.jsonl")
    one = lab.Lab(CONFIG, weights, data, size, rows, float("inf"), indexers, about=about)
    one.compare()
    one.answer(some)
    found = page.read(tmp_path / "rows.jsonl")
    recall = {(row["method"], row["topk"]): row["recall"] for row in found if row["kind"] == "compare"}
    assert recall["flat", 16] == 1 and recall["flat", 8] == 1 and 0.5 < recall["scan, 2 k", 16] < 1
    assert {row["measure"] for row in found if row["kind"] == "heads"} == set(measure.Heads._fields)
    written = page.markdown(found)
    assert "text and answers" in written and "| scan, 2 k | 32 |" in written and "bits over flat" in written


def test_tokens_of_another_size_are_refused(tmp_path):
    _, _, text = tiny()
    data = lab.Data(text, text[:256].reshape(2, 128), some_prompts(1))
    lab.save_data(tmp_path / "tokens.npz", data)
    assert lab.load_data(tmp_path / "tokens.npz", dataclasses.replace(lab.SIZES["small"], T=128)).windows.shape == (
        2,
        128,
    )
    with pytest.raises(UserError, match=r"tokens.npz: holds windows of 128 tokens, wanted 1024"):
        lab.load_data(tmp_path / "tokens.npz", lab.SIZES["small"])


def test_a_file_of_another_hash_is_refused(tmp_path):
    (tmp_path / fetch.TEXT.file).write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{fetch.TEXT.file}: has sha256 .*, wanted {fetch.TEXT.sha256}"):
        fetch.fetch(fetch.TEXT, tmp_path)


def test_weights_come_out_of_a_gguf_file_as_they_were(tmp_path):
    gguf = pytest.importorskip("gguf")
    from bench.smollm2.gguf_file import _NAMES, read_weights

    weights, *_ = tiny()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.asarray(weights.embed))
    writer.add_tensor("output_norm.weight", np.asarray(weights.norm))
    for field, name in _NAMES.items():
        for i, x in enumerate(np.asarray(getattr(weights.layers, field))):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ascontiguousarray(x.T))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    chex.assert_trees_all_equal(read_weights(tmp_path / "tiny.gguf", CONFIG, jnp.float32), weights)
    with pytest.raises(UserError, match=r"has no attn_norm.weight of \[32\] in each of 3 layers"):
        read_weights(tmp_path / "tiny.gguf", dataclasses.replace(CONFIG, n_layers=3), jnp.float32)


@pytest.mark.parametrize(("of", "part"), [("smollm2", "needle"), ("bytes", "train")])
def test_a_part_of_another_model_is_refused(of, part, capsys):
    assert main(["quality", "--model", of, "--part", part]) == 2
    assert f"--part {part}: --model {of} has" in capsys.readouterr().err


def test_the_tables_of_the_notes_are_those_of_the_committed_rows():
    made = page.markdown(page.read(ROOT / "bench/results/smollm2.jsonl"))
    assert (ROOT / "docs/notes/quality_smollm2.md").read_text().endswith("\n\n" + made)
