"""The quality report end to end on a tiny model, what it refuses, and that its page shows what was measured."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.__main__ import main
from bench.quality import command as quality
from bench.quality import model as quality_model
from bench.quality.page import about, markdown, verdict
from bench.quality.variants import ablations, scans
from hisa_jax.models.export import save_pretrained
from hisa_jax.models.training.text import save_corpus
from hisa_jax.models.training.weights import Skeleton
from tests.models.training import tiny

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ["bits", "needle", "multikey", "layers", "scans", "ablations"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    skeleton = Skeleton(dataclasses.replace(tiny.CONFIG, max_position_embeddings=1024), dtype="float32")
    save_pretrained(skeleton.model(skeleton.initial(0)), folder / "model")
    save_corpus(tiny.corpus(), folder / "corpus.npz")
    return folder


def command(folder, *more):
    given = [
        "--checkpoint",
        str(folder / "model"),
        "--corpus",
        str(folder / "corpus.npz"),
        "--out",
        str(folder / "out"),
    ]
    sizes = ["--contexts", "768", "--samples", "1", "--block-size", "8", "--block-topk", "4"]
    return ["quality", *given, *sizes, *more]


def error_of(folder, capsys, *more):
    assert main(command(folder, *more)) == 2
    return capsys.readouterr().err.replace(str(folder), "").removeprefix("python -m bench quality: error: ")


@pytest.mark.exhaustive  # test_quality_parts.py has its parts
def test_the_report_is_measured_in_pieces_and_written(folder, capsys, monkeypatch):
    monkeypatch.setattr(quality, "ablations", lambda *sizes: ablations(*sizes)[:2])  # each is compiled
    monkeypatch.setattr(quality, "scans", lambda topk: scans(topk)[:2])
    # First a part alone, then the rest: what was measured is not measured again.
    assert main(command(folder, "--part", "bits")) == 0
    before = {file: file.stat().st_mtime_ns for file in (folder / "out" / "parts").glob("bits-*")}
    assert len(before) == 4
    capsys.readouterr()
    assert main(command(folder, "--part", *PARTS)) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}

    shown = capsys.readouterr().out
    data = json.loads((folder / "out" / "quality.json").read_text())
    assert {row["part"] for row in data["rows"]} == set(PARTS)
    for sentence in (*verdict(data), about(data)):
        assert sentence in shown
    assert "single needle 0.0 %" in shown and "FAIL" in shown
    figures = sorted(file.name for file in (folder / "out").glob("*.png"))
    assert figures == [
        "ablations.png", "accuracy.png", "bits.png", "layers.png", "needle_block-sparse.png", "needle_flat.png",
        "needle_hisa.png", "needle_scan.png", "scans.png",
    ]  # fmt: skip
    page = (folder / "out" / "quality.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    assert not re.search(r"(src|href)='(?!data:)", page)  # nothing from elsewhere
    assert page.index("What is kept, what is lost") < page.index("<img")
    assert "not trained" in page

    # Another size is another run.
    message = error_of(folder, capsys, "--part", "bits", "--samples", "2")
    assert message == "--out /out: holds parts of a run with other settings, wanted another folder\n"


def test_what_cannot_be_measured_is_refused_by_name(folder, tmp_path, capsys):
    def error(*more):
        return error_of(folder, capsys, "--out", str(tmp_path), *more)

    assert error("--checkpoint", "nowhere") == "--checkpoint nowhere: no such folder\n"
    assert error("--checkpoint", str(tmp_path)).startswith(f"--checkpoint {tmp_path}: ")
    assert error("--corpus", str(tmp_path / "none")).startswith(f"--corpus {tmp_path / 'none'}: ")
    assert error("--contexts", "2048") == "--contexts 2048: wanted at most 1024, the model's longest\n"
    assert error("--block-topk", "1").startswith("--block-size 8 --block-topk 1: Hisa(")
    assert error("--minutes", "-1").startswith("nothing was measured: give more --minutes")
    (tmp_path / "file").touch()
    assert "cannot be written to" in error("--out", str(tmp_path / "file"))


def test_indexers_trained_under_hisa_take_the_place_of_the_flat_ones_alone(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())
    assert quality_model.load_hisa_aware(tmp_path) is None
    trained = {
        name: np.full_like(x, 0.5)
        for name, x in load_file(tmp_path / "model.safetensors").items()
        if ".indexer." in name
    }
    file = tmp_path / quality_model.INDEXERS / "indexers.safetensors"
    file.parent.mkdir()
    save_file(trained, file)

    flat, aware = quality_model.load(tmp_path), quality_model.load_hisa_aware(tmp_path)
    for of_flat, of_aware in zip(*map(_layers, (flat, aware)), strict=True):
        is_indexer = "indexer" in of_flat[0]
        assert (np.asarray(of_aware[1]) == 0.5).all() == is_indexer
        assert np.array_equal(of_flat[1], of_aware[1]) != is_indexer
    np.testing.assert_array_equal(flat.embed, aware.embed)

    save_file({}, file)
    with pytest.raises(quality_model.UserError, match="indexer.wq_b.weight is missing"):
        quality_model.load_hisa_aware(tmp_path)


def test_the_model_that_comes_along_has_indexers_trained_under_hisa():
    flat, aware = quality_model.load(quality_model.BYTES), quality_model.load_hisa_aware(quality_model.BYTES)
    for of_flat, of_aware in zip(*map(_layers, (flat, aware)), strict=True):
        assert np.isfinite(np.asarray(of_aware[1])).all()
        assert np.array_equal(of_flat[1], of_aware[1]) != ("indexer" in of_flat[0])


def _layers(stacked):
    from flax import nnx

    return [("/".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(stacked.layers)]


def test_the_figures_of_the_page_are_those_of_the_committed_rows():
    data = json.loads((ROOT / "bench" / "results" / "quality.json").read_text())
    assert markdown(data) in (ROOT / "docs" / "notes" / "quality_bytes.md").read_text()
