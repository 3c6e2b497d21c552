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
# What rows of an older run do not have.
SPAN = {"span_ms", "span_ms_p10", "span_ms_p90", "kernels_ms", "clock_mhz"}
# What is not printed: some rows were kept from what a run printed, since it was cut before its file was written.
UNPRINTED = {"ms_p10", "ms_p90", "kernels_ms"}


@pytest.fixture(scope="module")
def rows():
    return json.loads(report.RESULTS.read_text())


def test_the_committed_rows_are_complete_and_checked(rows):
    for row in rows:
        assert set(row) in (FIELDS, FIELDS | SPAN, (FIELDS | SPAN) - UNPRINTED) and row["checked"], row
        for name in ("ms", "span_ms") if "span_ms" in row else ("ms",):
            if f"{name}_p10" in row:
                assert row[f"{name}_p10"] <= row[name] <= row[f"{name}_p90"], row
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
