"""`hisa-jax check-dump`: right dumps pass, wrong ones are explained, others are refused by name."""

import re

import ml_dtypes
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.__main__ import main

T, S, H, D, K = 40, 200, 4, 16, 24


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (T, H, D), "k": (S, D), "w": (T, H)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def selected(q, k, w, *, later=0, act=lambda x: np.maximum(x, 0), lengths=S):
    """[T, K] as a top-k gives them: the best first."""
    indices = np.full((T, K), -1, np.int64)
    for t in range(T):
        n = lengths - T + t + 1 + later
        scores = w[t] @ act(q[t].astype(np.float32) @ k[:n].astype(np.float32).T)
        best = np.argsort(-scores, kind="stable")[:K]
        indices[t, : len(best)] = best
    return indices


@pytest.fixture
def judge(tmp_path, capsys):
    """(arguments, **arrays) -> exit status, what was printed."""

    def run(*arguments, **saved):
        file = tmp_path / "dump.npz"
        np.savez(file, **saved)
        code = main(["check-dump", str(file), *arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_right_dumps_pass_in_every_form(judge):
    given = arrays()
    code, said = judge(**given, indices=selected(**given))
    assert code == 0 and "more than 24 visible tokens: 40 of 40 queries right" in said
    batch = {name: array[None] for name, array in (given | {"indices": np.sort(selected(**given))}).items()}
    assert judge(**batch)[0] == 0
    # bfloat16 as NumPy saves it; a shorter sequence; the flat indexer's rows where few tokens are visible.
    given["q"] = given["q"].astype(ml_dtypes.bfloat16)
    code, said = judge(**given, indices=selected(**given, lengths=50), lengths=np.array(50))
    assert code == 0 and "no more than 24 visible tokens: 14 of 14" in said and "filled up by -1" in said


def test_hisa_is_judged_by_its_own_candidates(judge):
    given = arrays()
    method = hj.Hisa(topk=K, block_size=16, block_topk=4)
    indices = np.asarray(hj.select(*(x[None] for x in given.values()), method).indices[0])
    options = ("--indexer", "hisa", "--block-size", "16", "--block-topk", "4")
    assert judge(*options, **given, indices=indices)[0] == 0
    assert judge(**given, indices=indices)[0] == 1


def test_more_tokens_than_topk_are_said(judge):
    given = arrays()
    code, said = judge("--topk", "16", **given, indices=selected(**given))
    assert code == 1 and "24 tokens were chosen, and topk is 16" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[1], "a token twice: 1 of all lists, the first at b=0, t=3, position 163"),
        (lambda row: 164, "a token that is not visible: 1 of all lists, the first at b=0, t=3"),
        (lambda row: -1, "too few tokens: 1 of all lists, the first at b=0, t=3"),
    ],
)
def test_one_wrong_list_of_many_is_found_whichever_are_judged_by_scores(judge, change, message):
    given = arrays()
    indices = selected(**given)
    code, said = judge("--queries", "1", **given, indices=indices)
    assert code == 0 and "by scores 1 of 40 queries are judged" in said
    indices[3, 0] = change(indices[3])
    code, said = judge("--queries", "1", **given, indices=indices)
    assert code == 1 and message in said and "The selections follow" not in said


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (dict(act=lambda x: x), "no relu"),
        (dict(later=-1), "the query itself not visible"),
        (dict(lengths=S - 1), "the query itself not visible"),
    ],
)
def test_what_fits_better_is_said(judge, wrong, why):
    given = arrays()
    code, said = judge(**given, indices=selected(**given, **wrong))
    assert code == 1 and f"  1.0000  {why}" in said and "first wrong: b=0" in said


def test_positions_in_a_pool_and_left_out_scales_are_recognised(judge):
    given = arrays()
    code, said = judge(**given, indices=selected(**given) + 5000)
    assert code == 1 and "1.0000  positions counted from elsewhere" in said and "+5000" in said
    scales = np.geomspace(0.3, 3, S).astype(np.float32)
    code, said = judge(**given, k_scale=scales, indices=selected(**given))
    assert code == 1 and "1.0000  k_scale left out" in said


def test_rounding_is_told_from_mistakes(judge):
    given = arrays()
    rough = selected(*given.values(), act=lambda x: np.maximum(x, 0).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    code, said = judge("--tolerance", "1e-6", **given, indices=rough)
    assert code == 1 and "All are near ties" in said
    tolerance = said.split("right at a tolerance of ")[1].split(",")[0]
    assert judge("--tolerance", f"{1.01 * float(tolerance)}", **given, indices=rough)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=None), "has no k, wanted q, k, w, indices"),
        (dict(k=np.zeros((S, D + 1), np.float32)), r"k is \[1, 200, 17\], wanted \[1, 200, 16\]"),
        (dict(w=np.zeros((1, T, H), np.float32)), r"w is \[1, 40, 4\], wanted 2 axes"),
        (dict(indices=np.zeros((T, K), np.float32)), "indices is float32, wanted integers"),
        (dict(indices=np.zeros((T + 1, K), int)), r"indices is \[1, 41, 24\], wanted \[1, 40\] and topk"),
        (dict(q=np.zeros((T, H, D), np.uint8)), "q is uint8, wanted floats"),
        (dict(keys=np.zeros(3)), "keys is not known"),
    ],
)
def test_a_dump_of_another_form_is_refused_by_name(judge, change, message):
    given = arrays()
    given |= {"indices": selected(**given)} | change
    code, said = judge(**{name: array for name, array in given.items() if array is not None})
    assert code == 2
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--queries", "0"), "--queries 0: wanted at least 1"),
        (("--tolerance", "-1"), "--tolerance -1.0: wanted at least 0"),
        (("--block-size", "16"), "--block-size 16: --indexer dsa has none, --indexer hisa or block-sparse has"),
    ],
)
def test_arguments_are_checked(judge, arguments, message):
    given = arrays()
    assert judge(*arguments, **given, indices=selected(**given)) == (2, f"error: {message}\n")


def test_a_file_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "dump.npz").write_text("no archive")
    for name in ("dump.npz", "missing.npz"):
        assert main(["check-dump", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_the_command_has_help_and_a_version(capsys):
    for arguments in (["--help"], ["--version"], ["check-dump", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert "hisa-jax check-dump dump.npz" in capsys.readouterr().out
