"""Promises of the long-range tasks, checked by a reader that knows nothing of how they are made."""

import collections
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from hisa_jax.models.training import lines, tasks
from tests.models.training.reader import Reader

_FILLER = np.frombuffer((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes(), np.uint8)
_CASES = [  # sizes around the defaults, and the least and most of each parameter
    ("needle", {"depth": 0.0}), ("needle", {"depth": 1.0}), ("needle", {}),
    ("multikey", {}), ("multikey", {"n_keys": 1}), ("multikey", {"n_keys": 64, "n_questions": 8}),
    ("multikey", {"n_keys": 2, "n_questions": 5}),
    ("multivalue", {}), ("multivalue", {"n_values": 1}), ("multivalue", {"n_values": 8}),
    ("recall", {}), ("recall", {"n_keys": 5, "n_questions": 1, "depth": 0.5}),
    ("copy", {}), ("copy", {"n_words": 1, "n_passages": 1, "depth": 0.0}),
    ("variables", {}), ("variables", {"hops": 1, "n_chains": 1}), ("variables", {"hops": 4, "n_chains": 8}),
    ("dense_mix", {}),
]  # fmt: skip


def draw(kind, length, seed=0, **parameters):
    return tasks.KINDS[kind](np.random.default_rng(seed), _FILLER[1000 : 1000 + length], **parameters)


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize(("kind", "parameters"), _CASES)
def test_every_answer_is_what_was_stated_before(kind, parameters, length):
    for seed in range(5):
        sample = draw(kind, length, seed, **parameters)
        text = sample.tokens.tobytes()
        reader = Reader(text)  # raises where a question has another answer or comes too early
        assert sample.tokens.shape == sample.is_answer.shape == sample.is_key.shape == (length,)
        assert sample.tokens.dtype == np.uint8
        assert [(asked.answer, text[asked.answer : asked.stop]) for asked in sample.questions] == reader.questions
        marked = np.zeros(length, bool)
        for start, answer in reader.questions:
            marked[start : start + len(answer)] = True
        np.testing.assert_array_equal(sample.is_answer, marked)


@pytest.mark.parametrize(("kind", "parameters"), _CASES)
def test_needs_are_whole_statements_of_the_answer_before_the_question(kind, parameters):
    sample = draw(kind, 16384, seed=3, **parameters)
    text = sample.tokens.tobytes()
    marked = np.zeros(len(text), bool)
    for asked in sample.questions:
        stated = [text[start:stop] for start, stop in asked.needs]
        assert all(line.startswith(b"\n<<") and line.endswith(b">>\n") and line.count(b"<<") == 1 for line in stated)
        assert all(stop <= asked.start for _, stop in asked.needs)
        values = text[asked.answer : asked.stop - 2]
        parts = values.split() if asked.kind == "multivalue" else [values]
        assert all(part in b"".join(stated) for part in parts)
        assert asked.distance == asked.answer - asked.needs[0][0]
        for start, stop in asked.needs:
            marked[start:stop] = True
    np.testing.assert_array_equal(sample.is_key, marked)


@pytest.mark.parametrize(("kind", "parameters"), _CASES)
def test_no_name_is_bound_twice_but_those_of_several_values(kind, parameters):
    for seed in range(5):
        reader = Reader(draw(kind, 16384, seed, **parameters).tokens.tobytes())
        times = collections.Counter(name for name in reader.stated if name[0] != "all")
        assert set(times.values()) <= {1}
        # Nor is a key used for two kinds of statement.
        names = {name for _, name in reader.bound}
        assert len(names) == len(reader.bound)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_same_generator_gives_the_same_sample_and_another_a_different_one(kind):
    first, again, other = draw(kind, 4096, 7), draw(kind, 4096, 7), draw(kind, 4096, 8)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.questions == again.questions
    assert first.tokens.tobytes() != other.tokens.tobytes()


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_text_around_is_the_filler_in_order(kind):
    sample = draw(kind, 16384)
    text = bytearray(sample.tokens)
    lines_of = {(asked.start, asked.stop + 1) for asked in sample.questions}
    lines_of |= {need for asked in sample.questions for need in asked.needs}
    for start, stop in sorted(lines_of, reverse=True):
        del text[start:stop]
    # What no question needs is still in it; all else stands in the filler as it is.
    rest = b"".join(part for part in bytes(text).splitlines(keepends=True) if not part.startswith(b"<<"))
    filler = _FILLER[1000 : 1000 + 16384].tobytes()
    assert rest.replace(b"\n", b"") == filler.replace(b"\n", b"")[: len(rest.replace(b"\n", b""))]


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_its_depth(depth):
    for seed in range(5):
        (asked,) = draw("needle", 16384, seed, depth=depth).questions
        start = asked.needs[0][0]
        assert abs(start / asked.start - depth) < 0.02
    assert depth < 1 or asked.needs[0][1] == asked.start


@pytest.mark.parametrize("kind", ["needle", "multikey", "multivalue", "recall", "copy", "variables"])
def test_a_sample_to_measure_ends_with_its_last_question(kind):
    sample = draw(kind, 4096)
    assert sample.questions[-1].stop == 4095
    assert sample.tokens.tobytes().endswith(b">>\n")


@pytest.mark.parametrize("n_values", [1, 3, 8])
def test_all_values_of_a_key_are_asked_in_order(n_values):
    sample = draw("multivalue", 4096, n_values=n_values)
    (asked,) = sample.questions
    text = sample.tokens.tobytes()
    stated = [text[stop - 8 : stop - 3] for _, stop in asked.needs]
    assert text[asked.answer : asked.stop] == b" ".join(stated) + b">>"
    assert len(stated) == n_values


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_a_chain_takes_its_hops(hops):
    sample = draw("variables", 4096, hops=hops)
    (asked,) = sample.questions
    assert asked.hops == len(asked.needs) == hops
    text = sample.tokens.tobytes()
    links = [text[start:stop].strip(b"\n<>").removeprefix(b"let ").split(b" = ") for start, stop in asked.needs]
    assert links[0][1] == text[asked.answer : asked.stop - 2]
    assert [source for _, source in links[1:]] == [name for name, _ in links[:-1]]
    assert text[asked.start : asked.answer] == b"\n<<value " + links[-1][0] + b" = "


def test_keys_share_their_parts():
    keys = [key.split("-") for key in lines.draw_keys(np.random.default_rng(0), 64)]
    assert len({tuple(key) for key in keys}) == 64
    for pair in ((0, 1), (0, 2), (1, 2)):
        shared = collections.Counter((key[pair[0]], key[pair[1]]) for key in keys)
        assert max(shared.values()) > 1, f"parts {pair} alone tell all keys apart"


def test_values_are_five_random_digits():
    values = lines.draw_values(np.random.default_rng(0), 1000)
    assert len(set(values)) == 1000
    for digits in zip(*values, strict=True):
        counts = collections.Counter(digits)
        assert len(counts) == 10
        assert min(counts.values()) > 60


# 40 to 100 at 16,384 bytes and five times fewer at 2,048, where the lines may fill the sample a little earlier.
@pytest.mark.parametrize(("length", "least", "most"), [(16384, 40, 100), (2048, 7, 20), (128, 1, 2)])
def test_a_dense_mix_has_its_number_of_questions(length, least, most):
    counts = [len(draw("dense_mix", length, seed).questions) for seed in range(40)]
    assert least <= min(counts) and max(counts) <= most
    assert max(counts) - min(counts) >= (most - least) // 2  # it is drawn, not fixed


def test_a_dense_mix_asks_all_kinds_at_all_distances():
    asked = [question for seed in range(20) for question in draw("dense_mix", 16384, seed).questions]
    kinds = collections.Counter(question.kind for question in asked)
    assert set(kinds) == {"multikey", "recall", "multivalue", "copy", "variables"}
    assert min(kinds.values()) > len(asked) / 20
    assert {question.hops for question in asked} == {1, 2, 3, 4}
    # Chains are asked for at their far end, else long ones would be rare.
    assert sum(question.hops == 4 for question in asked) > 0.08 * kinds["variables"]
    distances = np.array([question.distance for question in asked])
    for low, high in ((0, 256), (256, 1024), (1024, 4096), (4096, 8192), (8192, 12288), (12288, 16384)):
        assert np.mean((low <= distances) & (distances < high)) > 0.05, (low, high)


def test_a_dense_mix_asks_some_statements_again_and_some_never():
    sample = draw("dense_mix", 16384)
    text = sample.tokens.tobytes()
    asked = collections.Counter(text[question.start : question.stop] for question in sample.questions)
    stated = set(re.findall(rb"\n<<key (.*)>>\n", text))
    assert max(asked.values()) > 1
    assert any(b"\n<<ask " + pair + b">>" in asked for pair in stated)
    assert any(b"\n<<ask " + pair + b">>" not in asked for pair in stated)


def test_a_dense_mix_takes_a_length_below_that_of_the_filler():
    sample = tasks.dense_mix(np.random.default_rng(0), _FILLER[:4096], 1000)
    assert sample.tokens.shape == (1000,)


def test_lines_stand_between_those_of_the_text_where_it_has_any():
    filler = np.frombuffer(b"a line of forty bytes, its end included\n" * 100, np.uint8)
    for seed in range(10):
        sample = tasks.needle(np.random.default_rng(seed), filler, depth=0.5)
        start = sample.questions[0].needs[0][0]
        assert sample.tokens[:start].tobytes().endswith(b"\n")
    for one_line in (b"x" * 4000, b"x" * 3000 + b"\n" + b"x" * 999):  # no end of a line, none near
        sample = tasks.needle(np.random.default_rng(0), np.frombuffer(one_line, np.uint8), depth=0.5)
        assert sample.questions[0].needs[0][0] == pytest.approx(1960, abs=20)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("needle", {"depth": 1.5}, "needle: depth is 1.5, wanted 0 to 1"),
        ("recall", {"depth": -0.1}, "recall: depth is -0.1, wanted 0 to 1"),
        ("copy", {"depth": 2}, "copy: depth is 2, wanted 0 to 1"),
        ("multikey", {"n_keys": 0}, "multikey: n_keys is 0, wanted at least 1"),
        ("multivalue", {"n_values": 0}, "multivalue: n_values is 0, wanted at least 1"),
        ("variables", {"hops": 0}, "variables: hops is 0, wanted at least 1"),
        ("multikey", {"n_keys": 64}, "multikey: its 65 lines take .* bytes, wanted at most 1024"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, parameters, message):
    with pytest.raises(ValueError, match=message):
        draw(kind, 1024, **parameters)


@pytest.mark.parametrize("length", [127, 1025])
def test_a_dense_mix_refuses_a_length_that_does_not_do(length):
    with pytest.raises(ValueError, match=f"dense_mix: length is {length}, wanted 128 to 1024"):
        tasks.dense_mix(np.random.default_rng(0), _FILLER[:1024], length)


@pytest.mark.parametrize("kind", ["needle", "multivalue", "copy", "variables"])
def test_the_reader_notices_a_wrong_answer(kind):
    sample = draw(kind, 4096)
    tokens = sample.tokens.copy()
    at = sample.questions[0].answer
    tokens[at : at + 2] = np.frombuffer(b"zz", np.uint8)
    with pytest.raises(AssertionError):
        Reader(tokens.tobytes())
