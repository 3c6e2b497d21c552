"""The README's GPU figures are those of the committed rows."""

import json
import pathlib
import re

import pytest

from bench import shapes
from bench.__main__ import main
from bench.gpu import report
from bench.peers import report as peers_report

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
    assert report.table(*report.read(report.RESULTS)) in (ROOT / "README.md").read_text()


def test_a_span_beside_a_peer_replaces_an_older_one(tmp_path):
    row = dict(row="flat", shape="dsv32", context=8192, dtype="e4m3", implementation="mosaic_gpu", span_ms=2.0)
    peer = dict(row="flat", shape="dsv32", context=8192, date="2026-01-02", ours_ms=1.0, ours_ms_p10_p90=[0.9, 1.1])
    new, other = row | {"date": "2026-01-03"}, row | {"dtype": "bf16"}
    file = tmp_path / "h200.json"
    file.write_text(json.dumps([row, new, other]))
    assert report.read(file) == ([row, new, other], [])
    (tmp_path / "peers.json").write_text(json.dumps([peer]))
    assert [row["span_ms"] for row in report.read(file)[0]] == [1.0, 2.0, 2.0]


def test_the_ratios_of_the_documents_are_those_of_the_committed_rows():
    peers = json.loads(report.RESULTS.with_name("peers.json").read_text())
    assert peers_report.table(peers) in (ROOT / "docs/peers.md").read_text()


def test_the_report_writes_a_plot(tmp_path, capsys):
    assert main(["gpu-report", "--plot", str(tmp_path / "gpu.png")]) == 0
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "HISA, e4m3" in capsys.readouterr().out


def test_a_missing_file_is_a_clear_error(capsys):
    assert main(["gpu-report", "--json", "nowhere.json"]) == 2
    assert "--json nowhere.json: no such file" in capsys.readouterr().err


def test_tables_of_the_documents_have_the_spans_of_the_rows():
    """A page may be newer, by a script that measures one kernel; where it is 5 % slower it is stale."""
    rows, peers = report.read(report.RESULTS)
    spans = {
        (row["row"], row["context"]): row["span_ms"]
        for row in rows
        if "span_ms" in row and (row["shape"], row["dtype"], row["implementation"]) == ("dsv32", "e4m3", "mosaic_gpu")
    }
    spans |= {(x["row"], x["context"]): x["ours_ms"] for x in peers if "decode" in x["row"]}
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


def test_long_prompts_of_the_documents_are_those_of_the_rows():
    rows = json.loads(report.RESULTS.with_name("serve_contexts.json").read_text())
    table = numbers("long-contexts.md", "| | flat: first token, s |")
    table |= numbers("long-contexts.md", "| | `Scan()`: first token, s |")
    names = {"dsa": "flat", "hisa": "HISA", "scan": "`Scan()`"}
    parts = {
        "first token, s": ("time_to_first_token_s", 1), "a turn, ms": ("time_to_first_token_of_a_turn_s", 1e3),
        "a step, ms": ("time_per_output_token_s", 1e3),
    }  # fmt: skip
    measured = [x for x in rows if "commit" in x]
    assert measured
    for x in measured:
        split = [f"`{axis}={n}`" for axis, n in (x["mesh"] or {}).items() if n > 1]
        line = ", ".join([shapes.label(x["context"]), *(split or ["one GPU"])])
        for part, (field, unit) in parts.items():
            shown = table[line, f"{names[x['indexer']]}: {part}"]
            assert shown == pytest.approx(x[field] * unit, rel=0.01), (line, part)


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
