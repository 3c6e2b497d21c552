"""The memory bench, on a small context."""

import mmap

import pytest

from bench import memory
from bench.__main__ import main

SMALL = ["--context", "4096", "--queries", "2", "--heads", "4", "--dim", "32"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_table_shows_each_method(capsys):
    assert main(["memory", *SMALL]) == 0
    shown = capsys.readouterr().out
    for wanted in ("4,096 keys x 2 queries", "dsa", "hisa", "scan", "block-sparse", "Within the limit of 2 GiB"):
        assert wanted in shown


def test_a_method_over_the_limit_fails_the_command(monkeypatch, capsys):
    footprint = memory.Footprint(inputs_bytes=1, peak_bytes=3 << 29, is_bound=True, compile_ms=1.0, run_ms=1.0)
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: footprint)
    assert main(["memory", "--method", "dsa", "--limit-gib", "1.4"]) == 1
    shown = capsys.readouterr().out
    assert "Over the limit of 1.4 GiB" in shown
    assert "<= 1536.0" in shown
    assert main(["memory", "--method", "dsa", "--limit-gib", "1.6"]) == 0


def test_the_high_water_mark_sees_memory_that_was_given_back():
    size_bytes = 64 << 20
    before_bytes = memory._status_bytes("VmRSS")
    memory._reset_high_water_mark()
    with mmap.mmap(-1, size_bytes) as fresh:  # a heap may have kept as much from before
        for first in range(0, size_bytes, mmap.PAGESIZE):
            fresh[first] = 1
    assert memory._status_bytes("VmHWM") - before_bytes > 0.9 * size_bytes


def test_a_token_in_pages_takes_a_key_a_sketch_and_a_share_of_its_page():
    assert memory.bytes_per_token("float8_e4m3fn", 128, 64) == {"key": 132, "sketch": 72, "page": 12.1875}


def test_more_queries_than_keys_are_refused(capsys):
    assert main(["memory", "--context", "4", "--queries", "5"]) == 2
    assert "--queries 5: must be at most --context 4" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "memory"])
def test_help_names_the_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--context" in capsys.readouterr().out
