"""What is written down of measurements."""

import contextlib
import dataclasses
import json

from bench.records import measure_all, plain, whole_file


@dataclasses.dataclass(frozen=True)
class Row:
    row: str
    size: int

    def __str__(self):
        return f"{self.row} of {self.size}"


def test_a_row_that_fails_costs_no_other_and_the_exit_status_tells(tmp_path, capsys):
    rows, file = [Row("a1", 3), Row("b", 4), Row("a2", 0), Row("a3", 6)], tmp_path / "new" / "rows.json"

    def measure(row):
        return {"row": row.row, "ms": 12 / row.size}

    assert measure_all(rows, "a*", measure, "{row} {ms}".format_map, file) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[::2] == ["a1 4.0", "a3 2.0"] and told[1].startswith("a2 of 0: FAILED ZeroDivisionError")
    assert json.loads(file.read_text()) == [{"row": "a1", "ms": 4.0}, {"row": "a3", "ms": 2.0}]
    assert measure_all(rows, "b", measure, "{row} {ms}".format_map, None) == 0


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
