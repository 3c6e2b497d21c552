"""What is written down of measurements. Less than a second."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import subprocess

import jax
import pytest

from bench import UserError, records
from bench.records import measure_all, merge, plain, whole_file


@dataclasses.dataclass(frozen=True)
class Row:
    row: str
    size: int

    def __str__(self):
        return f"{self.row} of {self.size}"


def measure(row):
    return {"row": row.row, "ms": 12 / row.size}


LINE = "{row} {ms}".format_map


def measured(file):
    rows = json.loads(file.read_text())
    assert all(row.pop("took_s") >= 0 for row in rows)
    return rows


def test_a_row_that_fails_costs_no_other_and_the_exit_status_tells(tmp_path, capsys):
    rows, file = [Row("a1", 3), Row("b", 4), Row("a2", 0), Row("a3", 6)], tmp_path / "new" / "rows.json"
    assert measure_all(rows, ["a*"], measure, LINE, file) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[::2] == ["a1 4.0", "a3 2.0"] and told[1].startswith("a2 of 0: FAILED ZeroDivisionError")
    assert measured(file) == [{"row": "a1", "ms": 4.0}, {"row": "a3", "ms": 2.0}]
    assert measure_all(rows, ["b"], measure, LINE, None) == 0


def test_each_row_is_written_before_the_next_is_measured(tmp_path):
    file, seen = tmp_path / "rows.json", []

    def measure_and_look(row):
        seen.append([x["row"] for x in records.read(file)])
        return measure(row)

    measure_all([Row("a", 1), Row("b", 1), Row("c", 1)], ["*"], measure_and_look, LINE, file)
    assert seen == [[], ["a"], ["a", "b"]]


def test_rows_are_chosen_by_name_or_by_their_whole_text(capsys):
    rows = [Row("a", 1), Row("a", 2), Row("b", 3)]
    assert measure_all(rows, ["a of 2", "b"], measure, LINE, None) == 0
    assert capsys.readouterr().out == "a 6.0\nb 4.0\n"
    with pytest.raises(UserError, match=r"--rows c d\*: no row has such a name; there are a, b"):
        measure_all(rows, ["c", "d*"], measure, LINE, None)


def test_a_row_takes_the_place_of_the_same_and_the_others_stay(tmp_path):
    file = tmp_path / "rows.json"
    old = [
        {"row": "a", "context": 1, "ms": 1}, {"row": "a", "context": 2, "ms": 2, "by": "hand"},
        {"row": "a", "context": 2, "mesh": {"x": 1, "y": 2}, "ms": 3},
    ]  # fmt: skip
    file.write_text(json.dumps(old))
    merge(file, {"row": "a", "context": 2, "ms": 9})
    merge(file, {"row": "a", "context": 2, "mesh": {"y": 2, "x": 1}, "ms": 8})
    merge(file, {"row": "a", "context": 3, "ms": 7})
    found = json.loads(file.read_text())
    assert found == [
        old[0], {"row": "a", "context": 2, "ms": 9}, {"row": "a", "context": 2, "mesh": {"x": 1, "y": 2}, "ms": 8},
        {"row": "a", "context": 3, "ms": 7},
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [file]


def test_rows_that_come_at_once_are_all_kept(tmp_path):
    file = tmp_path / "rows.json"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = [pool.submit(merge, file, {"row": "a", "context": i}) for i in range(40)]
    assert [one.exception() for one in done] == [None] * 40
    assert sorted(row["context"] for row in records.read(file)) == list(range(40))


@pytest.mark.parametrize(("text", "what"), [('{"rows": []}', "wanted a list of rows"), ("[1, ", "wanted rows as JSON")])
def test_a_file_of_something_else_is_refused_before_anything_is_measured(text, what, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: {what}"):
        measure_all([Row("a", 1)], ["*"], lambda row: pytest.fail("measured"), LINE, file)
    assert file.read_text() == text


def test_what_the_user_can_put_right_is_not_a_row_that_failed():
    def refuse(row):
        raise UserError("a context of 1, wanted 2")

    with pytest.raises(UserError, match="wanted 2"):
        measure_all([Row("a", 1)], ["*"], refuse, LINE, None)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a file of kernels, whose state `records.commit` tells."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.delenv(records.COMMIT, raising=False)
    (tmp_path / "kernels_pallas").mkdir()
    (tmp_path / "kernels_pallas" / "scan.py").write_text("a")
    author = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    records.commit.cache_clear()
    yield tmp_path
    records.commit.cache_clear()


def test_a_figure_says_of_which_code_it_is_and_when(checkout):
    clean = records.device()
    assert clean["device"] == jax.devices()[0].device_kind and re.fullmatch("[0-9a-f]{4,}", clean["commit"])
    assert re.fullmatch(r"2\d{3}(-\d\d){2}T\d\d(:\d\d){2}Z", clean["date"])
    (checkout / "bench" / "results").mkdir(parents=True)
    (checkout / "bench" / "results" / "rows.json").write_text("[]")  # what is measured changes no code
    records.commit.cache_clear()
    assert records.commit() == clean["commit"]
    (checkout / "kernels_pallas" / "scan.py").write_text("b")
    records.commit.cache_clear()
    assert records.commit() == clean["commit"] + "+"


def test_a_copy_without_a_repository_has_the_commit_that_it_is_told(checkout, monkeypatch):
    monkeypatch.setattr(records, "ROOT", checkout / "kernels_pallas")  # the repository around it is another one
    assert records.commit() is None
    monkeypatch.setenv(records.COMMIT, "abc1234")
    records.commit.cache_clear()
    assert records.commit() == "abc1234"


def test_what_json_does_not_have_is_null():
    nested = {"a": [1.23456789, float("nan")], "b": (float("-inf"), 7, "text", None)}
    assert plain(nested, 5) == {"a": [1.2346, None], "b": [None, 7, "text", None]}


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("before")
    with contextlib.suppress(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    with whole_file(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
