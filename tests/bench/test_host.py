"""The table of streamindex_topk beside a host's is that of the committed rows."""

import json
import pathlib

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_page_shows_the_committed_figures():
    rows = json.loads((ROOT / "bench/results/streamindex.json").read_text())["rows"]
    page = (ROOT / "docs/integrations.md").read_text()
    of = {(row["who"], row["context"]): (row["ms"], row["kernels_ms"]) for row in rows}
    for context in {context for _, context in of}:
        theirs, ours = of["theirs", context], of["ours", context]
        cells = [f"{ms:.1f}" for ms in (*theirs, *ours)]
        assert f"| {context // 1024}K | {' | '.join(cells)} | {theirs[0] / ours[0]:.1f}x |\n" in page
