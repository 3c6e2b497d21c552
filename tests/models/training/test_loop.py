"""A run: resumed anywhere it ends where an uninterrupted one ends, and what it leaves can be loaded."""

import csv
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hisa_jax import models
from hisa_jax.models.training.curves import draw
from hisa_jax.models.training.loop import CURVES, INDEXERS, MODEL, Settings, train
from hisa_jax.models.training.recipe import RECIPES
from hisa_jax.models.training.weights import weights_of
from tests.models.training import tiny

pytestmark = pytest.mark.slow


def curves(folder):
    with (folder / CURVES).open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(tiny.recipe(), tiny.corpus(), Settings(folder=folder)) == 9
    return folder


@pytest.mark.parametrize(
    "pauses",
    [
        pytest.param((2,), id="in-a-stage", marks=pytest.mark.exhaustive),
        pytest.param((3,), id="between-stages", marks=pytest.mark.exhaustive),
        pytest.param((7,), id="in-the-last"),
    ],
)
def test_a_run_in_pieces_is_the_run_in_one(whole_run, tmp_path, pauses):
    for pause in (*pauses, None):
        done = train(tiny.recipe(), tiny.corpus(), Settings(folder=tmp_path, stop_at=pause))
        assert done == (pause or 9)
    assert curves(tmp_path) == curves(whole_run)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / MODEL / name).read_bytes() == (whole_run / MODEL / name).read_bytes()


@pytest.mark.exhaustive
def test_a_run_that_turns_dense_in_a_stage_is_resumed_on_either_side(tmp_path):
    """With one optimiser throughout: the steps after the turn are those of a dense stage that goes on. 20 seconds."""
    stage = tiny.stage("lighthouse", "model", method=tiny.LIGHTHOUSE, dense_ends=1, dense_after=3, steps=6)
    config = dataclasses.replace(
        tiny.CONFIG, num_hidden_layers=3, layer_kinds=("dense",) * 3, indexer_kinds=("full",) * 3
    )
    recipe = dataclasses.replace(tiny.recipe(stage), config=config)
    train(recipe, tiny.corpus(), Settings(folder=tmp_path / "whole"))
    for pause in (2, 3, 5, None):
        train(recipe, tiny.corpus(), Settings(folder=tmp_path / "pieces", stop_at=pause))
    assert curves(tmp_path / "pieces") == curves(tmp_path / "whole")
    names = [tmp_path / name / MODEL / "model.safetensors" for name in ("pieces", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()
    dense = dataclasses.replace(tiny.recipe(tiny.stage("dense", "model", steps=6)), config=config)
    train(dense, tiny.corpus(), Settings(folder=tmp_path / "dense"))
    rows = curves(tmp_path / "whole"), curves(tmp_path / "dense")
    assert [row["rate"] for row in rows[0]] == [row["rate"] for row in rows[1]]
    assert rows[0][0]["loss"] != rows[1][0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention="lighthouse"), "method is None, wanted a Lighthouse"),
        (dict(method=tiny.LIGHTHOUSE), "wanted a Lighthouse for 'lighthouse' and for it alone"),
        (dict(attention="lighthouse", method=tiny.LIGHTHOUSE, trained="all"), "wanted 'model'"),
        (dict(attention="lighthouse", method=tiny.LIGHTHOUSE, context=120), "n_tokens = 120, which has 15 entries"),
        (dict(attention="lighthouse", method=tiny.LIGHTHOUSE, dense_after=3), "a step between the first and the last"),
        (dict(dense_ends=1), "with 'dense', wanted 'lighthouse'"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.stage(**(dict(attention="dense", trained="model") | changes))


def test_the_recipes_are_of_the_stages_that_they_say():
    recipe = RECIPES["lighthouse"]()
    stage = recipe.stages[1]
    assert stage.method.n_entries(stage.context) == 3087
    assert [stage.attention_at(k) for k in (0, stage.steps * 5 // 8 - 1, stage.steps * 5 // 8)] == [
        "lighthouse", "lighthouse", "dense",
    ]  # fmt: skip
    assert [other.name for other in recipe.stages[2:]] == [other.name for other in RECIPES["bytes"]().stages[2:]]
    assert '"method": "Lighthouse"' in recipe.to_json() and "dense_after" not in RECIPES["bytes"]().to_json()


def test_each_stage_trains_what_it_says(whole_run):
    names = [f"{MODEL}_0", f"{MODEL}_1", MODEL]
    dense, warmed, last = (weights_of(models.from_pretrained(whole_run / name)) for name in names)

    def changed(before, after):
        return {name for name in before if not np.array_equal(before[name], after[name])}

    assert changed(dense, warmed) == {name for name in dense if ".indexer." in name}
    assert {name for name in changed(warmed, last) if ".indexer." not in name}


def test_the_model_that_a_run_leaves_generates(whole_run):
    model = models.from_pretrained(whole_run / MODEL, tiny.HISA, jnp.bfloat16)
    result = models.generate(model, [list(b"the quick brown ")], max_new_tokens=4, chunk=16)
    assert len(result.tokens[0]) == 4


def test_curves_have_a_row_a_step_and_a_figure(whole_run, tmp_path):
    rows = curves(whole_run)
    assert [int(row["step"]) for row in rows] == list(range(1, 10))
    assert [int(row["bytes"]) for row in rows] == [4 * 128 * step for step in range(1, 10)]
    assert all(float(row["kl"]) > 0 for row in rows[3:]) and all(float(row["kl"]) == 0 for row in rows[:3])
    draw(whole_run / CURVES, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_another_recipe_is_refused(whole_run):
    with pytest.raises(ValueError, match="is of another recipe"):
        train(tiny.recipe(tiny.stage("dense", "model")), tiny.corpus(), Settings(folder=whole_run))


def test_indexers_trained_under_the_block_filter_are_handed_on_by_themselves(whole_run, tmp_path):
    start = weights_of(models.from_pretrained(whole_run / MODEL))
    recipe = tiny.recipe(tiny.stage("sparse", "indexer", method=tiny.HISA))
    train(recipe, tiny.corpus(), Settings(folder=tmp_path), start=start)
    trained, alone = load_file(tmp_path / MODEL / "model.safetensors"), load_file(tmp_path / INDEXERS)
    before = load_file(whole_run / MODEL / "model.safetensors")
    assert alone.keys() == {key for key in trained if ".indexer." in key}
    for key, x in trained.items():
        if key in alone:
            np.testing.assert_array_equal(alone[key].view(np.uint8), x.view(np.uint8))
        else:
            np.testing.assert_array_equal(before[key].view(np.uint8), x.view(np.uint8))
    assert any((alone[key].view(np.uint8) != before[key].view(np.uint8)).any() for key in alone)
