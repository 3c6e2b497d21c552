"""The README's GPU figures are those of the committed rows."""

import json
import pathlib
import re

import pytest

from bench import shapes
from bench.__main__ import main
from bench.gpu import report

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
    "row", "implementation", "shape", "context", "queries", "dtype", "ms", "ms_p10", "ms_p90", "tflops", "floor_ms",
    "checked", "device", "jax",
}  # fmt: skip
# What rows of older runs do not have.
RECORD = {"platform", "cpu_cores", "commit", "date", "took_s"}
SPAN = {"span_ms", "span_ms_p10", "span_ms_p90", "kernels_ms", "clock_mhz"}
# What is not printed: some rows were kept from what a run printed, since it was cut before its file was written.
UNPRINTED = {"ms_p10", "ms_p90", "kernels_ms"}


@pytest.fixture(scope="module")
def rows():
    return json.loads(report.RESULTS.read_text())


def test_the_committed_rows_are_complete_and_checked(rows):
    for row in rows:
        figures = set(row) - RECORD
        assert figures in (FIELDS, FIELDS | SPAN, (FIELDS | SPAN) - UNPRINTED) and row["checked"], row
        assert set(row) in (figures, figures | RECORD), row
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


def test_tables_of_the_documents_have_the_spans_of_the_rows(rows):
    """A page may be newer, by a script that measures one kernel; where it is 5 % slower it is stale."""
    spans = {
        (row["row"], row["context"]): row["span_ms"]
        for row in rows
        if "span_ms" in row and (row["shape"], row["dtype"], row["implementation"]) == ("dsv32", "e4m3", "mosaic_gpu")
    }
    prefill = {"flat": "flat indexer", "hisa": "HISA", "scan": "`Scan()`", "scan_2_heads": "scan, 2 exact heads, 3 k"}
    table = numbers("gpu.md", "| ms |")
    for (row, context), span in spans.items():
        if row in prefill:
            assert table[prefill[row], shapes.label(context)] < span * 1.05, (row, context)
    table = numbers("decoding.md", "| requests |")
    columns = {"decode{}_paged": "HISA", "flat_decode{}_paged": "flat", "scan_decode{}_sketch": "scan by sketches"}
    for name, column in columns.items():
        for n in ("1", "32", "128"):
            if (row := (name.format(n), 1 << 17)) in spans:
                assert table[n, column] < spans[row] * 1e3 * 1.05, row


def numbers(page, head):
    """The table of a page whose first line begins so: the first number of each cell, by line and column."""
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()
    (_, *columns), _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {
        (name, column): float(found[0])
        for name, *cells in lines
        for column, cell in zip(columns, cells, strict=True)
        if (found := re.search(r"[\d.]+", cell))
    }
