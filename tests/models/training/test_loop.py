"""A run: resumed anywhere it ends where an uninterrupted one ends, and what it leaves can be loaded."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hisa_jax import models
from hisa_jax.models.training.curves import draw
from hisa_jax.models.training.loop import CURVES, INDEXERS, MODEL, Settings, train
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
        pytest.param((3, 7), id="between-and-in-the-last"),
    ],
)
def test_a_run_in_pieces_is_the_run_in_one(whole_run, tmp_path, pauses):
    for pause in (*pauses, None):
        done = train(tiny.recipe(), tiny.corpus(), Settings(folder=tmp_path, stop_at=pause))
        assert done == (pause or 9)
    assert curves(tmp_path) == curves(whole_run)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / MODEL / name).read_bytes() == (whole_run / MODEL / name).read_bytes()


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
