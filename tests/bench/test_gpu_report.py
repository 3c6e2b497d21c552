"""The README's GPU figures are those of the committed rows."""

import json
import pathlib

import pytest

from bench.__main__ import main
from bench.gpu import report

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
    "row", "implementation", "shape", "context", "queries", "dtype", "ms", "ms_p10", "ms_p90", "tflops", "floor_ms",
    "checked", "device", "jax",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return json.loads(report.RESULTS.read_text())


def test_the_committed_rows_are_complete_and_checked(rows):
    for row in rows:
        assert set(row) == FIELDS and row["checked"], row
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"], row
        assert row["ms"] > row["floor_ms"] > 0, f"faster than its floor: {row}"


def test_the_table_of_the_readme_is_that_of_the_committed_rows(rows):
    assert report.table(rows) in (ROOT / "README.md").read_text()


def test_the_report_writes_a_plot(tmp_path, capsys):
    assert main(["gpu-report", "--plot", str(tmp_path / "gpu.png")]) == 0
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "HISA, e4m3" in capsys.readouterr().out


def test_a_missing_file_is_a_clear_error(capsys):
    assert main(["gpu-report", "--json", "nowhere.json"]) == 2
    assert "--json nowhere.json: no such file" in capsys.readouterr().err
