"""The bench of Lighthouse attention, on a small layer."""

import json

import pytest

from bench import lighthouse
from bench.__main__ import main


@pytest.mark.exhaustive  # 20 seconds
def test_a_layer_is_checked_and_timed_stage_by_stage(tmp_path, capsys):
    file = tmp_path / "rows.json"
    sizes = ["--contexts", "2048", "--heads", "2", "--dim", "32", "--samples", "5"]
    assert main(["lighthouse", *sizes, "--json", str(file)]) == 0
    assert "selection that of the oracle" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    assert row["entries"] == 399 and row["checked"] and row["implementation"] == "xla"
    assert all(ms > 0 for ms in row["ms"].values()) and "dense_forward_backward" in row["ms"]
    # A gradient that nobody reads is computed all the same.
    assert row["ms"]["forward_backward"] > 1.5 * row["ms"]["forward"]
    assert main(["lighthouse", "--json", str(file), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_paper_s_sizes_are_those_that_are_measured():
    layers = [lighthouse.Layer(tokens=n, heads=8, dim=128, dtype="bfloat16") for n in lighthouse.CONTEXTS]
    assert [layer.method.topk for layer in layers] == [512, 1024, 2048, 4096, 8192]
    assert [layer.method.n_entries(layer.tokens) for layer in layers] == [6159, 12303, 24591, 49167, 98319]


def test_a_plot_wants_rows(tmp_path, capsys):
    assert main(["lighthouse", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "--json is None, wanted a file" in capsys.readouterr().err
