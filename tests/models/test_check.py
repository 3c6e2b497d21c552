"""The self-check: what it counts, on tiny checkpoints, and what it refuses."""

import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.__main__ import main
from hisa_jax.models.check import command, measures, reading
from hisa_jax.models.check.report import SHARE
from tests import oracle

from . import golden

TEXT = "THE SCAN READS EVERY KEY, AND KEEPS A FEW OF THEM. " * 3
LAYERS = (0, 2)  # of glm5, one of each kind
METHODS = measures.methods_to_check(8, block_size=4)


@functools.cache
def seen_of(case, n=16, chunk=24):
    """40 tokens of a golden case: whole chunks and a rest."""
    positions = reading.sampled_positions(40, n)
    tokens = golden.ids(case)[0].tolist()
    return list(reading.read(golden.model(case), tokens, positions, chunk, lambda n: None)), positions


def test_queries_are_spread_over_the_last_half_and_end_with_the_last():
    assert reading.sampled_positions(1000, 3).tolist() == [500, 750, 999]
    assert reading.sampled_positions(10, 256).tolist() == [5, 6, 7, 8, 9]
    assert reading.sampled_positions(1000, 1).tolist() == [999]


def test_by_default_hisa_has_64_blocks_and_four_times_topk_candidates():
    assert measures.methods_to_check(2048)["HISA"] == hj.Hisa()
    assert measures.methods_to_check(256)["HISA"] == hj.Hisa(topk=256, block_size=16, block_topk=64)
    odd = measures.methods_to_check(5)
    assert odd["HISA"] == hj.Hisa(topk=5, block_size=1, block_topk=20) and odd["scan, 1.5 k"].candidates == 8


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dsv32", "glm52"])
@pytest.mark.gate("dsv32")
def test_layers_are_seen_as_the_model_sees_them(case):
    """Index inputs of each layer that selects, and the attention's logits: those of queries and latents in full."""
    found, positions = seen_of(case)
    layers = golden.output(case).layers
    assert [seen.layer for seen in found] == [i for i, layer in enumerate(layers) if layer.index_inputs is not None]
    for seen in found:
        q, k, w = (np.asarray(x)[:1] for x in layers[seen.layer].index_inputs)
        golden.assert_close(seen.q, q[:, positions], golden.HIDDEN)
        golden.assert_close(seen.w, w[:, positions], golden.HIDDEN)
        golden.assert_close(seen.k, k, golden.HIDDEN)
    config = golden.model(case).config
    chosen = jnp.asarray(layers[0].selection.indices[0, positions])
    (mass,) = measures.attention_mass(
        found[0].heads, found[0].latents, jnp.asarray(positions), (chosen,), config.softmax_scale
    )
    logits = np.einsum("nhc,sc->nhs", found[0].heads, found[0].latents) * config.softmax_scale
    p = np.exp(logits) * (np.arange(40) <= positions[:, None, None])
    p = (p / p.sum(-1, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(mass, np.take_along_axis(p, np.asarray(chosen), axis=1).sum(axis=1), rtol=1e-5)


def test_the_flat_indexer_keeps_all_of_itself_and_the_attention_of_every_token_is_one():
    seen = seen_of("dsv32")[0][1]
    few = {name: METHODS[name] for name in ("flat", "scan, 1.5 k", "scan, 3 k")}
    found = measures.measure(seen, few | {"every token": hj.Dsa(topk=64)}, 1.0)
    assert found["flat"][:2] == (1, 1) and found["every token"].recall == 1
    assert found["every token"].mass == pytest.approx(1) and 0 < found["flat"].mass < 1
    assert 0 < found["scan, 1.5 k"].recall <= found["scan, 3 k"].recall <= 1


def test_a_scan_selects_of_the_flat_tokens_those_that_its_ranks_say():
    """Whatever the number of candidates; the oracle does the scan."""
    seen, positions = seen_of("dsv32")[0][0], reading.sampled_positions(40, 16)
    flat = hj.Dsa(topk=8)
    ranks = measures.scan_ranks(seen, flat)
    assert ranks.size == 16 * 8
    inputs = [np.asarray(x) for x in (seen.q, seen.k, seen.w)]
    wanted = oracle.select(*inputs, flat, positions[None]).indices[0]
    for candidates in (8, 11, 16, 30):
        got = oracle.select(*inputs, hj.Scan(topk=8, candidates=candidates), positions[None]).indices[0]
        kept = [np.isin(row, other) for row, other in zip(wanted, got, strict=True)]
        np.testing.assert_array_equal((ranks < candidates).reshape(16, 8), kept)


def test_the_fewest_candidates_are_counted_by_rank():
    ranks = np.arange(200)[::-1]
    assert measures.fewest_candidates(ranks, SHARE, topk=8) == 199
    assert measures.fewest_candidates(ranks, 1.0, topk=8) == 200
    assert measures.fewest_candidates(ranks // 100, SHARE, topk=8) == 8


def check(*arguments, checkpoint=golden.FOLDER / "glm5"):
    options = ["--block-size", "4", "--chunk", "32", "--dtype", "float32"]
    return main(["check", "--checkpoint", str(checkpoint), *options, *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.exhaustive  # what it shows is tested above
@pytest.mark.parametrize(
    "methods",
    [("flat", "HISA", "scan, 1.5 k"), tuple(METHODS)],
    ids=["some", "all"],
)
def test_the_command_shows_a_table_and_writes_every_layer(methods, tmp_path, capsys):
    """A program a method; those that it has by default are above."""
    (tmp_path / "text").write_text(TEXT)
    out, few = tmp_path / "check.json", {name: METHODS[name] for name in methods}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "methods_to_check", lambda topk, block_size: few)
        options = ["--context", 100, "--queries", 20, "--json", out]
        assert check("--text", tmp_path / "text", *options, checkpoint=golden.folder_of("glm5", LAYERS)) == 0
    shown, data = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["method"] for row in data["methods"]] == list(methods)
    for row in data["methods"]:
        assert row["method"] in shown
        for measure in ("recall", "mass", "iou"):
            found = row[measure]
            values = list(found["by_layer"].values())
            assert len(values) == 2 and found["worst"] == min(values) == found["by_layer"][str(found["worst_layer"])]
            assert found["mean"] == pytest.approx(sum(values) / 2) and 0 < found["mean"] <= 1
    fewest = data["fewest_candidates"]
    assert 8 <= fewest["all"] <= fewest["worst"] == max(fewest["by_layer"].values()) <= 100
    assert (data["tokens"], data["queries"], data["topk"], data["text"]) == (100, 20, 8, "text")
    assert f"hj.Scan(topk=8, candidates={fewest['all']})" in shown and "Read: 100 tokens of text; 20 queries" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", 257], "--context 257: wanted at most 256, the positions of the model"),
        (["--context", 15], "--context 15: wanted at least 16, twice topk"),
        (["--context", 200], "/text: 153 tokens, wanted at least 200: give more text"),
        (["--topk", 77], "/text: 153 tokens, wanted at least 154"),
        (["--topk", 0], "--topk 0: wanted at least 1"),
        (["--topk", 129], "--topk 129: wanted at most 128, half of the model's positions"),
        (["--queries", 0], "--queries 0: wanted at least 1"),
        (["--model-parallel", 99], r"make_mesh\(data=1, model=99, context=1\): wanted at least 1 of each"),
        (["--block-size", 17], "--block-size 17: wanted at most 16, twice topk"),
        (["--json", "/nowhere/check.json"], "--json /nowhere/check.json: /nowhere is no folder"),
        (["--checkpoint", "nowhere"], r"wanted a folder with a config\.json"),
    ],
)
def test_what_it_refuses_is_named(arguments, message, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    assert check("--text", tmp_path / "text", *arguments) == (2 if message.startswith("--") else 1)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and re.search(message, captured.err)


@pytest.mark.slow
def test_a_model_that_overflows_is_an_error_that_names_the_layer(tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(command, "methods_to_check", lambda topk, block_size: {"flat": METHODS["flat"]})

    def overflowing(tensors):
        tensors["model.layers.1.self_attn.kv_a_layernorm.weight"][:] = 3e38

    folder = golden.write_checkpoint(tmp_path / "large", "glm5", overflowing, layers=LAYERS)
    # The sizes of the command above, whose programs are compiled.
    assert check("--text", tmp_path / "text", "--context", 100, "--queries", 20, checkpoint=folder) == 1
    assert "check: the attention of layer 1 is not finite" in capsys.readouterr().err


def test_texts_and_checkpoints_that_do_not_do_are_named(tmp_path, capsys):
    def error_of(checkpoint):
        assert check("--text", tmp_path / "text", checkpoint=checkpoint) == 1
        return capsys.readouterr().err

    assert "No such file" in error_of(golden.FOLDER / "glm5")
    (tmp_path / "text").write_bytes(b"\xff")
    assert "/text: wanted a text in UTF-8" in error_of(golden.FOLDER / "glm5")
    (tmp_path / "text").write_text(TEXT)
    large = golden.write_checkpoint(tmp_path / "large", "glm5", vocab_size=1000)
    assert "has no tokenizer.json" in error_of(large)
    dense = golden.write_checkpoint(tmp_path / "dense", "glm5", model_type="deepseek_v3")
    assert "model_type is 'deepseek_v3'" in error_of(dense)

    def without_indexer(tensors):
        for name in [name for name in tensors if ".indexer." in name]:
            del tensors[name]

    bare = golden.write_checkpoint(tmp_path / "bare", "glm5", without_indexer)
    assert "indexer" in error_of(bare)
