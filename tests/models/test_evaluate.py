"""Needles, intervals and the table of `hisa-jax evaluate`; tests/integrations/host_lm_eval.py needs lm_eval."""

import math

import pytest

from hisa_jax.__main__ import main
from hisa_jax.models import read_config
from hisa_jax.models.evaluate import needles, results, statistics
from hisa_jax.models.tokens import load_tokenizer

from . import golden

BYTES = golden.FOLDER.parents[1] / "models" / "bytes"


def made(kind, **options):
    return needles.questions(kind, checkpoint=str(BYTES), **dict(lengths=[700, 1500], n=6) | options)


@pytest.mark.parametrize("style", needles.STYLES)
@pytest.mark.parametrize("kind", needles.KINDS)
def test_questions_hold_their_answers_and_have_their_length(kind, style):
    found, tokenizer = made(kind, style=style), load_tokenizer(BYTES, read_config(BYTES).vocab_size)
    assert [question["max_length"] for question in found] == [700] * 6 + [1500] * 6
    for question in found:
        *body, asked = question["input"].rsplit("\n", 2 if style == "sentences" else 1)
        text = body[0]
        assert len(question["outputs"]) == (4 if kind == "multivalue" else 1)
        assert all(text.count(value) == 1 for value in question["outputs"])
        assert not any(value in asked for value in question["outputs"])
        n_tokens = len(tokenizer.encode(question["input"]))
        assert 0.9 * question["max_length"] - 64 <= n_tokens <= question["max_length"] - 16
        at = [text.index(value) for value in question["outputs"]]
        assert at == sorted(at)
        if kind == "single":
            assert abs(at[0] / len(text) - question["depth"]) < 0.12
    if kind == "multiquery":
        assert len({question["text"] for question in found[:6]}) == 2
        assert len({question["outputs"][0] for question in found}) == 12


def test_the_same_seed_makes_the_same_questions_of_the_callers_text(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four\n" * 200)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    first = made("multikey", text=str(tmp_path))
    assert first == made("multikey", text=str(tmp_path)) != made("multikey", text=str(tmp_path), seed=1)
    assert "one two three four" in first[0]["input"]
    with pytest.raises(ValueError, match="the text has 3,800 tokens, wanted 5"):
        made("single", text=str(tmp_path), lengths=[6000])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="double"), "kind is 'double', wanted one of single, multikey"),
        (dict(style="poems"), "style is 'poems', wanted one of lines, sentences"),
        (dict(n=0), "wanted at least 1"),
        (dict(lengths=[64]), "length=64 leaves no text beside"),
        (dict(text="/no/such/text"), "text is /no/such/text, wanted a file or a folder"),
    ],
)
def test_wrong_needles_are_refused(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        made(options.pop("kind", "single"), **options)


def test_an_answer_names_a_value_as_a_word():
    assert needles.found_in(" 01774 48392>>", ["48392", "01774"]) == 1
    assert needles.found_in("48392, then 017745", ["48392", "01774"]) == 0.5


def test_paired_differences_have_the_interval_of_matched_pairs():
    before, after = [1] * 8 + [0] * 2, [1] * 5 + [0] * 4 + [1]
    mean, low, high = statistics.paired(before, after)
    # 1 gained and 3 lost of 10, each with half a question more, of 12.
    half = 1.96 * math.sqrt(5 - 4 / 12) / 12
    assert (mean, low, high) == pytest.approx((-0.2, -2 / 12 - half, -2 / 12 + half), abs=1e-4)
    same = statistics.paired([1, 0, 1], [1, 0, 1])
    assert same[0] == 0 and same[1] < -0.3 and same[2] > 0.3  # three questions are no certainty
    assert statistics.paired([0.5, 0.2, 0.9], [0.6, 0.3, 1.0]) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="3 values and 2 others"):
        statistics.paired([1, 0, 1], [1, 0])


def sample(doc_id, value, length=None, metric="found", **more):
    doc = {} if length is None else {"max_length": length}
    return {"doc_id": doc_id, "doc": doc, "metrics": [metric], metric: value} | more


def test_the_table_has_a_column_an_indexer_and_a_line_a_length():
    flat = {"needle": [sample(i, 1.0, 512 * (1 + i % 2)) for i in range(8)], "other": [sample(0, 0.25, metric="f1")]}
    hisa = {"needle": [sample(i, float(i > 3), 512 * (1 + i % 2)) for i in range(8)][::-1],
            "other": [sample(0, 0.5, metric="f1")]}  # fmt: skip
    rows = results.rows_of({"flat": flat, "hisa": hisa})
    assert [(row.task, row.length, row.values["hisa"]) for row in rows] == [
        ("needle", 512, [0.0, 0.0, 1.0, 1.0]), ("needle", 1024, [0.0, 0.0, 1.0, 1.0]), ("other", None, [0.5]),
    ]  # fmt: skip
    header, _, *lines = results.table(rows)
    assert header.split() == ["task", "tokens", "metric", "n", "flat", "hisa,", "minus", "flat"]
    assert lines[0].split()[:4] == ["needle", "512", "found", "4"] and "0.500 [0.150, 0.850]" in lines[0]
    assert "-0.500 [" in lines[0] and lines[2].split()[-2:] == ["0.500", "+0.250"]
    found = results.json_of(rows)
    assert found[1]["difference"]["mean"] == -0.5 and found[0]["difference"] is None
    assert found[-1]["low"] is None and found[-1]["mean"] == 0.5  # of one question there is no interval


def test_what_is_no_number_a_question_is_left_out_and_rulers_lengths_are_lengths():
    of_ruler = {"doc_id": 0, "doc": {"max_length": 4096}, "metrics": ["4096", "8192"], "4096": 1.0, "8192": -1.0}
    perplexity = sample(0, (-12.0, 30), metric="word_perplexity")
    rows = results.rows_of({"flat": {"niah_single_1": [of_ruler], "wiki": [perplexity]}})
    assert [(row.task, row.metric, row.length) for row in rows] == [("niah_single_1", "string match", 4096)]
    with pytest.raises(ValueError, match="different questions"):
        results.rows_of({"flat": {"a": [sample(0, 1.0), sample(1, 1.0)]}, "hisa": {"a": [sample(0, 1.0)]}})


def test_without_lm_eval_the_command_names_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main(["evaluate", "--checkpoint", str(BYTES), "--tasks", "needles"]) == 1
    assert "pip install 'hisa_jax[evaluate]'" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(BYTES), "--tasks", "needles", "--batch", "0"]) == 2
    assert "--batch 0: wanted at least 1" in capsys.readouterr().err
