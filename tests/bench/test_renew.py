"""Jobs on GPUs that are not there: processes that write rows, fail, hang and die. 3 s, most of it starts of Python."""

import contextlib
import dataclasses
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest

from bench import UserError, records
from bench.__main__ import main as bench
from bench.renew import command, process, queue
from bench.renew.job import Figure, Job
from tests.gpu.gpus import take_one

STARTED = time.monotonic()
# A row after the other, as its name says. Where one hangs, what it prints makes the clock of these tests jump.
PROCESS = """
import argparse, datetime, json, os, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--rows", nargs="*", default=[])
parser.add_argument("--json")
args = parser.parse_args()
failed = poisoned = False
for name in args.rows:
    if "hang" in name:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        print("child", child.pid, flush=True)
        time.sleep(60)
    if "wait" in name:
        print("pid", os.getpid(), flush=True)
        time.sleep(60)
    if "die" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "refuse" in name:
        sys.exit("no such library")
    poisoned |= "poison" in name
    if "fail" in name or poisoned:
        print(name + ": FAILED ValueError('wrong')", flush=True)
        failed = True
        continue
    rows = json.load(open(args.json)) if os.path.exists(args.json) else []
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    rows = [row for row in rows if row["row"] != name]
    rows.append({"row": name, "date": date, "gpus": gpus, "cores": len(os.sched_getaffinity(0))})
    json.dump(rows, open(args.json + ".new", "w"))
    os.rename(args.json + ".new", args.json)
    print(name, flush=True)
sys.exit(failed)
"""


def job(name, *rows, gpus=1, seconds=1.0, start_s=1.0, **options):
    figures = tuple(Figure(name=row, fields={"row": row}, seconds=seconds) for row in rows)
    file = f"{name.split(':')[-1]}.json"
    return Job(
        name=name, arguments=("-S", "-c", PROCESS), figures=figures, file=file, code=(), gpus=gpus, start_s=start_s,
        **options,
    )  # fmt: skip


def printed(log, what):
    """The numbers of processes that jobs have printed."""
    found = re.findall(rf"^{what} (\d+)\n", log.read_text(), re.MULTILINE) if log.exists() else []
    return [int(pid) for pid in found]


def is_gone(pid):
    """In a moment, at the latest."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.01)
                continue
        return True
    return False


class Clock:
    """Runs on by an hour whenever a process has said that it is stuck, and this has been read."""

    def __init__(self, logs):
        self.logs, self.said, self.jumped = logs, 0, 0

    def monotonic(self):
        return time.monotonic() + self.jumped

    def sleep(self, _):
        time.sleep(0.01)
        self.jumped = 3600 * self.said
        self.said = sum(len(printed(file, "child")) for file in self.logs.glob("*.log"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two GPUs, as far as jobs can tell."""
    clock = Clock(tmp_path)
    for module in (process, queue):
        monkeypatch.setattr(module, "time", clock)
    return queue.Place(gpus=("3", "5"), ends_at=None, results=tmp_path, logs=tmp_path, environment=dict(os.environ))


def run(jobs, place, **options):
    said = []
    ended, waiting = queue.run(jobs, place, said.append, **options)
    return [(end.job.name, end.how, [f.name for f in end.measured]) for end in ended], waiting, "\n".join(said)


def rows(place, name):
    return {row["row"]: row for row in records.read(place.results / f"{name}.json")}


def test_a_row_that_hangs_or_fails_or_dies_costs_no_other(place):
    ended, waiting, said = run([job("gpu:x", "a", "b-hang", "c", "d-fail", "e-die", "f")], place)
    assert ended == [("gpu:x", "hung", ["a"]), ("gpu:x", "failed", ["c"]), ("gpu:x", "measured", ["f"])]
    assert set(rows(place, "x")) == {"a", "c", "f"} and not waiting
    assert "no line for 36" in said and "4 rows begin again" in said
    assert "  gpu:x: d-fail: FAILED ValueError('wrong')" in said and "SIGSEGV, the last line: d-fail" in said


def test_rows_that_fail_after_another_get_a_process_of_their_own_once(place):
    ended, _, said = run([job("gpu:x", "a", "b-poison", "c", "d"), job("gpu:y", "a-fail", "b-fail", "c-fail")], place)
    assert ended.count(("gpu:x", "failed", ["a"])) == ended.count(("gpu:x", "measured", ["c", "d"])) == 1
    assert ended.count(("gpu:y", "failed", [])) == 2 and len(ended) == 4
    assert said.count("c-fail: FAILED") == 4  # of each process as it came and as the reason


def test_what_comes_to_no_row_is_not_begun_again(place):
    ended, _, said = run([job("peers", "a-refuse", "b"), job("layer:x", "a", "b", takes_rows=False)], place)
    assert sorted(ended) == [("layer:x", "failed", []), ("peers", "failed", [])]
    assert "0 of 2 rows" in said and "no such library" in said and "2 rows are not in x.json" in said


def test_what_is_left_of_a_job_that_comes_to_no_row_is_not_begun(place):
    place = dataclasses.replace(place, ends_at=time.monotonic() + 100)
    ended, waiting, _ = run([job("peers", "a-refuse", "b", "c", seconds=60, gpus=2)], place)
    assert ended == [("peers", "failed", [])] and [f.name for f in waiting[0].figures] == ["b", "c"]


def test_what_a_job_has_started_ends_with_it(place):
    run([job("gpu:x", "a-hang")], place)
    (pid,) = printed(place.logs / "gpu-x.log", "child")
    assert is_gone(pid)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # that it has not been waited for
def test_gpus_of_a_process_that_cannot_be_killed_are_left_to_it(place, monkeypatch):
    killpg = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    monkeypatch.setattr(process, "_GONE_S", 0.01)
    ended, waiting, said = run([job("gpu:x", "a-hang"), job("sharded:y", "a", gpus=2), job("gpu:z", "a")], place)
    (pid,) = re.findall(r"process (\d+) does not end", said)
    killpg(int(pid), signal.SIGKILL)
    assert sorted(ended) == [("gpu:x", "hung", []), ("gpu:z", "measured", ["a"])]
    assert [job.name for job in waiting] == ["sharded:y"]


def test_when_time_is_up_all_ends_and_what_is_measured_stays(place):
    place = dataclasses.replace(place, ends_at=time.monotonic() + 100)
    jobs = [
        job("gpu:z", "a", "b", "c", seconds=30),
        job("gpu:x", "a", "b-hang", gpus=2),
        job("gpu:y", "a", seconds=150),
    ]
    ended, waiting, said = run(jobs, place)
    assert ended == [("gpu:z", "measured", ["a", "b", "c"]), ("gpu:x", "stopped", ["a"])]
    assert [job.name for job in waiting] == ["gpu:y"] and "time is up" in said
    assert set(rows(place, "x")) == {"a"} and not rows(place, "y")


def test_an_interrupt_ends_all_jobs(place):
    log = place.logs / "gpu-x.log"

    def look(_):
        time.sleep(0.01)
        if printed(log, "pid"):
            raise KeyboardInterrupt

    queue.time.sleep = look
    said = []
    with pytest.raises(KeyboardInterrupt):
        queue.run([job("gpu:x", "a", "b-wait")], place, said.append)
    assert set(rows(place, "x")) == {"a"} and "stopped" in said[-1] and "interrupted" in said[-1]
    assert is_gone(*printed(log, "pid"))


def test_each_job_has_gpus_and_cores_of_its_own(place):
    run([job("gpu:x", "a"), job("gpu:y", "a"), job("sharded:z", "a", gpus=2)], place)
    x, y, z = (rows(place, name)["a"] for name in "xyz")
    assert (x["gpus"], y["gpus"], z["gpus"]) == ("3", "5", "3,5")
    n_cores = len(os.sched_getaffinity(0))
    assert z["cores"] == n_cores and x["cores"] + y["cores"] == (n_cores if n_cores > 1 else 2)


def next_of(jobs, place, *running):
    """What is to start beside jobs that still take so long, on so many GPUs each."""
    now = time.monotonic()
    running = [types.SimpleNamespace(gpus=("3",) * n, expected_end=now + seconds) for seconds, n in running]
    free = place.gpus[sum(len(one.gpus) for one in running) :]
    found = queue._next(jobs, running, free, place)
    return found and (jobs[found[0]].name, [figure.name for figure in found[1].figures])


def test_while_a_job_waits_for_gpus_others_run_that_end_before(place):
    two, long = job("two", "a", gpus=2, seconds=50), job("long", "a", seconds=300)
    short, rows = job("short", "a", seconds=60), job("rows", "a", "b", "c", seconds=40)
    assert next_of([two, long], place) == ("two", ["a"])
    assert next_of([two, long, short], place, (100, 1)) == ("short", ["a"])
    assert next_of([two, long, rows], place, (100, 1)) == ("rows", ["a", "b"])
    assert next_of([two, long], place, (100, 1)) is None
    assert next_of([job("three", "a", gpus=3), long], place, (100, 1)) == ("long", ["a"])


def test_nothing_starts_that_cannot_end_in_time(place):
    place = dataclasses.replace(place, ends_at=time.monotonic() + 100)
    whole, rows = job("whole", "a", "b", seconds=60, takes_rows=False), job("rows", "a", "b", seconds=60)
    assert next_of([whole, rows], place) == ("rows", ["a"])
    assert next_of([whole], place) is None
    assert next_of([job("two", "a", gpus=2, seconds=90), rows], place, (50, 1)) == ("rows", ["a"])  # two is too late


@pytest.fixture
def card(place, monkeypatch, tmp_path):
    """The command with two jobs and results in a folder of its own, where nothing is yet."""
    (tmp_path / "committed").mkdir()
    (tmp_path / "committed" / "x.json").write_text('[{"row": "old"}]')
    monkeypatch.setattr(records, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(command, "jobs", lambda _: [job("gpu:x", "a", "b"), job("gpu:y", "c-fail", takes_rows=False)])
    monkeypatch.setattr(command, "_age_s", lambda: 0.0)  # not that of pytest
    monkeypatch.setattr(command, "_gpus", lambda: [("0", "NVIDIA H200"), ("1", "NVIDIA H200")])
    return ["renew", "--results", str(tmp_path / "new"), "--logs", str(tmp_path)]


def test_one_command_measures_all_and_tells_how_each_job_ended(card, tmp_path, capsys):
    assert bench([*card, "--minutes", "5"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"gpu:x +measured +2 of 2 rows", shown) and re.search(r"gpu:y +failed +0 of 1 rows", shown)
    assert "2 rows measured into" in shown and "1 jobs failed or hung" in shown
    assert [row["row"] for row in records.read(tmp_path / "new" / "x.json")] == ["old", "a", "b"]
    assert records.read(tmp_path / "committed" / "x.json") == [{"row": "old"}]
    assert (tmp_path / "gpu-x.log").read_text().startswith("== 20")


def test_what_there_is_no_time_for_is_named(card, capsys):
    assert bench([*card, "--minutes", "0.18"]) == 0  # of which 10 seconds are left out
    shown = capsys.readouterr().out
    assert shown.count("skipped") == 2 and "for lack of time" in shown and "0 rows measured" in shown


def test_the_commit_is_told_where_git_does_not_know_it(card, monkeypatch, capsys):
    monkeypatch.setattr(records, "commit", lambda: None)
    assert bench([*card, "--plan"]) == 0
    assert "the commit is not known" in capsys.readouterr().out
    places = []
    monkeypatch.setattr(queue, "run", lambda jobs, place, _: (places.append(place), ([], []))[1])
    assert bench([*card, "--commit", "abc1234"]) == 0
    assert "not known" not in capsys.readouterr().out and places[0].environment[records.COMMIT] == "abc1234"


def test_a_signal_that_ends_the_command_ends_its_jobs(card, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "jobs", lambda _: [job("gpu:x", "a-wait")])
    log = tmp_path / "gpu-x.log"

    def look(_):
        time.sleep(0.01)
        if printed(log, "pid"):
            os.kill(os.getpid(), signal.SIGTERM)

    queue.time.sleep = look
    before = signal.getsignal(signal.SIGTERM)
    assert bench(card) == 130
    assert is_gone(*printed(log, "pid")) and signal.getsignal(signal.SIGTERM) is before


def test_minutes_are_counted_from_the_start_of_the_process():
    assert time.monotonic() - STARTED < command._age_s() < 24 * 3600


@pytest.mark.parametrize(("only", "others"), [([], ["gpu:x", "gpu:y"]), (["gpu:y"], ["gpu:y"]), (["tests"], [])])
def test_tests_run_first_and_on_all_gpus(only, others, card, monkeypatch):
    started = []
    monkeypatch.setattr(queue, "run", lambda jobs, *_: (started.extend(jobs), ([], []))[1])
    assert bench([*card, "--tests", *(["--only", *only] if only else [])]) == 0
    assert [(job.name, job.gpus) for job in started] == [("tests", 2), *((name, 1) for name in others)]
    arguments = started[0].command(Path("there"))
    assert arguments[1:6] == ["-m", "pytest", "-m", "gpu", "tests/gpu"] and "--json" not in arguments
    assert "-p no:benchmark" in " ".join(arguments)  # its warning beside xdist would be an error


def test_processes_of_the_tests_take_gpus_in_turn():
    seen = []
    for worker in ("gw0", "gw1", "gw5", None):
        environment = {"CUDA_VISIBLE_DEVICES": "2,7"} | ({"PYTEST_XDIST_WORKER": worker} if worker else {})
        take_one(environment)
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "7", "7", "2,7"]


def test_each_process_has_a_log_of_its_own(place):
    run([job("gpu:x", "a", gpus=2), job("gpu:x", "b", gpus=2)], place)
    logs = [(place.logs / name).read_text().splitlines()[-1] for name in ("gpu-x.log", "gpu-x-2.log")]
    assert logs == ["a", "b"]


def test_gpus_are_those_that_the_environment_leaves(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-ab, NVIDIA H200'\necho '1, GPU-cd, NVIDIA H100 80GB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command._gpus() == [("0", "NVIDIA H200"), ("1", "NVIDIA H100 80GB")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-cd")
    assert command._gpus() == [("GPU-cd", "NVIDIA H100 80GB")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0,7: nvidia-smi shows no 7"):
        command._gpus()
