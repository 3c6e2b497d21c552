"""The main job, end to end on a small text, and what it says when it cannot work."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import records
from bench.__main__ import main
from bench.demo import command


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """1,100 tokens: random words, with a passage at the start that comes again at 470 and at the end."""
    random = [f"w{i}" for i in np.random.default_rng(0).integers(90, size=1100)]
    passage = [f"p{i}" for i in range(20)]
    random[20:40] = random[480:500] = random[1000:1020] = passage
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(" ".join(random))
    return path


@pytest.mark.slow
def test_the_demo_shows_rows_and_passages_and_writes_them_and_a_figure(text_file, tmp_path, capsys, monkeypatch):
    measure, parts = command.measure, []

    def watched(*given):
        parts.append(capsys.readouterr().out)
        return measure(*given)

    monkeypatch.setattr(command, "measure", watched)
    arguments = ["--context", "1024", "512", "--queries", "4", "--repeats", "2", "--out", str(tmp_path / "new" / "out")]
    arguments += ["--model-context", "1024"]
    assert main(["demo", "--text", str(text_file), *arguments]) == 0

    # A row is shown before the next one is begun, and what a column means before its rows.
    of_model, first = parts
    assert of_model.index("answered: ") < of_model.index("\nflat ") < of_model.index("\nblock-sparse ")
    assert of_model.index("places: ") > of_model.index("\nblock-sparse ") and "    512  flat" not in of_model
    assert "    512  flat" in first and "    512  block-sparse" in first and "     1K  flat" not in first
    last = capsys.readouterr().out
    assert "     1K  flat" in last and last.index("Answers and time") < last.index("answers 8 of 8")
    shown = "".join((*parts, last))
    shown += " ".join(shown.split())  # also whole sentences, whatever the width
    for wanted in (
        "small.txt",
        "HISA",
        "block-sparse",
        "implementation",
        "HISA 512 (4)",
        "scan 1K (4)",
        "found at",
        ">> p",
        "Answers and time",
        "8 of 8",
    ):
        assert wanted in shown
    assert (tmp_path / "new" / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "new" / "out" / "demo.json").read_text())
    assert written.keys() == {"text", "seed", "rows"} | records.device().keys()
    rows = [row for row in written["rows"] if row["row"] == "select"]
    assert [(row["context"], row["method"]) for row in rows] == [
        (context, method) for context in (512, 1024) for method in ("dsa", "hisa", "scan", "block-sparse")
    ]
    for row in rows:
        assert row.keys() == {
            "row", "method", "implementation", "shape", "context", "dtype", "queries", "first_call_ms", "ms_per_query",
            "spread_ms_per_query", "time_to_flat", "recall", "iou", "mass", "queries_with_places", "median_n",
            "places_kept", "identical_queries",
        }  # fmt: skip
        # So few tokens are all selected.
        assert (row["recall"], row["iou"], row["mass"], row["places_kept"]) == (1, 1, 1, 1)
        assert row["ms_per_query"] > 0
    of_model = [row for row in written["rows"] if row["row"] == "model"]
    assert [row["method"] for row in of_model] == ["dsa", "hisa", "scan", "block-sparse"]
    # At 1,024 bytes HISA keeps all blocks: it is the flat indexer, and the trained model answers; so does the scan.
    assert [row["right"] for row in of_model][:3] == [8, 8, 8] and of_model[0]["questions"] == 8
    assert abs(of_model[0]["bits_per_byte"] - of_model[1]["bits_per_byte"]) < 1e-6


@pytest.mark.exhaustive
def test_a_text_without_repeats_has_no_right_answers_and_still_runs(tmp_path, capsys):
    path = tmp_path / "unique.txt"
    path.write_text(" ".join(f"w{i}" for i in range(512)))
    # The shapes of the test above, which are compiled.
    arguments = [
        "--context",
        "512",
        "--queries",
        "4",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
        "--model-context",
        "1024",
    ]
    assert main(["demo", "--text", str(path), *arguments]) == 0
    assert "there were none" in capsys.readouterr().out
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert {row["places_kept"] for row in rows if row["row"] == "select"} == {None}


def test_a_text_shorter_than_the_default_contexts_is_used_as_far_as_it_goes(text_file, monkeypatch):
    for defaults, wanted in (((256, 1024, 2048), [256, 1024]), ((256, 512, 1024, 2048), [512, 1024])):
        monkeypatch.setattr(command, "DEFAULT_CONTEXTS", defaults)
        tokens, contexts = command._read(text_file, None)
        assert (len(tokens), contexts) == (1024, wanted)


def test_a_selection_that_breaks_the_contract_stops_the_demo():
    same, other = (command.hj.Selection(indices=np.array([[[0, i]]]), count=np.array([[2]])) for i in (1, 2))
    for name, n in (("hisa", 8192), ("scan", 8192)):
        method = command.METHODS[name]
        assert command._check_identical(name, method, same, same, np.array([n - 1])) == 1
        assert command._check_identical(name, method, same, other, np.array([n])) == 0
        with pytest.raises(RuntimeError, match=f"{name} differs .* against the contract"):
            command._check_identical(name, method, same, other, np.array([n - 1]))


def test_a_context_that_would_end_too_late_is_left_out_by_name(text_file, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        assert main(["demo", "--text", str(text_file), "--out", str(text_file.parent), *arguments]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(command, "DEFAULT_CONTEXTS", (256, 512, 1024))
    monkeypatch.setattr(command, "_N_CONTEXTS", 3)
    monkeypatch.setattr(command, "measure", lambda ngrams, context, *_: SimpleNamespace(rows=[context]))
    monkeypatch.setattr(command.demo_model, "read", lambda *_: iter(()))
    for name in ("line", "notes", "passages", "summary", "conclusion", "write"):
        monkeypatch.setattr(command.report, name, lambda *given: [str(given[0])])
    monkeypatch.setattr(command.demo_model, "found", lambda _: "")
    assert "Left out" not in run("--minutes", "3") and "Left out" not in run("--minutes", "1e-9", "--context", "256")
    said = " ".join(run("--minutes", "1e-9").split())
    assert "Left out, for want of time (--minutes 1e-09): 512, 1K. --context 512 1024 takes as long as needed" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", "0"], "argument --context: '0', wanted a whole number from 1 to 1,048,576"),
        (["--context", "1048577"], "argument --context: '1048577', wanted a whole number from 1 to 1,048,576"),
        (["--context", "8K"], "argument --context: '8K', wanted a whole number from 1 to 1,048,576"),
        (["--queries", "0"], "argument --queries: '0', wanted a whole number from 1 to 4,096"),
    ],
)
def test_options_out_of_range_are_refused_with_the_range(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_text_an_empty_one_and_a_short_one_are_named(tmp_path, capsys):
    def error_of(content: bytes | None, context: str) -> str:
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        assert main(["demo", "--text", str(path), "--context", context, "--out", str(tmp_path)]) == 2
        return capsys.readouterr().err.replace(str(tmp_path), "")

    head = "python -m bench demo: error: --text /text: "
    assert error_of(None, "1") == head + "cannot be read: No such file or directory\n"
    assert error_of(b"", "1") == head + "is empty\n"
    assert error_of(b"three short words", "3") == head + "17 bytes, wanted 1,024: give more text\n"
    assert error_of(b"three short words", "4") == head + "3 tokens, wanted 4: give more text or a smaller --context\n"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.endswith("file: cannot be written to: File exists\n")
