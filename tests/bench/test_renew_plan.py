"""The table of jobs, and in which order they run. 3 s, most of it imports."""

import argparse
import ast
import dataclasses
import fnmatch
import functools
import importlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench import UserError, records, shapes, sharded
from bench.__main__ import COMMANDS
from bench.__main__ import main as bench
from bench.gpu.rows import rows as gpu_rows
from bench.layer import command as layer
from bench.renew import jobs as table
from bench.renew import plan as plan_module
from bench.renew.job import Figure, Job
from bench.renew.plan import CURRENT, MISSING, OLDER, UNKNOWN, find, only, plan, state

ROOT = records.ROOT
ALL = table.jobs()


def parsed(job):
    """What a job's command makes of its arguments, as `python -m bench` reads them."""
    python, m, package, name, *options = job.command(Path("there"))
    assert (m, package) == ("-m", "bench") and Path(python).exists()
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name].where).add_arguments(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize("job", ALL, ids=lambda job: job.name)
def test_the_command_of_a_job_measures_its_rows_into_its_file(job):
    args = parsed(job)
    assert (args.out if job.kind == "serve" else args.json) == Path("there") / job.file
    names = [figure.name for figure in job.figures]
    if job.kind in ("gpu", "peers"):
        assert args.rows == names and set(names) <= {str(row) for row in gpu_rows()}
    elif job.kind == "sharded":
        assert names == [row.row for row in sharded.rows(tuple(args.devices))] and job.gpus == max(args.devices)
    elif job.kind == "layer":
        assert names == [str(layer.Row(x, method)) for x in layer.settings(args) for method in args.methods]
    elif job.kind == "serve":
        assert names == [f"{method} {shapes.label(n)}" for method in args.methods for n in args.contexts]
        assert (args.config, args.layers, args.attention_only) == ("deepseek-v3.2", 2, True)
        assert job.gpus == (1 if args.mesh is None else max(args.mesh)) and args.rows == 4
        assert [f.fields["mesh"] and tuple(f.fields["mesh"].values()) for f in job.figures] == [args.mesh] * len(names)
    else:
        assert job.kind == "lighthouse" and names == [f"lighthouse-{n}" for n in args.contexts]


def test_every_row_of_the_gpu_bench_is_of_one_job():
    counts = Counter(figure.name for job in ALL if job.kind == "gpu" for figure in job.figures)
    assert counts == Counter(str(row) for row in gpu_rows())
    assert len({job.name for job in ALL}) == len(ALL)


def test_figures_find_the_rows_that_are_committed_and_no_others():
    found = {}
    for job in ALL:
        rows = records.read(records.RESULTS / job.file)
        for figure in job.figures:
            matching = [row for row in rows if find(figure, [row])]
            assert len(matching) <= 1, f"{job.name}: {figure.name} has {len(matching)} rows"
            found[job.name] = found.get(job.name, 0) + len(matching)
    # At least these: a later measurement may add others.
    least = {
        "gpu:attention": 24, "lighthouse": 4, "layer:decode32": 2, "sharded:2": 18, "peers": 26, "gpu:flat": 5,
        "serve:hisa": 3,
    }  # fmt: skip
    assert {name: n for name, n in least.items() if found[name] < n} == {}


KERNELS = ROOT / "kernels_pallas"
RUNS = {
    table.ATTENTION: "mosaic_gpu/sparse_mla triton/sparse_mla triton/sparse_attention",
    table.FLAT_AND_HISA: "mosaic_gpu/flat mosaic_gpu/refine mosaic_gpu/merge mosaic_gpu/topk_few triton/pool_scores",
    table.SELECTION: "mosaic_gpu/scan mosaic_gpu/scan_sketch triton/scan_heads triton/units triton/append",
}


@functools.cache
def imported_by(path):
    """The files of kernels that one imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hisa_jax.kernels_pallas"):
            where = KERNELS.joinpath(*node.module.split(".")[2:])
            found += [where.with_suffix(".py"), *(where / f"{alias.name}.py" for alias in node.names)]
    return found


@pytest.mark.parametrize("code", RUNS, ids=["attention", "flat and HISA", "selection"])
def test_a_file_that_a_row_runs_makes_its_figure_older(code):
    """Kernels of these rows import no file that is left out of their code."""
    todo = [KERNELS / f"{name}.py" for name in RUNS[code].split()]
    seen = set()
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        todo += imported_by(path)
    assert len(seen) > 5
    left_out = [spec.removeprefix(":!") for spec in code if spec.startswith(":!kernels")]
    for path in seen:
        name = str(path.relative_to(ROOT))
        assert not [spec for spec in left_out if fnmatch.fnmatch(name, spec)], name


def test_what_is_left_out_of_the_code_of_figures_is_there():
    for path in {spec.removeprefix(":!") for job in ALL for spec in job.code}:
        assert "*" in path or (ROOT / path).exists(), path
    for name in (*table.OF_ATTENTION, *table.OF_SELECTION):
        assert any(KERNELS.rglob(name)), name


def job(name, *rows, takes_rows=True, file="rows.json", code=("kernels_pallas",)):
    figures = tuple(Figure(name=row, fields={"row": row}, seconds=10) for row in rows)
    return Job(name=name, arguments=(), figures=figures, file=file, code=code, takes_rows=takes_rows, start_s=5)


def write(folder, *rows):
    (folder / "rows.json").write_text(json.dumps(rows))


def test_what_is_not_there_or_of_other_code_comes_first(tmp_path):
    write(
        tmp_path, {"row": "a", "commit": "abc1234", "date": "2026-11-30T04:00:00Z", "took_s": 3}, {"row": "b"},
        {"row": "c", "commit": "abc1234"}, {"row": "d", "commit": "abc1234+"},
    )  # fmt: skip
    planned = plan(
        [job("x", "a", "b", "new"), job("y", "c", takes_rows=False), job("z", "c", "d", takes_rows=False)],
        [tmp_path / "new", tmp_path],
        "abc1234",
    )
    shown = [(part.job.name, [figure.name for figure in part.job.figures], part.is_due) for part in planned]
    assert shown == [
        ("x", ["b", "new"], True), ("z", ["c", "d"], True), ("x", ["a"], False), ("y", ["c"], False)
    ]  # fmt: skip
    assert planned[0].count == f"1 {MISSING}, 1 {UNKNOWN}" and planned[1].states == (CURRENT, OLDER)
    assert planned[2].job.seconds == 8 and planned[2].dates == ("2026-11-30T04:00:00Z",)


def test_figures_of_another_device_are_not_there(tmp_path):
    write(tmp_path, {"row": "a", "device": "H100", "date": "2026-11-30"}, {"row": "a", "device": "H200"})
    assert plan([job("x", "a")], [tmp_path], None, "H200")[0].states == (UNKNOWN,)
    assert plan([job("x", "a")], [tmp_path], None, "B200")[0].states == (MISSING,)


def test_a_figure_is_older_if_a_file_differs_that_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    for folder in ("kernels_pallas/scan.py", "kernels_pallas/flat.py"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).write_text("a")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    records.commit.cache_clear()
    commit = records.commit()
    records.commit.cache_clear()
    row, every = {"commit": commit}, ["kernels_pallas"]
    assert state(row, every, commit) == state(row, every, "0123456") == CURRENT
    (tmp_path / "kernels_pallas/scan.py").write_text("b")
    without_scan = [*every, ":!kernels_pallas/scan*", ":!kernels_pallas/*/scan*"]
    here = commit + "+"
    plan_module._compared.cache_clear()
    assert state(row, every, here) == OLDER and state(row, without_scan, here) == CURRENT
    assert state({"commit": "0123456"}, without_scan, here) == UNKNOWN
    assert state({"commit": here}, without_scan, here) == OLDER


def test_jobs_and_rows_are_chosen_by_name():
    every = [job("gpu:flat", "flat:8K", "flat:1M"), job("layer:decode", "flat:8K", takes_rows=False), job("peers", "a")]
    chosen = only(every, ["gpu:*1M", "layer*"])
    assert [(x.name, [f.name for f in x.figures]) for x in chosen] == [
        ("gpu:flat", ["flat:1M"]), ("layer:decode", ["flat:8K"])
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--only layer:flat\*: no job or row.*jobs are gpu:flat, layer:decode, peers"):
        only(every, ["peers", "layer:flat*"])


def test_a_job_gives_the_rows_that_end_in_the_time_there_is():
    every = job("x", "a", "b", "c")
    assert every.within(35) is every and every.within(14) is None
    assert [figure.name for figure in every.within(34).figures] == ["a", "b"]
    assert dataclasses.replace(every, takes_rows=False).within(34) is None


def test_the_plan_needs_no_gpu(capsys):
    """Which of the committed rows are due, and so come first, changes with every run on a GPU."""
    assert bench(["renew", "--plan", "--only", "gpu:flat*", "serve:dsa:model=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    jobs = {line.split()[0]: line for line in lines[1:-1]}
    assert jobs.keys() == {"gpu:flat", "gpu:flat_decode", "serve:dsa:model=2"}
    said = re.compile("not there|older than the code|of code that is not known|of this code")
    assert all(said.search(line) for line in jobs.values()) and re.match(r"\d+ of 14 rows are due", lines[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs an NVIDIA GPU, nvidia-smi shows none here; --plan needs none"),
        (["--only", "gpu:flut", "--plan"], "--only gpu:flut: no job or row has such a name"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert bench(["renew", *options]) == 2
    assert message in capsys.readouterr().err
