"""Faults in the files of a checkpoint: 150 in the gate; all of them with `-m exhaustive`."""

import random

import pytest

from bench import __main__ as command
from bench.files import command as files
from bench.files.faults import CONFIG, INDEX, SHARD, TOKENIZER, Fault, edit_json, faults

SECONDS, MIB = 60, 1024


def assert_all_are_right(results):
    wrong = [f"{r.fault.name}: {r.outcome}: {r.error:.300}" for r in results if not r.is_right]
    assert not wrong, "\n".join(wrong)
    largest = max(results, key=lambda result: result.peak_bytes)
    assert largest.peak_bytes < MIB * 2**20, f"{largest.fault.name} takes {largest.peak_bytes >> 20} MiB"


def test_a_fault_in_a_file_ends_in_a_named_error_or_in_the_same_model():
    chosen = random.Random(1).sample(faults(1), 150)
    results = files.try_all(chosen, SECONDS)
    assert_all_are_right(results)
    assert {result.fault.file for result in results} == {CONFIG, INDEX, SHARD, TOKENIZER}
    ends = [result.outcome for result in results]
    assert ends.count("refused") > 125 and ends.count("harmless") > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_every_fault_ends_in_a_named_error_or_in_the_same_model(seed):
    assert_all_are_right(files.try_all(faults(seed), SECONDS))


def test_the_same_seed_makes_the_same_faults():
    first, again, other = ([fault.name for fault in faults(seed)] for seed in (4, 4, 5))
    assert first == again and first != other and len(first) > 1000


def set_key(name, value):
    return lambda folder: edit_json(folder / CONFIG, lambda keys: keys.update({name: value}))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault("another choice", CONFIG, set_key("norm_topk_prob", False)), "another model"),
        (Fault("another key", CONFIG, set_key("hidden_size", "48"), "rms_norm_eps"), "an error that does not name rms"),
        (Fault("nothing", CONFIG, lambda folder: None), "harmless"),
        (Fault("a number as text", CONFIG, set_key("hidden_size", "48"), "hidden_size"), "refused"),
    ],
)
def test_ends_are_told_apart(fault, outcome):
    assert files.try_all([fault], SECONDS)[0].outcome.startswith(outcome)


def test_bare_errors_and_loads_without_end_are_told_apart(monkeypatch):
    load, calls = files._load, []

    def failing(folder):
        calls.append(folder)
        if len(calls) == 1:
            return load(folder)
        if len(calls) == 2:
            raise KeyError("vocab_size")
        while True:
            pass

    monkeypatch.setattr(files, "_load", failing)
    results = files.try_all([Fault("none", CONFIG, lambda folder: None)] * 2, 0.1)
    assert [result.outcome for result in results] == ["a bare KeyError", "a bare TimeoutError"]
    assert not any(result.is_right for result in results)


def test_the_command_prints_how_faults_ended(capsys):
    assert command.main(["files", "--faults", "30", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "30 faults, seed 3: 0 wrong" in printed and "refused" in printed and "most memory" in printed
