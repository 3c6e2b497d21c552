"""Mistakes in functions of somebody else's: each breaks the promise of its name, and the inputs become small."""

import doctest
import functools
import pathlib
import time
import types

import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import testing
from hisa_jax.testing import shrink
from tests.integrations.conformance import PEERS

FLAT = hj.Dsa(topk=3)


def scores_of(q, k, w):
    """[T, H, D], [S, D], [T, H] -> [T, S] float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.einsum("th,ths->ts", w, np.maximum(np.einsum("thd,sd->ths", q, k), 0))


def flat(q, k, w, query_positions=None, lengths=None, *, topk=3, mistake=""):
    """The flat indexer in NumPy, right but for the mistake."""
    q, k = q.astype(np.float32), k.astype(np.float32)
    (B, T), S = q.shape[:2], k.shape[1]
    lengths = np.full(B, S) if lengths is None else np.clip(lengths, 0, S)
    indices, count = np.full((B, T, topk), -1, np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        if mistake == "other sequences":
            k[b] += k[:, :1].mean()
        positions = lengths[b] - T + np.arange(T) if query_positions is None else query_positions[b].astype(int)
        if mistake == "first queries":
            positions = np.arange(T) if query_positions is None else positions
        w_b = np.abs(w[b]) if mistake == "magnitude of weights" else w[b]
        keys = np.where(np.isinf(k[b]), 0, k[b]) if mistake == "no infinity" else k[b]
        keys = keys - keys[: max(1, lengths[b])].mean(0) * 1e-3 if mistake == "mean of all keys" else keys
        keys = keys - keys[lengths[b] :].sum(0) * 1e-3 if mistake == "what was there before" else keys
        if mistake == "by capacity":
            keys = keys * (1 + np.arange(S)[:, None] % 7 * (S > 20))
        scores = scores_of(q[b], keys, w_b)
        if mistake == "by number of queries":
            scores += np.arange(S) % 3 * 0.3 * (T % 2)
        for t in range(T):
            position = max(positions[t], -1)
            position = abs(positions[t]) if mistake == "padding" else position
            visible = max(0, min(position + (2 if mistake == "one more" else 1), lengths[b]))
            visible = min(position + 1, S) if mistake == "no lengths" else visible
            visible = 0 if mistake == "clipping" and positions[t] >= S else visible
            row = scores[t, :visible]
            row = row if mistake == "nan first" else np.where(np.isnan(row), -np.inf, row)
            order = np.argsort(row if mistake == "lowest" else -row, kind="stable")
            if mistake == "higher position":
                order = len(row) - 1 - np.argsort(-row[::-1], kind="stable")
            if mistake == "nan first":
                order = np.argsort(~np.isnan(row)[order], kind="stable") if np.isnan(row).any() else order
            chosen = order[:topk] if mistake == "by score" else np.sort(order[:topk])
            if mistake == "one too few" and visible > topk:
                chosen = chosen[1:]
            if mistake == "last ones" and visible <= topk:
                chosen = chosen[1:]
            if mistake == "twice" and len(chosen) > 1:
                chosen[1] = chosen[0]
            n = len(chosen)
            at = slice(topk - n, topk) if mistake == "right aligned" else slice(n)
            indices[b, t, at], count[b, t] = chosen, n
    return (indices.astype(np.int64), count) if mistake == "int64" else (indices, count)


@pytest.fixture(autouse=True)
def seconds_are_of_this_process(monkeypatch):
    """Else a machine with other work makes nothing small in so many."""
    monkeypatch.setattr(shrink, "time", types.SimpleNamespace(monotonic=time.process_time))


MISTAKES = {
    "int64": "int32", "one more": "causality", "no lengths": "bounds", "twice": "no_duplicates", "by score": "order",
    "right aligned": "padding", "padding": "padding_queries", "one too few": "count", "last ones": "count",
    "mean of all keys": "future", "what was there before": "missing", "by capacity": "capacity",
    "other sequences": "batch", "by number of queries": "chunks", "lowest": "best", "magnitude of weights": "best",
    "higher position": "ties", "nan first": "nan", "no infinity": "infinity", "clipping": "clipping",
}  # fmt: skip
LONG = ("by capacity", "by number of queries", "what was there before")  # as two of their own numbers are compared


def test_a_function_that_keeps_the_contract_passes():
    testing.check_contract(flat, FLAT)
    outcomes = {verdict.promise: verdict.outcome for verdict in testing.check_promises(flat, FLAT)}
    assert list(outcomes) == list(testing.PROMISES)
    assert {name for name, outcome in outcomes.items() if outcome != "kept"} == {"kept_blocks", "flat_if_all_fits"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_broken_promise_is_named(mistake):
    with pytest.raises(testing.ContractError) as caught:
        testing.check_contract(functools.partial(flat, mistake=mistake), FLAT, seconds=2)
    case = caught.value.case
    assert caught.value.promise == MISTAKES[mistake]
    assert case.q.shape[0] <= 2 and case.q.shape[2] <= 2, caught.value
    assert case.k.shape[1] <= 8 or mistake in LONG, caught.value


def test_a_function_that_writes_into_its_inputs_is_judged_by_what_it_was_given():
    def writes(q, k, w, **keywords):
        indices = flat(q, k, w, **keywords)
        for array in (q, k, w, *keywords.values()):
            array[...] = 0
        return indices

    def flips(q, k, w, **keywords):
        w *= -1
        return flat(q, k, w, **keywords)

    testing.check_contract(writes, FLAT)
    with pytest.raises(testing.ContractError, match="the promise 'best' is broken"):
        testing.check_contract(flips, FLAT, seconds=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "method",
    [
        FLAT,
        hj.Hisa(topk=6, block_size=4, block_topk=3),
        hj.BlockSparse(topk=8, block_size=4),
        hj.Scan(topk=4, candidates=8, exact_heads=1),
    ],
)
def test_select_keeps_its_own_contract(method):
    """15 seconds in all; tests/contract.py has the same promises with more cases."""
    select = functools.partial(hj.select, method=method, implementation="xla")
    testing.check_contract(select, method)


FORMS = {
    "masked": testing.Form(padding="masked", order="any"),
    "another number": testing.Form(padding=99),
    "few sizes": testing.Form(sizes={"B": (1,), "T": (1, 4), "S": (16, 64), "H": (2,), "D": (8,)}),
    "no keywords": testing.Form(takes=()),
    "bfloat16": testing.Form(dtype="bfloat16"),
    "float8_e4m3fn": testing.Form(dtype="float8_e4m3fn"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_function_of_another_form_is_judged_by_what_it_selects(name):
    form = FORMS[name]

    def select(q, k, w, **keywords):
        assert set(keywords) <= set(form.takes)
        sizes = dict(zip("BTSHD", (*q.shape[:2], k.shape[1], *q.shape[2:]), strict=True))
        assert all(form.takes_size(axis, size) for axis, size in sizes.items()), sizes
        indices, count = flat(q, k, w, **keywords)
        if name == "masked":  # some tokens that nobody sees, and the best first
            return np.where(indices < 0, 1000, indices)[..., ::-1]
        return (np.where(indices < 0, 99, indices), count) if name == "another number" else indices

    testing.check_contract(select, FLAT, form=form)
    asked = {v.promise for v in testing.check_promises(select, FLAT, form=form) if v.outcome == "kept"}
    assert {"best", "ties", "nan", "count"} <= asked
    assert ("missing" in asked) == ("lengths" in form.takes) and ("order" in asked) == (form.order == "ascending")


def test_the_example_runs():
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(recurse=False).find(testing.check_contract, "example", globs={"hj": hj}):
        assert runner.run(example).failed == 0 and runner.tries


def test_promises_are_left_out_by_name():
    unordered = functools.partial(flat, mistake="by score")
    testing.check_contract(unordered, FLAT, leave_out=["order"])
    testing.check_contract(unordered, FLAT, promises=["ties", "nan"])
    (verdict,) = testing.check_promises(unordered, FLAT, promises=["order"], leave_out=["order"])
    assert verdict.outcome == "left out"
    with pytest.raises(ValueError, match="no promise is called 'sorted', there are int32, "):
        testing.check_contract(flat, FLAT, leave_out=["sorted"])


def test_what_is_no_selection_is_said():
    def fails(q, k, w, **keywords):
        raise KeyError("no such page")

    wrong = {
        "it raised KeyError: 'no such page'": fails,
        r"indices is \[2, 5, 2\], wanted \[2, 5, 3\]": lambda q, k, w, **_: np.zeros((*q.shape[:2], 2), np.int32),
        "indices is float64, wanted int32": lambda q, k, w, **_: np.zeros((*q.shape[:2], 3)),
        "it returned NoneType": lambda q, k, w, **_: None,
        "it returned dict": lambda q, k, w, **_: {},
    }
    for message, function in wrong.items():
        (verdict,) = testing.check_promises(function, FLAT, promises=["int32"])
        assert verdict.outcome == "broken"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(verdict.why)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(takes="lengths"), "wanted a tuple of query_positions, lengths"),
        (dict(order="down"), "wanted one of ascending, any"),
        (dict(padding="none"), "wanted an int or 'masked'"),
        (dict(dtype="float16"), "wanted one of float32"),
        (dict(takes=None), "wanted a tuple of query_positions, lengths"),
        (dict(tolerance=0), "wanted a number above 0"),
        (dict(tolerance="1e-5"), "wanted a number above 0"),
        (dict(sizes={"B": 1}), "wanted tuples of positive ints for any of"),
        (dict(sizes=[64]), "wanted tuples of positive ints for any of"),
        (dict(sizes={"N": (1,)}), "wanted tuples of positive ints for any of B, T, S, H, D"),
    ],
)
def test_a_form_is_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        testing.Form(**wrong)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="function is int"):
        testing.check_contract(3, FLAT)
    with pytest.raises(TypeError, match="method is int"):
        testing.check_contract(flat, 4)
    with pytest.raises(TypeError, match="form is dict"):
        testing.check_contract(flat, FLAT, form={})
    for name, wrong in (("promises", "ties"), ("leave_out", 3)):
        with pytest.raises(TypeError, match=f"{name} is {wrong!r}, wanted a list of names of promises"):
            testing.check_contract(flat, FLAT, **{name: wrong})
    for name, wrong, wanted in (("seed", "a", "an int"), ("seconds", "a", "a number")):
        with pytest.raises(TypeError, match=f"check_contract: {name} is str, wanted {wanted}"):
            testing.check_contract(flat, FLAT, **{name: wrong})
    with pytest.raises(ValueError, match="without functions of its own"):
        testing.check_contract(flat, hj.Dsa(topk=3, token_score=lambda q, k, w: k[:, 0]))


def test_the_table_of_other_projects_says_what_was_found():
    """`python -m tests.integrations.conformance` fails where a project no longer breaks these promises."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "conformance.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    header = next(cells for cells in lines if cells[0] == "promise")
    peers = {name: peer for of_project in PEERS.values() for name, peer in of_project.items()}
    assert header[2:] == list(peers)
    rows = {cells[0].strip("`"): cells[1:] for cells in lines if cells[0].strip("`") in testing.PROMISES}
    assert set(testing.PROMISES) - set(rows) == {"kept_blocks", "flat_if_all_fits"}  # of other methods
    for promise, (sentence, *kept) in rows.items():
        assert sentence == testing.PROMISES[promise].sentence
        for peer, cell in zip(peers.values(), kept, strict=True):
            assert (cell == "**no**") == (promise in peer.broken), (promise, peer)
