"""The fuzz finds faults that are put in, makes them small, and draws the same cases again. Some 25 s of compiling."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import hisa_jax as hj
from bench.__main__ import main
from bench.fuzz import command, draw, judges, mla, setups
from hisa_jax import layout
from hisa_jax.xla import attention, stages, topk

pytestmark = pytest.mark.unoptimised
SIZES = dict(R=2, T=4, S=40, H=2, D=8)
DSA = setups.Setup(method=hj.Dsa(topk=5), page_size=None, **SIZES)  # of few programs


@pytest.fixture(autouse=True)
def compiled_anew():
    """What was compiled before a fault does not have it, and what was compiled with one must not stay."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def fuzzed(setup, tmp_path, cases=12, judge=""):
    """Counts after some cases, no more than the first that this judge, or any, finds wrong."""
    counts = command.Counts()
    for i in range(cases):
        command.judge_case(setup, 0, i, counts, tmp_path, Console(file=io.StringIO()))
        if any(judge in ("", line.judge) for line in counts.wrong):
            break
    return counts


def ties_to_the_higher_position(monkeypatch):
    right = topk.chosen_mask
    monkeypatch.setattr(topk, "chosen_mask", lambda image, k: right(image[:, ::-1], k)[:, ::-1])
    return DSA


def one_token_too_many_visible(monkeypatch):
    right = layout.visible_tokens
    for module in (layout, sys.modules["hisa_jax.select"]):  # the package has the function of this name
        monkeypatch.setattr(module, "visible_tokens", lambda positions, lengths: right(positions + 1, lengths))
    return DSA


def a_forgotten_scale(monkeypatch):
    right = stages.scores
    monkeypatch.setattr(stages, "scores", lambda q, k, w, **options: right(q, k._replace(scales=None), w, **options))
    return dataclasses.replace(DSA, q_dtype="int8", k_dtype="int8", scale="float32")


def pages_in_the_order_of_their_ids(monkeypatch):
    right = layout.Paged.rows
    monkeypatch.setattr(
        layout.Paged, "rows", lambda self, positions: right(self._replace(pages=jnp.sort(self.pages)), positions)
    )
    return dataclasses.replace(DSA, page_size=16)


def latents_of_no_token(monkeypatch):
    right = attention._gather

    def gather(kv, b, indices, dtype):
        return kv[b, jnp.clip(indices, 0, kv.shape[1] - 1)], right(kv, b, indices, dtype)[1]

    monkeypatch.setattr(attention, "_gather", gather)
    return setups.MlaSetup(R=2, T=3, S=16, N=2, K=5, key_dim=6, value_dim=4, page_size=8)


FAULTS = [  # and a judge that must see it
    (ties_to_the_higher_position, "oracle"),
    (one_token_too_many_visible, "oracle"),
    (a_forgotten_scale, "oracle"),
    (pages_in_the_order_of_their_ids, "family"),
    (latents_of_no_token, ""),
]


@pytest.mark.gate("one_token_too_many_visible", "latents_of_no_token")
@pytest.mark.parametrize(("fault", "judge"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_found_and_made_small(fault, judge, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_MOST_SHOWN", 1)
    setup = fault(monkeypatch)
    counts = fuzzed(setup, tmp_path, judge=judge)
    assert any(judge in ("", line.judge) for line in counts.wrong)
    found = counts.faults
    file = found[0]["file"]
    with open(file) as program:
        source = program.read()
    assert len(source.splitlines()) < 150
    if fault is a_forgotten_scale:  # one of them is enough to compile once more
        exec(compile(source, file, "exec"), {})
        assert "Selection(" in capsys.readouterr().out
    if isinstance(setup, setups.Setup) and found[0]["line"]["form"] == "select":
        (shape,) = {line for line in source.splitlines() if line.startswith("k0 = ")}
        assert len(shape) < 700  # a few numbers


@pytest.mark.exhaustive  # the gate runs the command, which finds nothing
def test_without_a_fault_nothing_is_found_and_a_case_is_the_same_again(tmp_path):
    setup = dataclasses.replace(DSA, method=hj.Hisa(topk=5, block_size=4, block_topk=3))
    counts = fuzzed(setup, tmp_path, cases=8)
    assert counts.cases == 8 and counts.n_rows > 60 and not counts.wrong and not list(tmp_path.iterdir())
    again = fuzzed(setup, tmp_path, cases=8)
    assert again.rows == counts.rows
    one, other = (vars(draw.scene(setup, 5)) for _ in range(2))
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_the_command_counts_and_fails_where_something_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_MOST_SHOWN", 1)
    monkeypatch.setattr(setups, "all_of", lambda implementation, devices: [DSA])
    options = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "fuzz.json")]
    assert main(["fuzz", "--cases", "3", *options]) == 0
    row = json.loads((tmp_path / "fuzz.json").read_text())
    assert row["cases"] == 3 and row["wrong"] == 0 < row["rows"] < row["judgements"]
    one_token_too_many_visible(monkeypatch)
    jax.clear_caches()
    assert main(["fuzz", "--cases", "6", *options]) == 1
    row = json.loads((tmp_path / "fuzz.json").read_text())
    assert row["wrong"] > 0 and "sees nothing" in row["faults"][0]["why"]
    assert "rows against the oracle" in capsys.readouterr().out


def test_every_kind_of_value_is_drawn_for_every_setup():
    for setup in setups.all_of("xla"):
        if isinstance(setup, setups.Setup):
            drawn = [draw.scene(setup, seed) for seed in range(40)]
            assert len({scene.data.split(",")[0] for scene in drawn}) > 8
            assert any(scene.positions is not None for scene in drawn) and any((s.n_k == 0).any() for s in drawn)
        else:
            assert len({mla.scene(setup, seed).data for seed in range(30)}) > 5


def test_of_equal_candidates_the_first_must_be_chosen():
    groups = np.array([0, 1, 0, 2, 1, 0])
    for chosen, broken in (([1, 1, 1, 0, 0, 0], None), ([0, 0, 1, 1, 0, 0], (0, 2)), ([1, 0, 1, 1, 1, 0], (1, 4))):
        assert judges._out_of_order(groups, np.array(chosen, bool)) == broken


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "-1"], ["--minutes", "nan"]])
def test_a_fuzz_of_no_time_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        main(["fuzz", *options])
    assert "wanted a number above 0" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path, capsys):
    assert main(["fuzz", "--json", str(tmp_path / "missing" / "fuzz.json")]) == 2
    assert "is no folder" in capsys.readouterr().err
